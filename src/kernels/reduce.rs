//! Sweeps over one row, written in lanes so that they vectorise although floating-point addition
//! and maximum do not reassociate.

use super::isa::Isa;
use super::real::Real;

const LANES: usize = 16;
/// Elements that are mapped into a buffer, vectorised, before they are added up. Partial sums in the
/// computing type end here and go on in f64, so that a row of 100,000 classes loses no more than one
/// of 100.
const BLOCK: usize = 256;

/// The maximum; NaN if any value is NaN; minus infinity for an empty row.
#[inline(always)]
pub fn max<F: Real>(row: &[F]) -> F {
    // NaN replaces every number, and no number compares greater than NaN.
    let larger = |a: F, b: F| if b > a || b != b { b } else { a };
    let mut acc = [F::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (a, &b) in acc.iter_mut().zip(chunk) {
            *a = larger(*a, b);
        }
    }
    acc.into_iter().chain(rest.iter().copied()).fold(F::NEG_INFINITY, larger)
}

/// The index of the first maximum, or of the first NaN; 0 for an empty row.
#[inline(always)]
pub fn argmax<F: Real>(row: &[F]) -> usize {
    let largest = max(row);
    let found = |&x: &F| x == largest || x != x;
    row.iter().position(found).unwrap_or(0)
}

/// The sum of at most [`BLOCK`] values.
#[inline(always)]
fn add_up<F: Real>(block: &[F]) -> f64 {
    let mut acc = [F::ZERO; LANES];
    let chunks = block.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (a, &b) in acc.iter_mut().zip(chunk) {
            *a += b;
        }
    }
    let mut total = F::ZERO;
    for &x in acc.iter().chain(rest) {
        total += x;
    }
    total.to_f64()
}

/// `sum_j row_j`
#[inline(always)]
pub fn sum<F: Real>(row: &[F]) -> f64 {
    let mut total = 0.0;
    for block in row.chunks(BLOCK) {
        total += add_up(block);
    }
    total
}

/// `sum_j f(row_j)`
#[inline(always)]
pub fn sum_of<F: Real>(row: &[F], f: impl Fn(F) -> F) -> f64 {
    let mut buffer = [F::ZERO; BLOCK];
    let mut total = 0.0;
    for block in row.chunks(BLOCK) {
        let buffer = &mut buffer[..block.len()];
        for (b, &x) in buffer.iter_mut().zip(block) {
            *b = f(x);
        }
        total += add_up(buffer);
    }
    total
}

/// `sum_j f(x_j, y_j)`; the slices have one length.
#[inline(always)]
pub fn sum_of_pairs<F: Real>(x: &[F], y: &[F], f: impl Fn(F, F) -> F) -> f64 {
    let mut buffer = [F::ZERO; BLOCK];
    let mut total = 0.0;
    for (x, y) in x.chunks(BLOCK).zip(y.chunks(BLOCK)) {
        let buffer = &mut buffer[..x.len()];
        for ((b, &x), &y) in buffer.iter_mut().zip(x).zip(y) {
            *b = f(x, y);
        }
        total += add_up(buffer);
    }
    total
}

/// Writes `e^(scale (row_j - shift))` into `out` and returns its sum.
#[inline(always)]
pub fn exp_shifted<I: Isa, F: Real>(row: &[F], shift: F, scale: F, out: &mut [F]) -> f64 {
    let mut total = 0.0;
    for (out, row) in out.chunks_mut(BLOCK).zip(row.chunks(BLOCK)) {
        for (o, &z) in out.iter_mut().zip(row) {
            *o = ((z - shift) * scale).exp::<I>();
        }
        total += add_up(out);
    }
    total
}

/// `sum_j e^(row_j - shift)`, keeping nothing.
#[inline(always)]
pub fn sum_exp_shifted<I: Isa, F: Real>(row: &[F], shift: F) -> f64 {
    sum_of(row, |z| (z - shift).exp::<I>())
}

#[cfg(test)]
mod tests {
    use super::super::isa::Baseline;
    use super::*;

    #[test]
    fn max_of_every_length_and_nan_anywhere() {
        for n in 0..40 {
            let row: Vec<f32> = (0..n).map(|j| ((j * 7) % 11) as f32 - 5.0).collect();
            let expected = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(max(&row), expected);
            let first = row.iter().position(|&x| x == expected).unwrap_or(0);
            assert_eq!(argmax(&row), first);
            for j in 0..n {
                let mut poisoned = row.clone();
                poisoned[j] = f32::NAN;
                assert!(max(&poisoned).is_nan(), "{n} {j}");
                assert_eq!(argmax(&poisoned), j);
            }
        }
    }

    #[test]
    fn sums_stay_exact_over_long_rows() {
        for n in [0, 1, 15, 16, 17, 255, 256, 257, 100_003] {
            let row: Vec<f32> = (0..n).map(|j| 0.1 + (j % 3) as f32 * 1e-4).collect();
            let exact: f64 = row.iter().map(|&x| f64::from(x)).sum();
            for got in [sum(&row), sum_of(&row, |x| x), sum_of_pairs(&row, &row, |x, _| x)] {
                assert!((got - exact).abs() <= 2e-7 * exact, "{n}: {got} {exact}");
            }
        }
    }

    #[test]
    fn shifted_exponentials() {
        let row = [1.0f64, 2.0, 4.0];
        let mut out = [0.0; 3];
        let total = exp_shifted::<Baseline, _>(&row, 4.0, 0.5, &mut out);
        let exact = [(-1.5f64).exp(), (-1.0f64).exp(), 1.0];
        assert!((total - exact.iter().sum::<f64>()).abs() < 1e-15);
        assert!(out.iter().zip(exact).all(|(a, b)| (a - b).abs() < 1e-15));
        let plain = sum_exp_shifted::<Baseline, _>(&row, 4.0);
        assert!((plain - row.iter().map(|z| (z - 4.0).exp()).sum::<f64>()).abs() < 1e-15);
    }
}
