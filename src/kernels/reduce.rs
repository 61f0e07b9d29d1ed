//! Sweeps over one row, written in lanes so that they vectorise although floating-point addition
//! and maximum do not reassociate.

use super::isa::Isa;
use super::real::Real;

/// Independent accumulators. So many that the loop over them is not unrolled, and thus is vectorised as
/// a loop: unrolled, it depends on what LLVM makes of a hundred scalar instructions.
const LANES: usize = 128;
/// Accumulators of rows that are shorter than this many chunks of [`LANES`], and those whose sums go on
/// in f64.
const FEW_LANES: usize = 32;
const LONG: usize = 2 * LANES;
/// In which a rest of less than all lanes is taken.
const STEP: usize = 8;
/// Elements that are mapped into a buffer, vectorised, before they are added up. Partial sums in the
/// computing type end here and go on in f64, so that a row of 100,000 classes loses no more than one
/// of 100.
const BLOCK: usize = 512;
/// As many for each of [`LANES`] as [`BLOCK`] has for each of [`FEW_LANES`].
const LONG_BLOCK: usize = BLOCK / FEW_LANES * LANES;

/// The maximum; NaN if any value is NaN; minus infinity for an empty row.
#[inline(always)]
pub fn max<F: Real>(row: &[F]) -> F {
    // Looked for on its own, so that the maximum is one instruction.
    if row.iter().fold(false, |any, x| any | x.nan()) {
        return F::NAN;
    }
    let mut acc = in_lanes(row, F::NEG_INFINITY, larger);
    fold(&mut acc, 1, larger);
    acc[0]
}

/// What `f` makes of all values, in some lanes of which each has taken every so many-th.
#[inline(always)]
fn in_lanes<F: Real>(row: &[F], start: F, f: impl Fn(F, F) -> F) -> [F; FEW_LANES] {
    let mut few = [start; FEW_LANES];
    let rest = if row.len() < LONG {
        let (chunks, rest) = row.as_chunks::<FEW_LANES>();
        for chunk in chunks {
            for k in 0..FEW_LANES {
                few[k] = f(chunk[k], few[k]);
            }
        }
        rest
    } else {
        let mut acc = [start; LANES];
        let (chunks, rest) = row.as_chunks::<LANES>();
        for chunk in chunks {
            for k in 0..LANES {
                acc[k] = f(chunk[k], acc[k]);
            }
        }
        fold(&mut acc, FEW_LANES, &f);
        few.copy_from_slice(&acc[..FEW_LANES]);
        rest
    };
    // A rest of unknown length would be taken with masks, whose stores are slow on some processors.
    let (steps, last) = rest.as_chunks::<STEP>();
    let mut step = [start; STEP];
    for chunk in steps {
        for k in 0..STEP {
            step[k] = f(chunk[k], step[k]);
        }
    }
    step[0] = last.iter().fold(step[0], |one, &x| f(x, one));
    for k in 0..STEP {
        few[k] = f(step[k], few[k]);
    }
    few
}

/// Folds the upper half of `lanes` onto the lower one until `count` are left.
#[inline(always)]
fn fold<T: Copy>(lanes: &mut [T], count: usize, f: impl Fn(T, T) -> T) {
    let mut width = lanes.len();
    while width > count {
        width /= 2;
        let (low, high) = lanes.split_at_mut(width);
        for (l, &h) in low.iter_mut().zip(&*high) {
            *l = f(*l, h);
        }
    }
}

/// The larger one of two numbers.
#[inline(always)]
fn larger<F: Real>(a: F, b: F) -> F {
    if a > b { a } else { b }
}

/// The index of the first maximum, or of the first NaN; 0 for an empty row.
#[inline(always)]
pub fn argmax<F: Real>(row: &[F]) -> usize {
    position_of(row, max(row))
}

/// The index of the first value that equals `largest`, the maximum of `row`, or of the first NaN.
#[inline(always)]
pub fn position_of<F: Real>(row: &[F], largest: F) -> usize {
    first(row, |x| x == largest || x.nan())
}

/// The index of the first value for which `found` holds, 0 if there is none.
#[inline(always)]
pub fn first<F: Real>(row: &[F], found: impl Fn(F) -> bool) -> usize {
    let (chunks, _) = row.as_chunks::<FEW_LANES>();
    // Without an exit inside a chunk it is a few vector instructions.
    let holds = |chunk: &[F; FEW_LANES]| chunk.iter().fold(false, |any, &x| any | found(x));
    let start = chunks.iter().position(holds).unwrap_or(chunks.len()) * FEW_LANES;
    let within = row[start..].iter().position(|&x| found(x));
    within.map_or(0, |k| start + k)
}

/// The sum of at most [`BLOCK`] values: lane by lane in the computing type, across the lanes in f64.
#[inline(always)]
fn add_up<F: Real>(block: &[F]) -> f64 {
    across(&in_lanes(block, F::ZERO, |x, sum| sum + x))
}

/// The sum of the first [`FEW_LANES`] lanes.
#[inline(always)]
fn across<F: Real>(lanes: &[F]) -> f64 {
    let mut sums = [0.0; FEW_LANES];
    for (s, &a) in sums.iter_mut().zip(lanes) {
        *s = a.to_f64();
    }
    fold(&mut sums, 1, |a, b| a + b);
    sums[0]
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

/// `sum_j f(row_j)`, where `f` may change the value too.
#[inline(always)]
pub fn sum_of_each<F: Real>(row: &mut [F], f: impl Fn(&mut F) -> F) -> f64 {
    let mut buffer = [F::ZERO; BLOCK];
    let mut total = 0.0;
    for block in row.chunks_mut(BLOCK) {
        let buffer = &mut buffer[..block.len()];
        for (b, x) in buffer.iter_mut().zip(block) {
            *b = f(x);
        }
        total += add_up(buffer);
    }
    total
}

/// `sum_j f(x_j, y_j)`; the slices have one length. Nothing is kept between, which suits an `f` of few
/// instructions; [`sum_of`] is for longer ones.
#[inline(always)]
pub fn sum_of_pairs<F: Real>(x: &[F], y: &[F], f: impl Fn(F, F) -> F) -> f64 {
    let mut total = 0.0;
    for (x, y) in x.chunks(LONG_BLOCK).zip(y.chunks(LONG_BLOCK)) {
        let mut acc = [F::ZERO; LANES];
        let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
        for (x, y) in x.iter().zip(y) {
            for k in 0..LANES {
                acc[k] += f(x[k], y[k]);
            }
        }
        fold(&mut acc, FEW_LANES, |a, b| a + b);
        let ((x, x_last), (y, y_last)) = (x_rest.as_chunks::<STEP>(), y_rest.as_chunks::<STEP>());
        for (x, y) in x.iter().zip(y) {
            for k in 0..STEP {
                acc[k] += f(x[k], y[k]);
            }
        }
        for (&x, &y) in x_last.iter().zip(y_last) {
            acc[0] += f(x, y);
        }
        total += across(&acc);
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
        // Long rows have more lanes, and a rest that is taken in steps.
        for n in (0..40).chain([LONG - 1, LONG, LONG + 3 * STEP + 5, 3 * LANES]) {
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
            for got in [
                sum(&row),
                sum_of(&row, |x| x),
                sum_of_each(&mut row.clone(), |x| *x),
                sum_of_pairs(&row, &row, |x, _| x),
            ] {
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
