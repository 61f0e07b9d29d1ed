//! Sweeps over one row, written in lanes so that they vectorize although floating-point addition
//! and maximum do not reassociate.

use super::isa::Isa;
use super::real::Real;
use std::array::from_fn;
use std::ops::{Add, AddAssign};

/// Independent accumulators. So many that the loop over them is not unrolled before it is vectorized: whether
/// LLVM vectorizes a hundred unrolled scalar instructions is uncertain. As it knows their number, it needs
/// neither masks nor a remainder loop.
const LANES: usize = 32;
/// Accumulators for the remainder of a row, and for short rows.
const REST: usize = 16;
/// Accumulators for loops of few instructions, which would still be unrolled with fewer.
const MANY_LANES: usize = 128;
/// Accumulators for rows that are shorter than [`MANY_LANES`].
const FEW_LANES: usize = 8;
/// Elements that are summed in the computing type. These sums are added up in f64, so that a row of 100,000
/// classes loses no more precision than one of 100.
const BLOCK: usize = 512;
/// As many for each of [`MANY_LANES`] as [`BLOCK`] has for each of [`LANES`].
const LONG_BLOCK: usize = BLOCK / LANES * MANY_LANES;

/// The maximum; NaN if any value is NaN; minus infinity for an empty row.
#[inline(always)]
pub fn max<F: Real>(row: &[F]) -> F {
    let mut most = Most {
        largest: [F::NEG_INFINITY; LANES],
        magnitude: [F::ZERO.magnitude(); LANES],
    };
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        most.take(chunk);
    }
    // Taking a value twice does not change the maximum.
    if rest.is_empty() {
    } else if let Some(last) = row.last_chunk::<LANES>() {
        most.take(last);
    } else if let (Some(first), Some(last)) = (row.first_chunk::<REST>(), row.last_chunk::<REST>())
    {
        most.take(first);
        most.take(last);
    } else {
        most.take(last(row, &mut [F::NEG_INFINITY; REST]));
    }
    most.of_all()
}

/// The largest values so far, of each lane.
struct Most<F: Real> {
    largest: [F; LANES],
    magnitude: [F::Bits; LANES],
}

impl<F: Real> Most<F> {
    /// Takes one more value for each of the first `N` lanes.
    #[inline(always)]
    fn take<const N: usize>(&mut self, chunk: &[F; N]) {
        for k in 0..N {
            self.largest[k] = chunk[k].larger(self.largest[k]);
            self.magnitude[k] = self.magnitude[k].max(chunk[k].magnitude());
        }
    }

    /// The maximum, or NaN.
    #[inline(always)]
    #[allow(
        clippy::needless_bitwise_bool,
        reason = "a branch would keep it from vectorising"
    )]
    fn of_all(self) -> F {
        // Only NaN has a larger magnitude than infinity.
        let infinity = F::NEG_INFINITY.magnitude();
        let nan = self
            .magnitude
            .iter()
            .fold(false, |any, &m| any | (m > infinity));
        if nan {
            return F::NAN;
        }
        folded(self.largest, F::larger)
    }
}

/// The first [`REST`] of the last `count` values of a row, and their number. If there are fewer, the [`last`]
/// values of the row, of which only the last `count` have not been taken yet.
#[inline(always)]
fn left<'a, F: Real>(
    row: &'a [F],
    count: usize,
    room: &'a mut [F; REST],
) -> (&'a [F; REST], usize) {
    if let Some(whole) = row[row.len() - count..].first_chunk::<REST>() {
        return (whole, REST);
    }
    (last(row, room), count)
}

/// The last `N` values of a row, which may overlap the last whole chunk. A shorter row is copied to the end of
/// `room`. (Always copying would be slow: stores cannot be forwarded to a wider load.)
#[inline(always)]
fn last<'a, F: Real, const N: usize>(row: &'a [F], room: &'a mut [F; N]) -> &'a [F; N] {
    if let Some(last) = row.last_chunk::<N>() {
        return last;
    }
    room[N - row.len()..].copy_from_slice(row);
    room
}

/// Writes the results for the values that [`left`] returned for this `count`.
#[inline(always)]
fn put<F: Real>(written: &[F; REST], out: &mut [F], count: usize) {
    let at = out.len() - count;
    if let Some(whole) = out[at..].first_chunk_mut::<REST>() {
        *whole = *written;
    } else if let Some(last) = out.last_chunk_mut::<REST>() {
        *last = *written;
    } else {
        out.copy_from_slice(&written[REST - count..]);
    }
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

/// All lanes, folded in pairs. By value: lanes that are folded in place are stored and reloaded at every step,
/// which takes longer than everything else for a row of a hundred elements.
#[inline(always)]
fn folded<T: Copy>(lanes: [T; LANES], f: impl Fn(T, T) -> T) -> T {
    let lanes: [T; 16] = halved(lanes, &f);
    folded_eight(halved(lanes, &f), f)
}

/// The same for eight lanes.
#[inline(always)]
pub fn folded_eight<T: Copy>(lanes: [T; 8], f: impl Fn(T, T) -> T) -> T {
    let lanes: [T; 4] = halved(lanes, &f);
    let lanes: [T; 2] = halved(lanes, &f);
    f(lanes[0], lanes[1])
}

/// Combines the lower half of the lanes with the upper half.
#[inline(always)]
fn halved<T: Copy, const N: usize, const HALF: usize>(
    lanes: [T; N],
    f: impl Fn(T, T) -> T,
) -> [T; HALF] {
    const { assert!(N == 2 * HALF) };
    from_fn(|k| f(lanes[k], lanes[k + HALF]))
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
    let start = before::<LANES, _>(row, &found);
    let start = start + before::<REST, _>(&row[start..], &found);
    let within = row[start..].iter().position(|&x| found(x));
    within.map_or(0, |k| start + k)
}

/// How many values precede the first whole chunk of `N` that has one for which `found` holds.
#[inline(always)]
fn before<const N: usize, F: Real>(row: &[F], found: &impl Fn(F) -> bool) -> usize {
    let (chunks, _) = row.as_chunks::<N>();
    // A loop: a closure that an iterator calls may not be inlined into the code for an instruction set.
    for (at, chunk) in chunks.iter().enumerate() {
        // Without an early exit inside a chunk, this is a few vector instructions.
        if chunk.iter().fold(false, |any, &x| any | found(x)) {
            return at * N;
        }
    }
    chunks.len() * N
}

/// Adds `part` to `sums`, element by element.
#[inline(always)]
pub fn add<T: Copy + AddAssign>(sums: &mut [T], part: &[T]) {
    for (sum, &part) in sums.iter_mut().zip(part) {
        *sum += part;
    }
}

/// The sum of all lanes, the last steps in f64.
#[inline(always)]
fn across<F: Real>(lanes: [F; LANES]) -> f64 {
    let lanes: [F; 16] = halved(lanes, F::add);
    let lanes: [F; 8] = halved(lanes, F::add);
    folded_eight(lanes.map(F::to_f64), f64::add)
}

/// `sum_j row_j`
#[inline(always)]
pub fn sum<F: Real>(row: &[F]) -> f64 {
    sum_of_pairs(row, row, |x, _| x)
}

/// `sum_j f(row_j)`
#[inline(always)]
pub fn sum_of<F: Real>(row: &[F], f: impl Fn(F) -> F) -> f64 {
    let mut total = 0.0;
    for block in row.chunks(BLOCK) {
        let mut acc = [F::ZERO; LANES];
        let (chunks, rest) = block.as_chunks::<LANES>();
        for x in chunks {
            for k in 0..LANES {
                acc[k] += f(x[k]);
            }
        }
        let mut room = [F::ZERO; REST];
        for piece in 0..rest.len().div_ceil(REST) {
            let (x, count) = left(block, rest.len() - piece * REST, &mut room);
            for k in 0..REST {
                let term = f(x[k]);
                acc[k] += if k < REST - count { F::ZERO } else { term };
            }
        }
        total += across(acc);
    }
    total
}

/// [`sum_of_pairs`] of each of `sums.len()` rows of equal length.
#[inline(always)]
pub fn sums_of_pairs<F: Real>(x: &[F], y: &[F], f: impl Fn(F, F) -> F, sums: &mut [f64]) {
    let cols = x.len() / sums.len().max(1);
    for (i, sum) in sums.iter_mut().enumerate() {
        let row = i * cols..(i + 1) * cols;
        *sum = sum_of_pairs(&x[row.clone()], &y[row], &f);
    }
}

/// `sum_j f(x_j, y_j)` with an `f` of few instructions; the slices have one length.
#[inline(always)]
pub fn sum_of_pairs<F: Real>(x: &[F], y: &[F], f: impl Fn(F, F) -> F) -> f64 {
    if x.len() < MANY_LANES {
        return sum_of_few_pairs(x, y, f);
    }
    let mut total = 0.0;
    for (x, y) in x.chunks(LONG_BLOCK).zip(y.chunks(LONG_BLOCK)) {
        let mut acc = [F::ZERO; MANY_LANES];
        let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<MANY_LANES>(), y.as_chunks::<MANY_LANES>());
        for (x, y) in x.iter().zip(y) {
            for k in 0..MANY_LANES {
                acc[k] += f(x[k], y[k]);
            }
        }
        // In place: by value, the surrounding code gets slower.
        fold(&mut acc, LANES, F::add);
        for (x, y) in x_rest.chunks(LANES).zip(y_rest.chunks(LANES)) {
            for ((acc, &x), &y) in acc.iter_mut().zip(x).zip(y) {
                *acc += f(x, y);
            }
        }
        total += across(from_fn(|k| acc[k]));
    }
    total
}

/// [`sum_of_pairs`] of a short row, where clearing and folding many lanes would take longer than the sum.
#[inline(always)]
fn sum_of_few_pairs<F: Real>(x: &[F], y: &[F], f: impl Fn(F, F) -> F) -> f64 {
    let mut acc = [F::ZERO; FEW_LANES];
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<FEW_LANES>(), y.as_chunks::<FEW_LANES>());
    for (x, y) in x.iter().zip(y) {
        for k in 0..FEW_LANES {
            acc[k] += f(x[k], y[k]);
        }
    }
    let mut total = F::ZERO;
    for (&x, &y) in x_rest.iter().zip(y_rest) {
        total += f(x, y);
    }
    (total + folded_eight(acc, F::add)).to_f64()
}

/// Writes the first of what `f(row_j)` returns into `out`, of the same length, and returns the sum of
/// the second.
#[inline(always)]
pub fn map_sum<F: Real>(row: &[F], out: &mut [F], f: impl Fn(F) -> (F, F)) -> f64 {
    let mut total = 0.0;
    for (row, out) in row.chunks(BLOCK).zip(out.chunks_mut(BLOCK)) {
        let mut acc = [F::ZERO; LANES];
        let (chunks, rest) = row.as_chunks::<LANES>();
        for (x, o) in chunks.iter().zip(out.as_chunks_mut::<LANES>().0) {
            for k in 0..LANES {
                let (written, added) = f(x[k]);
                o[k] = written;
                acc[k] += added;
            }
        }
        let (mut room, mut written) = ([F::ZERO; REST], [F::ZERO; REST]);
        for piece in 0..rest.len().div_ceil(REST) {
            let behind = rest.len() - piece * REST;
            let (x, count) = left(row, behind, &mut room);
            for k in 0..REST {
                let added;
                (written[k], added) = f(x[k]);
                acc[k] += if k < REST - count { F::ZERO } else { added };
            }
            put(&written, out, behind);
        }
        total += across(acc);
    }
    total
}

/// Writes `e^(scale (row_j - shift))` into `out` and returns its sum. `shift` is the maximum of the row,
/// and `scale` positive.
#[inline(always)]
pub fn exp_shifted<I: Isa, F: Real>(row: &[F], shift: F, scale: F, out: &mut [F]) -> f64 {
    map_sum(row, out, |z| {
        let e = ((z - shift) * scale).exp_nonpositive::<I>();
        (e, e)
    })
}

/// `sum_j e^(row_j - shift)`, keeping nothing.
#[inline(always)]
pub fn sum_exp_shifted<I: Isa, F: Real>(row: &[F], shift: F) -> f64 {
    sum_of(row, |z| (z - shift).exp_nonpositive::<I>())
}

#[cfg(test)]
mod tests {
    use super::super::isa::Baseline;
    use super::*;

    #[test]
    fn max_of_every_length_and_nan_anywhere() {
        for n in (0..40).chain([3 * LANES - 1, 3 * LANES, 5 * LANES + 13]) {
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
        for n in [0, 1, 15, 31, 32, 33, 100, 255, 256, 257, 100_003] {
            let row: Vec<f32> = (0..n).map(|j| 0.1 + (j % 3) as f32 * 1e-4).collect();
            let exact: f64 = row.iter().map(|&x| f64::from(x)).sum();
            for got in [
                sum(&row),
                sum_of(&row, |x| x),
                map_sum(&row, &mut row.clone(), |x| (-x, x)),
                sum_of_pairs(&row, &row, |x, _| x),
            ] {
                assert!((got - exact).abs() <= 2e-7 * exact, "{n}: {got} {exact}");
            }
        }
    }

    #[test]
    fn every_value_is_mapped_once() {
        for n in (0..70).chain([BLOCK - 1, BLOCK + 1, BLOCK + LANES + 5]) {
            let row: Vec<f32> = (0..n).map(|j| (j % 7) as f32).collect();
            let mut out = vec![9.0; n];
            let total = map_sum(&row, &mut out, |x| (x + 1.0, 2.0 * x));
            assert!(out.iter().zip(&row).all(|(o, x)| *o == x + 1.0), "{n}");
            assert_eq!(total, 2.0 * sum(&row), "{n}");
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
