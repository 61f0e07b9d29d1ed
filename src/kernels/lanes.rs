//! Narrow rows, [`LANES`] of them side by side.
//!
//! A row of a few classes is too short for a sweep of its own: the horizontal reduction of its sums takes longer
//! than the sums. Read column by column ([`Rows::side_by_side`](super::rows::Rows::side_by_side)), each row has a
//! lane of its own, and its maximum, its sums and what follows from them are computed for all lanes at once. Each
//! kernel sets the width up to which that is faster, as measured: the more it sums, the wider; a gradient has to be
//! transposed when it is written.
//!
//! Loops over the lanes of one column go through [`each_lane`] and [`set`], and read values that are the same for all
//! columns from [`held`]: LLVM then makes each column one vector. It unrolls such short loops before it vectorizes, and
//! would otherwise vectorize across columns, with gathers and scatters, or not vectorize at all.

use super::element::Element;
use super::isa::{self, Isa, Kernel};
use super::real::Real;
use super::rows::Rows;
use std::hint::black_box;
use std::ops::Range;
mod tile;

pub use tile::Tile;

/// Rows side by side.
pub const LANES: usize = 16;

/// A number of each row.
pub type Lanes<T> = [T; LANES];

/// The same kernel, for narrow rows.
pub struct Narrow<K>(pub K);

/// Runs `kernel`, or its form for narrow rows. They are compiled as separate functions: in one, they would compete
/// for registers and inlining.
#[inline]
pub fn dispatch<K>(kernel: K, narrow: bool) -> K::Output
where
    K: Kernel,
    Narrow<K>: Kernel<Output = K::Output>,
{
    if narrow {
        isa::dispatch(Narrow(kernel))
    } else {
        isa::dispatch(kernel)
    }
}

/// Whether rows of `cols` columns, split into these ranges, are processed side by side by a kernel that does so up to
/// `widest` columns. Unused lanes lower the limit: a tile of few rows wastes most of them.
pub fn narrow(ranges: &[Range<usize>], cols: usize, widest: usize) -> bool {
    let rows: usize = ranges.iter().map(Range::len).sum();
    let lanes = ranges
        .iter()
        .map(|range| range.len().next_multiple_of(LANES));
    lanes.sum::<usize>().saturating_mul(cols) <= rows.saturating_mul(widest)
}

/// Splits `range` into ranges of at most [`LANES`] rows, and also gives each relative to the start of `range`.
#[inline(always)]
pub fn tiles(range: Range<usize>) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let (first, count) = (range.start, range.len());
    (0..count).step_by(LANES).map(move |start| {
        let end = count.min(start + LANES);
        (first + start..first + end, start..end)
    })
}

/// Calls `f` for each lane of a column. Keeps LLVM from vectorizing the enclosing loop over columns.
#[inline(always)]
pub fn each_lane(mut f: impl FnMut(usize)) {
    black_box(());
    for k in 0..LANES {
        f(k);
    }
}

/// Sets every lane of a column. Stores them only after all are computed: to LLVM, what `f` reads may alias the column.
#[inline(always)]
pub fn set<T: Copy>(column: &mut Lanes<T>, f: impl Fn(usize) -> T) {
    let mut lanes = *column;
    each_lane(|k| lanes[k] = f(k));
    *column = lanes;
}

/// Forces the numbers of each lane that a loop over columns reads into memory: otherwise LLVM tracks them as separate
/// scalars, which it does not find worth a vector.
#[inline(always)]
pub fn held<T: Copy>(lanes: Lanes<T>) -> Lanes<T> {
    black_box(lanes)
}

/// The largest number of each lane and the first column that has it. NaN is larger than any.
#[inline(always)]
#[allow(
    clippy::needless_bitwise_bool,
    reason = "a branch would keep it from vectorising"
)]
pub fn argmax<F: Real>(columns: &[Lanes<F>]) -> (Lanes<F>, Lanes<F>) {
    let (mut largest, mut at) = ([F::NEG_INFINITY; LANES], [F::ZERO; LANES]);
    let mut index = F::ZERO;
    for lanes in columns {
        each_lane(|k| {
            let better = (lanes[k] > largest[k]) | (lanes[k].nan() & !largest[k].nan());
            largest[k] = if better { lanes[k] } else { largest[k] };
            at[k] = if better { index } else { at[k] };
        });
        index += F::ONE;
    }
    (largest, at)
}

/// The largest number of each lane. NaN is ignored: in a softmax it propagates to the sum anyway.
#[inline(always)]
pub fn largest<F: Real>(columns: &[Lanes<F>]) -> Lanes<F> {
    let mut largest = [F::NEG_INFINITY; LANES];
    for lanes in columns {
        each_lane(|k| largest[k] = lanes[k].larger(largest[k]));
    }
    largest
}

/// Room for the softmax of a tile: its logits and their exponentials.
pub type Room<F> = (Tile<F>, Tile<F>);

/// The softmax of a tile of rows.
pub struct Softmax<'a, F> {
    /// The logits.
    pub z: &'a [Lanes<F>],
    /// `e^{scale (z_c - max)}`
    pub exp: &'a mut [Lanes<F>],
    /// The largest logit of each row, ignoring NaN.
    pub max: Lanes<F>,
    /// The sum of `exp`, in f64: the logarithms of two such sums may nearly cancel. NaN where a logit is.
    pub total: Lanes<f64>,
}

impl<'a, F: Real> Softmax<'a, F> {
    /// The softmax of the rows of `range`, with a positive `scale`.
    #[inline(always)]
    pub fn of<I: Isa, E: Element<Acc = F>>(
        rows: &Rows<'_, E>,
        range: Range<usize>,
        scale: F,
        (z, exp): &'a mut Room<F>,
    ) -> Self {
        rows.side_by_side(range, z);
        let max = held(largest(z));
        let total = exp_shifted::<I, _>(z, &max, scale, exp);
        Self { z, exp, max, total }
    }
}

/// Room for a softmax.
pub fn room<F: Real>(cols: usize) -> Room<F> {
    (Tile::new(cols), Tile::new(cols))
}

/// Writes `e^(scale (z - shift))` and returns its sum. `shift` is the maximum of each lane.
#[inline(always)]
pub fn exp_shifted<I: Isa, F: Real>(
    columns: &[Lanes<F>],
    shift: &Lanes<F>,
    scale: F,
    out: &mut [Lanes<F>],
) -> Lanes<f64> {
    let mut total = [0.0; LANES];
    for (z, e) in columns.iter().zip(out) {
        set(e, |k| ((z[k] - shift[k]) * scale).exp_nonpositive::<I>());
        each_lane(|k| total[k] += e[k].to_f64());
    }
    total
}

/// Writes the class of each row into `out`, which has a place for at most [`LANES`].
#[inline(always)]
pub fn write_labels<F: Real>(label: &Lanes<F>, out: &mut [i64]) {
    for (out, label) in out.iter_mut().zip(label) {
        *out = label.to_f64() as i64;
    }
}

/// Adds the values of the first `count` lanes to `total`.
#[inline(always)]
pub fn add(total: &mut Lanes<f64>, values: &Lanes<f64>, count: usize) {
    if count == LANES {
        for k in 0..LANES {
            total[k] += values[k];
        }
    } else {
        for (total, value) in total.iter_mut().zip(&values[..count]) {
            *total += value;
        }
    }
}

/// Adds the sum over the lanes of each column to `sums`, and clears the lanes.
#[inline(always)]
pub fn flush<F: Real>(lanes: &mut [Lanes<F>], sums: &mut [f64]) {
    for (lanes, sum) in lanes.iter_mut().zip(sums) {
        let mut parts = wide(&held(*lanes));
        let mut width = LANES;
        while width > 1 {
            width /= 2;
            for k in 0..width {
                parts[k] += parts[k + width];
            }
        }
        *sum += parts[0];
        *lanes = [F::ZERO; LANES];
    }
}

/// As f64.
#[inline(always)]
pub fn wide<F: Real>(lanes: &Lanes<F>) -> Lanes<f64> {
    let mut wide = [0.0; LANES];
    for (wide, x) in wide.iter_mut().zip(lanes) {
        *wide = x.to_f64();
    }
    wide
}

/// Softmax rows, each split into one class and all others, as in [`softmax::Split`](super::softmax::Split).
pub struct Split<F> {
    /// The class of each row.
    label: Lanes<F>,
    /// The logit of that class.
    pub logit: Lanes<F>,
    /// Its part of `sum_c e^{z_c - max}`.
    pub own: Lanes<f64>,
    /// The part of all others.
    pub others: Lanes<f64>,
}

/// Splits the rows with logits `z` and exponentials `e` at the class `label`, where `e` is 0 afterwards.
#[inline(always)]
pub fn split<F: Real>(z: &[Lanes<F>], e: &mut [Lanes<F>], label: &Lanes<F>) -> Split<F> {
    let (mut logit, mut own, mut others) = ([F::ZERO; LANES], [F::ZERO; LANES], [F::ZERO; LANES]);
    let label = held(*label);
    let mut class = F::ZERO;
    for (z, e) in z.iter().zip(e) {
        let mut rest = *e;
        each_lane(|k| {
            // Sums in which all terms but one are 0, of numbers that are loaded unconditionally: conditional
            // assignments and loads would become branches.
            let (logit_c, e_c) = (z[k], rest[k]);
            let (of_logit, of_own, other) = if label[k] == class {
                (logit_c, e_c, F::ZERO)
            } else {
                (F::ZERO, F::ZERO, e_c)
            };
            logit[k] += of_logit;
            own[k] += of_own;
            others[k] += other;
            rest[k] = other;
        });
        *e = rest;
        class += F::ONE;
    }
    Split {
        label,
        logit,
        own: wide(&own),
        others: wide(&others),
    }
}

impl<F: Real> Split<F> {
    /// `-ln p` of the class of each row, with the maximum that was subtracted from its logits.
    #[inline(always)]
    pub fn cross_entropy<I: Isa>(&self, max: &Lanes<F>) -> Lanes<f64> {
        let mut values = [0.0; LANES];
        for k in 0..LANES {
            let total = self.own[k] + self.others[k];
            values[k] = Real::ln::<I>(total) + (max[k].to_f64() - self.logit[k].to_f64());
        }
        values
    }

    /// Writes `factor (e - total onehot)`, with the exponentials that [`split`] left.
    #[inline(always)]
    pub fn gradient(&self, e: &[Lanes<F>], factor: &Lanes<f64>, grad: &mut [Lanes<F>]) {
        let (mut of_own, mut of_others) = ([F::ZERO; LANES], [F::ZERO; LANES]);
        for k in 0..LANES {
            of_own[k] = F::of(-self.others[k] * factor[k]);
            of_others[k] = F::of(factor[k]);
        }
        at_label(&held(self.label), &held(of_own), grad.iter_mut().zip(e), {
            let of_others = held(of_others);
            move |e, k| e[k] * of_others[k]
        });
    }
}

/// Writes `own` to the column of the label, and to each of the others what `other` returns for its input column.
#[inline(always)]
pub fn at_label<'a, F: Real>(
    label: &Lanes<F>,
    own: &Lanes<F>,
    columns: impl Iterator<Item = (&'a mut Lanes<F>, &'a Lanes<F>)>,
    other: impl Fn(&Lanes<F>, usize) -> F,
) {
    let mut class = F::ZERO;
    for (out, column) in columns {
        set(out, |k| {
            // Both are computed before one is selected: a conditional load or product would become a branch.
            let (own, other) = (own[k], other(column, k));
            if label[k] == class { own } else { other }
        });
        class += F::ONE;
    }
}

/// Writes `of_a a - of_b b`, with a factor of each lane.
#[inline(always)]
pub fn difference<F: Real>(
    (a, of_a): (&[Lanes<F>], &Lanes<f64>),
    (b, of_b): (&[Lanes<F>], &Lanes<f64>),
    out: &mut [Lanes<F>],
) {
    let (of_a, of_b) = (held(rounded(of_a)), held(rounded(of_b)));
    for ((a, b), out) in a.iter().zip(b).zip(out) {
        set(out, |k| a[k] * of_a[k] - b[k] * of_b[k]);
    }
}

/// Rounded to the computing type.
#[inline(always)]
pub fn rounded<F: Real>(lanes: &Lanes<f64>) -> Lanes<F> {
    let mut rounded = [F::ZERO; LANES];
    for (rounded, &x) in rounded.iter_mut().zip(lanes) {
        *rounded = F::of(x);
    }
    rounded
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::isa::Baseline;
    use super::super::{reduce, softmax};
    use super::*;

    /// Added columns that make rows wider than any loss processes side by side.
    pub const WIDE: usize = 128;

    /// The rows with so many added columns of `filler` that they are not narrow.
    pub fn widened<E: Element>(data: &[E], cols: usize, filler: f64) -> Vec<E> {
        let mut out = Vec::new();
        for row in data.chunks(cols) {
            out.extend_from_slice(row);
            out.resize(out.len() + WIDE, E::store(E::Acc::of(filler)));
        }
        out
    }

    /// Rows with ties, and their columns.
    fn rows(cols: usize) -> (Vec<f32>, Tile<f32>) {
        let z: Vec<f32> = (0..LANES * cols)
            .map(|k| ((k * 7) % 11) as f32 / 2.0)
            .collect();
        let mut tile = Tile::new(cols);
        let view = Rows::contiguous(&z, LANES, cols).unwrap();
        view.side_by_side(0..LANES, &mut tile);
        (z, tile)
    }

    #[test]
    fn tiles_cover_a_range_once() {
        let got: Vec<_> = tiles(7..7 + 2 * LANES + 3).collect();
        assert_eq!(got.len(), 3);
        assert_eq!(got[1], (7 + LANES..7 + 2 * LANES, LANES..2 * LANES));
        assert_eq!(got[2].1, 2 * LANES..2 * LANES + 3);
        assert_eq!(tiles(5..5).count(), 0);
    }

    #[test]
    fn tiles_of_few_rows_are_for_fewer_columns() {
        let taken = |rows: usize, cols| narrow(&[0..rows / 2, rows / 2..rows], cols, 96);
        assert!(taken(64, 96) && !taken(64, 97));
        assert!(taken(16, 48) && !taken(16, 49));
        assert!(taken(2, 6) && !taken(2, 7));
        assert!(narrow(&[], 1000, 96), "nothing to take");
    }

    #[test]
    fn the_first_maximum_or_nan_of_each_row() {
        for cols in [1, 2, 5, 32] {
            let (z, mut tile) = rows(cols);
            let (largest, at) = argmax(&tile);
            for (k, z) in z.chunks(cols).enumerate() {
                assert_eq!(
                    (largest[k], at[k] as usize),
                    (reduce::max(z), reduce::argmax(z))
                );
            }
            for c in 0..cols {
                tile[c][3] = f32::NAN;
                tile[cols - 1][3] = f32::NAN;
                let (largest, at) = argmax(&tile);
                assert!(largest[3].is_nan() && at[3] as usize <= c, "{c}");
                assert!(c > 0 || at[3] == 0.0);
                tile[c][3] = f32::INFINITY;
                assert!(c == cols - 1 || argmax(&tile).0[3].is_nan());
            }
            let nothing = vec![[f32::NEG_INFINITY; LANES]; cols];
            assert_eq!(argmax(&nothing), (nothing[0], [0.0; LANES]));
        }
    }

    #[test]
    fn each_lane_is_the_softmax_of_its_row() {
        for cols in [1, 2, 5, 32] {
            let (z, tile) = rows(cols);
            let mut grad = Tile::new(cols);
            let mut label = [0.0; LANES];
            for (k, label) in label.iter_mut().enumerate() {
                *label = (k % cols) as f32;
            }
            let mut room = room(cols);
            let view = Rows::contiguous(&z, LANES, cols).unwrap();
            let softmax = Softmax::of::<Baseline, _>(&view, 0..LANES, 1.0, &mut room);
            assert_eq!(softmax.z, &*tile);
            let (e, total) = (softmax.exp, softmax.total);
            let split = split(&tile, e, &label);
            let factors = std::array::from_fn(|k| 0.5 / total[k]);
            split.gradient(e, &factors, &mut grad);
            for (k, z) in z.chunks(cols).enumerate() {
                let (class, mut expected) = (k % cols, vec![0.0f32; cols]);
                let max = reduce::max(z);
                assert_eq!(softmax.max[k], max);
                let row = softmax::split_with_gradient::<Baseline, f32>(
                    z,
                    max,
                    class,
                    |_| 0.5,
                    &mut [],
                    &mut expected,
                );
                assert!((split.own[k] - row.own).abs() < 1e-6 * row.own);
                assert!((split.others[k] - row.others).abs() <= 1e-6 * row.others);
                assert!((total[k] - row.total()).abs() < 1e-6 * row.total());
                assert_eq!(split.logit[k], z[class]);
                for (grad, expected) in grad.iter().zip(expected) {
                    assert!((grad[k] - expected).abs() <= 1e-6 * expected.abs());
                }
            }
        }
    }

    #[test]
    fn a_weighted_difference_of_each_lane() {
        let (a, b) = ([[3.0f32; LANES]], [[1.0f32; LANES]]);
        let mut out = [[0.0; LANES]];
        difference((&a, &[2.0; LANES]), (&b, &[0.5; LANES]), &mut out);
        assert_eq!(out, [[5.5; LANES]]);
    }
}
