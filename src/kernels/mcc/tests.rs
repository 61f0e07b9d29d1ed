use super::super::element::{Bf16, F16};
use super::*;

/// tllib's formula, matrix and all, in f64.
fn reference(z: &[f64], rows: usize, cols: usize, t: f64) -> f64 {
    let mut p = vec![0.0; rows * cols];
    let mut w = vec![0.0; rows];
    for i in 0..rows {
        let z = &z[i * cols..(i + 1) * cols];
        let max = z.iter().copied().fold(f64::MIN, f64::max);
        let total: f64 = z.iter().map(|z| ((z - max) / t).exp()).sum();
        let row = &mut p[i * cols..(i + 1) * cols];
        for c in 0..cols {
            row[c] = ((z[c] - max) / t).exp() / total;
        }
        let h: f64 = row.iter().map(|p| -p * (p + 1e-5).ln()).sum();
        w[i] = 1.0 + (-h).exp();
    }
    let total: f64 = w.iter().sum();
    for w in &mut w {
        *w *= rows as f64 / total;
    }
    let m = |a: usize, b: usize| {
        (0..rows)
            .map(|i| w[i] * p[i * cols + a] * p[i * cols + b])
            .sum::<f64>()
    };
    let mut off = 0.0;
    for b in 0..cols {
        let column: f64 = (0..cols).map(|a| m(a, b)).sum();
        off += (0..cols)
            .filter(|&a| a != b)
            .map(|a| m(a, b) / column)
            .sum::<f64>();
    }
    off / cols as f64
}

fn logits(rows: usize, cols: usize) -> Vec<f64> {
    (0..rows * cols)
        .map(|k| ((k * 7919 + 13) % 101) as f64 / 25.0 - 2.0)
        .collect()
}

/// The loss of logits rounded to `E`, on one thread.
fn value<E: Element>(z: &[f64], rows: usize, cols: usize) -> f64 {
    let z: Vec<_> = z.iter().map(|&z| E::store(E::Acc::of(z))).collect();
    let view = Rows::contiguous(&z, rows, cols).unwrap();
    mcc(view, 1.0, None, NonZeroUsize::MIN).value
}

/// Rows that are nearly certain, one class in two of them each, so that all classes are alike.
#[test]
fn confident_rows_keep_their_digits() {
    for cols in [2, 10, NARROW, NARROW + 1] {
        for gap in [5.0, 20.0, 30.0, 40.0] {
            let rows = 2 * cols;
            let z: Vec<f64> = (0..rows * cols)
                .map(|k| {
                    if k / cols % cols == k % cols {
                        gap
                    } else {
                        0.0
                    }
                })
                .collect();
            let (e, rest) = ((-gap).exp(), (cols - 1) as f64);
            let total = 1.0 + rest * e;
            let (p, q) = (1.0 / total, e / total);
            let exact = (p * rest * q + rest * q * (1.0 - q)) / (p + rest * q);
            let off = |value: f64| (value / exact - 1.0).abs();
            assert!(off(value::<f64>(&z, rows, cols)) < 1e-13, "{cols} {gap}");
            assert!(off(value::<f32>(&z, rows, cols)) < 1e-6, "{cols} {gap}");
        }
    }
}

#[test]
fn matches_the_matrix_formula_and_finite_differences() {
    for (rows, cols, t) in [
        (1, 5, 1.0),
        (8, 2, 0.5),
        (7, 13, 2.5),
        (35, 3, 1.0),
        (300, 3, 1.0),
        (19, 37, 1.0),
    ] {
        let z = logits(rows, cols);
        for threads in [1, 3] {
            let threads = NonZeroUsize::new(threads).unwrap();
            let mut grad = vec![0.0; z.len()];
            let view = Rows::contiguous(&z, rows, cols).unwrap();
            let loss = mcc(view, t, Some(&mut grad), threads);
            assert!((loss.value - reference(&z, rows, cols, t)).abs() < 1e-12);
            assert_eq!(mcc(view, t, None, threads).value, loss.value);
            // The weights are constants to the gradient: difference with them held.
            let held = |z: &[f64]| {
                frozen(
                    z,
                    rows,
                    cols,
                    t,
                    &loss_weights(&self::logits(rows, cols), rows, cols, t),
                )
            };
            for k in (0..z.len()).step_by(3) {
                let (mut up, mut down) = (z.clone(), z.clone());
                up[k] += 1e-6;
                down[k] -= 1e-6;
                let difference = (held(&up) - held(&down)) / 2e-6;
                assert!(
                    (grad[k] - difference).abs() < 1e-8,
                    "{k}: {} {difference}",
                    grad[k]
                );
            }
        }
    }
}

#[test]
fn parts_that_add_their_sums_are_one_batch() {
    for cols in [5, 25] {
        parts(cols);
    }
}

fn parts(cols: usize) {
    let (rows, t) = (11, 1.5);
    let z = logits(rows, cols);
    let mut whole = vec![0.0; z.len()];
    let view = Rows::contiguous(&z, rows, cols).unwrap();
    let expected = mcc(view, t, Some(&mut whole), NonZeroUsize::MIN);

    let mut grad = vec![0.0; z.len()];
    let mut total = vec![0.0; 2 * cols];
    let mut parts = Vec::new();
    let mut start = 0;
    // A part may be empty.
    for (count, threads) in [(4, 1), (0, 2), (7, 3)] {
        let range = start * cols..(start + count) * cols;
        start += count;
        let view = Rows::contiguous(&z[range.clone()], count, cols).unwrap();
        let threads = NonZeroUsize::new(threads).unwrap();
        let swept = sweep(view, t, Some(&mut grad[range.clone()]), threads);
        for (total, sum) in total
            .iter_mut()
            .zip(swept.sums.s.iter().chain(&swept.sums.e))
        {
            *total += sum;
        }
        parts.push((view, range, swept));
    }
    for (view, range, mut swept) in parts {
        swept.sums.s.copy_from_slice(&total[..cols]);
        swept.sums.e.copy_from_slice(&total[cols..]);
        let loss = finish(swept, view, t, Some(&mut grad[range]));
        assert!((loss.value - expected.value).abs() < 1e-14);
    }
    for (part, whole) in grad.iter().zip(&whole) {
        assert!((part - whole).abs() < 1e-15, "{part} {whole}");
    }
}

fn softmax(z: &[f64], rows: usize, cols: usize, t: f64) -> Vec<f64> {
    let mut p = Vec::with_capacity(rows * cols);
    for z in z.chunks(cols) {
        let total: f64 = z.iter().map(|z| (z / t).exp()).sum();
        p.extend(z.iter().map(|z| (z / t).exp() / total));
    }
    p
}

fn loss_weights(z: &[f64], rows: usize, cols: usize, t: f64) -> Vec<f64> {
    softmax(z, rows, cols, t)
        .chunks(cols)
        .map(|p| 1.0 + p.iter().map(|p| p * (p + 1e-5).ln()).sum::<f64>().exp())
        .collect()
}

fn frozen(z: &[f64], rows: usize, cols: usize, t: f64, w: &[f64]) -> f64 {
    let p = softmax(z, rows, cols, t);
    let class = |c: usize| {
        let s: f64 = (0..rows).map(|i| w[i] * p[i * cols + c]).sum();
        let d: f64 = (0..rows).map(|i| w[i] * p[i * cols + c].powi(2)).sum();
        d / s
    };
    1.0 - (0..cols).map(class).sum::<f64>() / cols as f64
}

#[test]
fn lower_precisions_agree_with_f64() {
    fn check<E: Element>(cols: usize, tolerance: f64) {
        let (rows, t) = (33, 2.0);
        let stored: Vec<E> = logits(rows, cols)
            .iter()
            .map(|&z| E::store(E::Acc::of(z)))
            .collect();
        let exact: Vec<f64> = stored.iter().map(|z| z.load().to_f64()).collect();
        let one = NonZeroUsize::MIN;
        let mut expected = vec![0.0; exact.len()];
        let reference = mcc(
            Rows::contiguous(&exact, rows, cols).unwrap(),
            t,
            Some(&mut expected),
            one,
        );
        let mut grad = vec![E::store(E::Acc::ZERO); exact.len()];
        let loss = mcc(
            Rows::contiguous(&stored, rows, cols).unwrap(),
            t,
            Some(&mut grad),
            one,
        );
        assert!((loss.value - reference.value).abs() < 1e-6);
        let largest = expected.iter().fold(0.0f64, |a, g| a.max(g.abs()));
        for (g, e) in grad.iter().zip(&expected) {
            assert!((g.load().to_f64() / loss.scale - e).abs() <= tolerance * largest);
        }
    }
    for cols in [17, 33] {
        check::<f32>(cols, 1e-5);
        check::<F16>(cols, 1e-3);
        check::<Bf16>(cols, 8e-3);
    }
}

#[test]
fn float16_gradients_use_its_range_and_stay_within() {
    let largest = |rows: usize, cols: usize, spread: f64, t: f64| {
        let z: Vec<F16> = (0..rows * cols)
            .map(|k| ((k * 7919 + k / cols * 31 + 13) % 101) as f64 / 50.0 - 1.0)
            .map(|z| F16::store((spread * z) as f32))
            .collect();
        let mut grad = vec![F16(0); z.len()];
        let view = Rows::contiguous(&z, rows, cols).unwrap();
        mcc(view, t, Some(&mut grad), NonZeroUsize::MIN);
        grad.iter().fold(0.0f32, |a, g| a.max(g.load().abs()))
    };
    for (rows, cols) in [(1, 3), (2, 2), (2, 60), (64, 10), (300, 100)] {
        for spread in [0.01, 1.0, 8.0, 200.0] {
            for t in [0.05, 1.0, 20.0] {
                let found = largest(rows, cols, spread, t);
                assert!(found <= 16_400.0, "{rows} {cols} {spread} {t}: {found}");
            }
        }
    }
    // In a large batch every element of the gradient is small: the bound 4 / T leaves less than 0.01.
    assert!(largest(300, 100, 1.0, 2.0) > 0.5);
    assert!(largest(3000, 20, 1.0, 2.0) > 0.5);
}

#[test]
fn absent_classes_have_the_limit_and_nan_stays() {
    let z = [800.0f32, 0.0, -800.0, 0.0, 800.0, -800.0];
    let mut grad = [1.0f32; 6];
    let view = Rows::contiguous(&z, 2, 3).unwrap();
    let loss = mcc(view, 1.0, Some(&mut grad), NonZeroUsize::MIN);
    assert!((loss.value - 1.0 / 3.0).abs() < 1e-6, "{}", loss.value);
    assert!(grad.iter().all(|g| *g == 0.0), "{grad:?}");
    let z = [0.0f32, f32::NAN, 1.0, 2.0];
    let loss = mcc(
        Rows::contiguous(&z, 2, 2).unwrap(),
        1.0,
        Some(&mut grad[..4]),
        NonZeroUsize::MIN,
    );
    assert!(loss.value.is_nan() && grad[..4].iter().all(|g| g.is_nan()));
    let empty = Rows::<f32>::contiguous(&[], 0, 3).unwrap();
    assert!(mcc(empty, 1.0, None, NonZeroUsize::MIN).value.is_nan());
}

#[test]
fn a_certain_row_keeps_its_gradient() {
    // Row 0 is certain of class 0, to 1e-7 or so; row 1 is certain of class 1, to 1e-9.
    for cols in [3, 40] {
        let mut z = vec![-60.0; 2 * cols];
        (z[0], z[1]) = (16.0, 0.0);
        (z[cols], z[cols + 1]) = (0.0, 21.0);
        let w = loss_weights(&z, 2, cols, 1.0);
        let p = softmax(&z, 2, cols, 1.0);
        let s = |c: usize| w[0] * p[c] + w[1] * p[cols + c];
        let d = |c: usize| w[0] * p[c].powi(2) + w[1] * p[cols + c].powi(2);
        // By the two classes that matter: p_0 p_1 times the difference of the slopes.
        let slope = |i: usize, c: usize| (2.0 * p[i * cols + c] - d(c) / s(c)) / s(c);
        let narrow: Vec<f32> = z.iter().map(|&z| z as f32).collect();
        let mut grad = vec![0.0f32; z.len()];
        let view = Rows::contiguous(&narrow, 2, cols).unwrap();
        mcc(view, 1.0, Some(&mut grad), NonZeroUsize::MIN);
        for i in 0..2 {
            let row = i * cols;
            let exact = -w[i] / cols as f64 * p[row] * p[row + 1] * (slope(i, 0) - slope(i, 1));
            let got = f64::from(grad[row]);
            assert!(
                (got / exact - 1.0).abs() < 1e-5,
                "{cols} {i}: {got} {exact}"
            );
        }
    }
}

#[test]
fn certain_rows_keep_their_loss() {
    // Each row is certain of a class of its own: the loss is the sum of what is left for the others.
    for n in [5, 40] {
        let z: Vec<f64> = (0..n * n)
            .map(|k| {
                if k / n == k % n {
                    18.0
                } else {
                    (k * 7 % 5) as f64 / 4.0
                }
            })
            .collect();
        let (w, p) = (loss_weights(&z, n, n, 1.0), softmax(&z, n, n, 1.0));
        let rest =
            |i: usize, c: usize| -> f64 { (0..n).filter(|&k| k != c).map(|k| p[i * n + k]).sum() };
        let of_class = |c: usize| {
            let s: f64 = (0..n).map(|i| w[i] * p[i * n + c]).sum();
            (0..n)
                .map(|i| w[i] * p[i * n + c] * rest(i, c))
                .sum::<f64>()
                / s
        };
        let exact = (0..n).map(of_class).sum::<f64>() / n as f64;
        assert!(exact < 3e-6);
        let narrow: Vec<f32> = z.iter().map(|&z| z as f32).collect();
        let view = Rows::contiguous(&narrow, n, n).unwrap();
        let loss = mcc(view, 1.0, None, NonZeroUsize::MIN).value;
        assert!((loss / exact - 1.0).abs() < 1e-6, "{n}: {loss} {exact}");
    }
}
