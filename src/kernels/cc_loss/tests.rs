use super::*;
use crate::kernels::element::{Bf16, F16};

fn logits(rows: usize, cols: usize, seed: usize) -> Vec<f64> {
    (0..rows * cols)
        .map(|k| ((k * 7919 + seed) % 101) as f64 / 25.0 - 2.0)
        .collect()
}

/// `a` (n x m) times `b` (m x k).
fn product(a: &[f64], b: &[f64], (n, m, k): (usize, usize, usize)) -> Vec<f64> {
    let entry = |i: usize, j: usize| (0..m).map(|l| a[i * m + l] * b[l * k + j]).sum();
    (0..n * k).map(|e| entry(e / k, e % k)).collect()
}

fn transpose(a: &[f64], cols: usize) -> Vec<f64> {
    let rows = a.len() / cols;
    (0..a.len())
        .map(|e| a[e % rows * cols + e / rows])
        .collect()
}

struct Call {
    value: f64,
    grad: Vec<f64>,
    count: usize,
}

fn call<E: Element>(
    weak: &[f64],
    strong: &[f64],
    shape: (usize, usize),
    t: f64,
    gram: bool,
) -> Call {
    let store = |z: &[f64]| {
        z.iter()
            .map(|&z| E::store(E::Acc::of(z)))
            .collect::<Vec<_>>()
    };
    let (weak, strong) = (store(weak), store(strong));
    let (rows, cols) = shape;
    let view = |z| Rows::contiguous(z, rows, cols).unwrap();
    let threads = NonZeroUsize::new(2).unwrap();
    let found = select(view(&weak), view(&strong), t, 0.3, threads);
    let n = found.count();
    let (mut u, mut v, mut p) = (
        vec![0.0; 2 * n * cols],
        vec![0.0; 2 * n * cols],
        vec![0.0; n * cols],
    );
    found.factors(Factors {
        u: &mut u,
        v: &mut v,
        strong: &mut p,
    });
    let q = v[..n * cols].to_vec();
    let (value, x, y);
    if gram {
        let (uu, vv) = (
            product(&u, &transpose(&u, cols), (2 * n, cols, 2 * n)),
            product(&v, &transpose(&v, cols), (2 * n, cols, 2 * n)),
        );
        value = inner(&uu, &vv);
        x = product(&vv[..n * 2 * n], &u, (n, 2 * n, cols));
        y = product(
            &product(&p, &transpose(&u, cols), (n, cols, 2 * n)),
            &v,
            (n, 2 * n, cols),
        );
    } else {
        let d = product(&transpose(&u, cols), &v, (cols, 2 * n, cols));
        value = inner(&d, &d);
        x = product(&q, &transpose(&d, cols), (n, cols, cols));
        y = product(&p, &d, (n, cols, cols));
    }
    let factor = n as f64 / (rows * cols) as f64;
    let mut grad = vec![E::store(E::Acc::ONE); rows * cols];
    let scale = found.gradient(&x, &y, factor, &mut grad);
    let grad = grad.iter().map(|g| g.load().to_f64() / scale).collect();
    Call {
        value: value * factor,
        grad,
        count: n,
    }
}

struct Plain {
    p: Vec<Vec<f64>>,
    w: Vec<f64>,
}

fn plain(z: &[f64], cols: usize, rows: &[usize], t: f64) -> Plain {
    let softmax = |i: &usize| {
        let e: Vec<f64> = z[i * cols..(i + 1) * cols]
            .iter()
            .map(|z| (z / t).exp())
            .collect();
        let total: f64 = e.iter().sum();
        e.into_iter().map(|e| e / total).collect::<Vec<_>>()
    };
    let p: Vec<_> = rows.iter().map(softmax).collect();
    let w = p
        .iter()
        .map(|p| 1.0 + p.iter().map(|p| p * (p + 1e-5).ln()).sum::<f64>().exp())
        .collect();
    Plain { p, w }
}

fn normalised(p: &[Vec<f64>], w: &[f64]) -> Vec<Vec<f64>> {
    let cols = p[0].len();
    let m = |a: usize, b: usize| p.iter().zip(w).map(|(p, w)| w * p[a] * p[b]).sum::<f64>();
    let column = |b: usize| (0..cols).map(|a| m(a, b)).sum::<f64>();
    (0..cols)
        .map(|a| (0..cols).map(|b| m(a, b) / column(b)).collect())
        .collect()
}

#[test]
fn both_ways_match_the_formula_and_finite_differences() {
    for (rows, cols, t) in [(9, 5, 1.0), (7, 3, 2.0), (4, 13, 0.5), (1, 2, 1.0)] {
        let (weak, strong) = (logits(rows, cols, 13), logits(rows, cols, 57));
        let all: Vec<_> = (0..rows).collect();
        let confident = plain(&weak, cols, &all, t).p.into_iter().enumerate();
        let chosen: Vec<_> = confident
            .filter(|(_, p)| p.iter().any(|&p| p >= 0.3))
            .map(|(i, _)| i)
            .collect();
        let expected = plain(&weak, cols, &chosen, t);
        let held = plain(&strong, cols, &chosen, t).w;
        // The weights are constants to the gradient: difference with them held.
        let loss = |strong: &[f64]| {
            let n = normalised(&expected.p, &expected.w);
            let m = normalised(&plain(strong, cols, &chosen, t).p, &held);
            let total: f64 = n
                .iter()
                .flatten()
                .zip(m.iter().flatten())
                .map(|(n, m)| (n - m).powi(2))
                .sum();
            total * chosen.len() as f64 / (rows * cols) as f64
        };
        for gram in [false, true] {
            let got = call::<f64>(&weak, &strong, (rows, cols), t, gram);
            assert_eq!(got.count, chosen.len());
            assert!(
                (got.value - loss(&strong)).abs() < 1e-13,
                "{} {}",
                got.value,
                loss(&strong)
            );
            for k in 0..strong.len() {
                let (mut up, mut down) = (strong.clone(), strong.clone());
                up[k] += 1e-5;
                down[k] -= 1e-5;
                let difference = (loss(&up) - loss(&down)) / 2e-5;
                assert!(
                    (got.grad[k] - difference).abs() < 1e-9,
                    "{k}: {} {difference}",
                    got.grad[k]
                );
            }
        }
    }
}

#[test]
fn equal_predictions_give_exactly_zero_and_half_types_agree() {
    let (weak, strong) = (logits(9, 5, 13), logits(9, 5, 57));
    for gram in [false, true] {
        let same = call::<f32>(&weak, &weak, (9, 5), 1.0, gram);
        assert!(same.value == 0.0 && same.grad.iter().all(|g| *g == 0.0));
    }
    let round = |z: &[f64]| {
        z.iter()
            .map(|&z| f64::from(Bf16::store(z as f32).load()))
            .collect::<Vec<_>>()
    };
    let (weak, strong) = (round(&weak), round(&strong));
    let exact = call::<f64>(&weak, &strong, (9, 5), 1.0, false);
    let half = call::<F16>(&weak, &strong, (9, 5), 1.0, false);
    assert!((half.value - exact.value).abs() < 1e-9);
    let largest = exact.grad.iter().fold(0.0f64, |a, g| a.max(g.abs()));
    assert!(
        half.grad
            .iter()
            .zip(&exact.grad)
            .all(|(h, e)| (h - e).abs() < 1e-3 * largest)
    );
}

#[test]
fn absent_classes_are_columns_of_zeros_and_nan_stays_where_it_counts() {
    let weak = [900.0, 0.0, -900.0, 0.0, 900.0, -900.0];
    let got = call::<f64>(&weak, &[0.0; 6], (2, 3), 1.0, false);
    // N is diag(1, 1, 0), N' is 1/3 everywhere.
    let expected = (2.0 * (2.0f64 / 3.0).powi(2) + 7.0 / 9.0) / 3.0;
    assert!((got.value - expected).abs() < 1e-12, "{}", got.value);
    let got = call::<f64>(&weak, &weak, (2, 3), 1.0, true);
    assert!(got.value == 0.0 && got.grad.iter().all(|g| *g == 0.0));
    let got = call::<f64>(
        &[f64::NAN, 0.0, 3.0, 0.0],
        &[f64::NAN, 0.0, 1.0, 0.0],
        (2, 2),
        1.0,
        false,
    );
    assert!(got.count == 1 && got.value.is_finite() && got.grad[..2] == [0.0, 0.0]);
    let got = call::<f64>(
        &[1.0, 0.0, 3.0, 0.0],
        &[f64::NAN, 0.0, 1.0, 0.0],
        (2, 2),
        1.0,
        false,
    );
    assert!(got.count == 2 && got.value.is_nan() && got.grad[0].is_nan());
}
