use super::super::element::{Bf16, F16};
use super::super::product::Alone;
use super::*;

fn logits(rows: usize, cols: usize, seed: usize) -> Vec<f64> {
    (0..rows * cols)
        .map(|k| ((k * 7919 + seed) % 101) as f64 / 25.0 - 2.0)
        .collect()
}

struct Call {
    value: f64,
    grad: Vec<f64>,
    count: usize,
}

/// Which algorithm, and the type of its products.
#[derive(Clone, Copy)]
enum Way {
    Matrix,
    Single,
    Gram,
}
use Way::{Gram, Matrix, Single};

fn call<E: Element>(
    weak: &[f64],
    strong: &[f64],
    (rows, cols): (usize, usize),
    temperature: f64,
    way: Way,
) -> Call {
    let store = |z: &[f64]| {
        z.iter()
            .map(|&z| E::store(E::Acc::of(z)))
            .collect::<Vec<_>>()
    };
    let (weak, strong) = (store(weak), store(strong));
    let view = |z| Rows::contiguous(z, rows, cols).unwrap();
    let threads = NonZeroUsize::new(2).unwrap();
    let chosen = choose(view(&weak), temperature, 0.3, threads);
    let pairs = Pairs {
        weak: view(&weak),
        strong: view(&strong),
        temperature,
        chosen: &chosen,
        threads,
    };
    let run = |grad: Option<&mut [E]>| {
        let Ok(loss) = match way {
            Matrix => matrix::<E, f64, _>(pairs, grad, &Alone),
            Single => matrix::<E, f32, _>(pairs, grad, &Alone),
            Gram => gram(pairs, grad, &Alone).map(Some),
        };
        loss.unwrap()
    };
    let mut grad = vec![E::store(E::Acc::ONE); rows * cols];
    let loss = run(Some(&mut grad));
    assert_eq!(run(None).value.to_bits(), loss.value.to_bits());
    let grad = grad.iter().map(|g| g.load().to_f64() / loss.scale);
    Call {
        value: loss.value,
        grad: grad.collect(),
        count: chosen.len(),
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
        for way in [Matrix, Gram] {
            let got = call::<f64>(&weak, &strong, (rows, cols), t, way);
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
fn many_rows_and_classes_are_taken_in_turns() {
    // Every other row is sure of a class.
    let sharp = |seed| {
        let mut z = logits(290, 701, seed);
        for i in (0..290).step_by(2) {
            z[i * 701 + (i * 13 + seed / 50) % 701] = 9.0;
        }
        z
    };
    let (weak, strong) = (sharp(13), sharp(57));
    let one = call::<f64>(&weak, &strong, (290, 701), 1.0, Matrix);
    assert_eq!(one.count, 145);
    let largest = one.grad.iter().fold(0.0f64, |a, g| a.max(g.abs()));
    for (way, tolerance) in [(Gram, 1e-10), (Single, 1e-5)] {
        let other = call::<f64>(&weak, &strong, (290, 701), 1.0, way);
        assert!((other.value - one.value).abs() < tolerance * one.value);
        let off = other.grad.iter().zip(&one.grad).map(|(a, b)| (a - b).abs());
        assert!(off.fold(0.0, f64::max) < tolerance * largest);
    }
}

#[test]
fn equal_predictions_give_exactly_zero_and_half_types_agree() {
    let (weak, strong) = (logits(9, 5, 13), logits(9, 5, 57));
    for way in [Matrix, Single, Gram] {
        let same = call::<f32>(&weak, &weak, (9, 5), 1.0, way);
        assert!(same.value == 0.0 && same.grad.iter().all(|g| *g == 0.0));
    }
    let round = |z: &[f64]| {
        z.iter()
            .map(|&z| f64::from(Bf16::store(z as f32).load()))
            .collect::<Vec<_>>()
    };
    let (weak, strong) = (round(&weak), round(&strong));
    let exact = call::<f64>(&weak, &strong, (9, 5), 1.0, Matrix);
    let half = call::<F16>(&weak, &strong, (9, 5), 1.0, Matrix);
    assert!((half.value - exact.value).abs() < 1e-9);
    let largest = exact.grad.iter().fold(0.0f64, |a, g| a.max(g.abs()));
    assert!(
        half.grad
            .iter()
            .zip(&exact.grad)
            .all(|(h, e)| (h - e).abs() < 1e-3 * largest)
    );
}

/// Classes in one turn of each of two workers, in several, and in turns of one worker for many rows.
#[test]
fn turns_over_the_classes_match_the_matrix() {
    for (rows, cols) in [(32, 500), (32, 2500), (FEW + 8, 1000)] {
        let numbers = |step: usize| -> Vec<f64> {
            (0..rows * cols)
                .map(|k| {
                    if k % cols == k / cols % 7 {
                        9.0
                    } else {
                        (k * step % 17) as f64 / 9.0
                    }
                })
                .collect()
        };
        let (weak, strong) = (numbers(7), numbers(5));
        let of = |way| call::<f64>(&weak, &strong, (rows, cols), 1.0, way);
        let (around, through) = (of(Gram), of(Matrix));
        assert!(around.count > FEW.min(rows) / 2);
        assert!((around.value - through.value).abs() <= 1e-12 * through.value);
        let largest = through
            .grad
            .iter()
            .fold(0.0f64, |most, g| most.max(g.abs()));
        for (got, expected) in around.grad.iter().zip(&through.grad) {
            assert!(
                (got - expected).abs() <= 1e-11 * largest,
                "{got} {expected}"
            );
        }
    }
}

#[test]
fn rare_classes_need_products_in_f64() {
    let (weak, strong) = ([300.0, 0.0, 0.0, 300.0], [0.0, 300.0, 200.0, 0.0]);
    let weak = Rows::contiguous(&weak, 2, 2).unwrap();
    let rare = [0.0, -300.0, 1.0, -250.0];
    for strong in [&strong, &rare] {
        let pairs = Pairs {
            weak,
            strong: Rows::contiguous(strong, 2, 2).unwrap(),
            temperature: 1.0,
            chosen: &[0, 1],
            threads: NonZeroUsize::MIN,
        };
        let (mut grad, mut other) = ([0.0; 4], [0.0; 4]);
        let Ok(single) = matrix::<f64, f32, _>(pairs, None, &Alone);
        let Ok(double) = matrix::<f64, f64, _>(pairs, Some(&mut grad), &Alone);
        let Ok(around) = gram(pairs, Some(&mut other), &Alone);
        let double = double.unwrap();
        assert_eq!(single.is_none(), strong == &rare);
        assert!((double.value - around.value).abs() <= 1e-12);
        assert!(grad.iter().zip(other).all(|(a, b)| (a - b).abs() <= 1e-12));
    }
}

#[test]
fn absent_classes_are_columns_of_zeros_and_nan_stays_where_it_counts() {
    let weak = [900.0, 0.0, -900.0, 0.0, 900.0, -900.0];
    let got = call::<f64>(&weak, &[0.0; 6], (2, 3), 1.0, Matrix);
    // N is diag(1, 1, 0), N' is 1/3 everywhere.
    let expected = (2.0 * (2.0f64 / 3.0).powi(2) + 7.0 / 9.0) / 3.0;
    assert!((got.value - expected).abs() < 1e-12, "{}", got.value);
    let got = call::<f64>(&weak, &weak, (2, 3), 1.0, Gram);
    assert!(got.value == 0.0 && got.grad.iter().all(|g| *g == 0.0));
    let got = call::<f64>(
        &[f64::NAN, 0.0, 3.0, 0.0],
        &[f64::NAN, 0.0, 1.0, 0.0],
        (2, 2),
        1.0,
        Matrix,
    );
    assert!(got.count == 1 && got.value.is_finite() && got.grad[..2] == [0.0, 0.0]);
    let got = call::<f64>(
        &[1.0, 0.0, 3.0, 0.0],
        &[f64::NAN, 0.0, 1.0, 0.0],
        (2, 2),
        1.0,
        Matrix,
    );
    assert!(got.count == 2 && got.value.is_nan() && got.grad[0].is_nan());
}
