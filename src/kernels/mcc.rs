//! Minimum class confusion, in `O(B C)` and without the `C x C` matrix.
//!
//! With `p = softmax(z / T)` (`B` rows, `C` classes), row entropy
//! `H_i = -sum_c p_ic ln(p_ic + 1e-5)` and weight `w_i ~ 1 + e^{-H_i}` (a constant to the gradient),
//! the confusion matrix is `P^T diag(w) P` with its columns scaled to sum 1. The sum of its off-diagonal
//! elements needs only two sums per column:
//!
//! ```text
//! loss    = 1/C sum_c e_c / s_c        s_c = sum_i w_i p_ic    e_c = sum_i w_i p_ic (1 - p_ic)
//! dL/dp_ic = -(w_i / C) (2 p_ic - (1 - e_c / s_c)) / s_c
//! dL/dz_ic = p_ic (dL/dp_ic - sum_k p_ik dL/dp_ik) / T
//! ```
//!
//! Both are unchanged when all weights are scaled together, so the weights stay unnormalized and
//! one sweep computes them and the sums. A class whose probability is 0 in every row (tllib: 0/0 = NaN)
//! has the limits 1 in the loss and 0 in the gradient. Where one class has most of a row's probability,
//! its `1 - p` is computed as the sum of all others: the loss of confident rows keeps its digits.

use super::Loss;
use super::element::{Element, stored_scale};
use super::isa::{Isa, Kernel};
use super::lanes;
use super::parallel::{cut_optional, run, split};
use super::real::Real;
use super::reduce;
use super::rows::{CACHE_LINE, Rows, store_row};
mod classes;
mod narrow;
mod sums;

use classes::{Slopes, total};
pub(super) use narrow::weights;
use std::f64::consts::LN_2;
use std::num::NonZeroUsize;
use std::ops::Range;
pub use sums::Sums;
use sums::Totals;

/// Inside the logarithm of the entropy, as in tllib.
pub const ENTROPY_EPSILON: f64 = 1e-5;
/// Rows whose contributions are added in the computing type before they go to the f64 sums.
const FLUSH: usize = 16;
/// The widest rows that are taken side by side: narrower than for most losses, as the second sweep has to transpose
/// them once more.
const NARROW: usize = 48;
/// Elements of the rows that are swept together, so that the next row starts while the sums of one are reduced.
const GROUP: usize = 4096;

/// What the first sweep keeps of a row; `max` and `reciprocal` serve to recompute its probabilities.
#[derive(Clone, Copy)]
struct Row<F> {
    weight: F,
    max: F,
    reciprocal: F,
    /// Not set for narrow rows, which treat every class with the largest logit as the lead.
    lead: Option<Lead<F>>,
}

/// Bytes that are kept of a row between the sweeps, at most.
pub const KEPT: usize = size_of::<Row<f64>>();

/// The class that has more than half of a row's probability.
#[derive(Clone, Copy)]
struct Lead<F> {
    class: usize,
    /// 1 minus its probability.
    others: F,
}

/// What the first sweep over a batch leaves for the second.
pub struct Swept<E: Element> {
    /// The sums over this batch. Replacing them by those of a larger batch makes this batch a part of it.
    pub sums: Sums,
    kept: Vec<Vec<Row<E::Acc>>>,
    ranges: Vec<Range<usize>>,
}

/// Loss of `logits` at `temperature`; with `grad` (contiguous, same shape) also its gradient.
pub fn mcc<E: Element>(
    logits: Rows<'_, E>,
    temperature: f64,
    mut grad: Option<&mut [E]>,
    threads: NonZeroUsize,
) -> Loss {
    let swept = sweep(logits, temperature, grad.as_deref_mut(), threads);
    finish(swept, logits, temperature, grad)
}

/// The first sweep. `grad` must be passed to [`finish`] unmodified.
pub fn sweep<E: Element>(
    logits: Rows<'_, E>,
    temperature: f64,
    grad: Option<&mut [E]>,
    threads: NonZeroUsize,
) -> Swept<E> {
    let cols = logits.cols();
    let ranges = split(logits.rows(), threads);
    let narrow = lanes::narrow(&ranges, cols, NARROW);
    let mut probabilities = cut_optional(grad, &ranges, cols);
    let sweeps: Vec<_> = ranges
        .iter()
        .zip(&mut probabilities)
        .map(|(range, out)| {
            let sweep = Sweep {
                logits,
                temperature,
                range: range.clone(),
                out: out.as_deref_mut(),
            };
            move || lanes::dispatch(sweep, narrow)
        })
        .collect();
    // There is one range at least.
    let (kept, parts): (Vec<_>, Vec<_>) = run(sweeps).into_iter().unzip();
    let sums = Sums::of(parts);
    Swept { sums, kept, ranges }
}

/// The loss, and with `grad` the second sweep. NaN where no row was seen.
pub fn finish<E: Element>(
    swept: Swept<E>,
    logits: Rows<'_, E>,
    temperature: f64,
    grad: Option<&mut [E]>,
) -> Loss {
    let Swept { sums, kept, ranges } = swept;
    let cols = logits.cols();
    let mut slopes = grad.is_some().then(|| Slopes::<E::Acc>::new(cols));
    let value = total(&sums, slopes.as_mut(), ranges.len()) / cols as f64;
    let bound = slopes.as_ref().map_or(0.0, Slopes::bound);
    let scale = stored_scale::<E>(bound / temperature);

    if let Some(Slopes { ratio, inverse }) = &slopes {
        let narrow = lanes::narrow(&ranges, cols, NARROW);
        let parts = cut_optional(grad, &ranges, cols);
        let jobs: Vec<_> = ranges
            .into_iter()
            .zip(kept)
            .zip(parts)
            .filter_map(|((range, kept), out)| {
                let out = out?;
                let job = Gradient {
                    logits,
                    temperature,
                    range,
                    kept,
                    ratio,
                    inverse,
                    scale,
                    out,
                };
                Some(move || lanes::dispatch(job, narrow))
            })
            .collect();
        run(jobs);
    }
    Loss { value, scale }
}

/// First sweep: probabilities (into `out` where they fit there), weights and class sums.
struct Sweep<'a, E: Element> {
    logits: Rows<'a, E>,
    temperature: f64,
    range: Range<usize>,
    out: Option<&'a mut [E]>,
}

impl<E: Element> Kernel for Sweep<'_, E> {
    type Output = (Vec<Row<E::Acc>>, Sums);

    #[inline(always)]
    fn run<I: Isa>(self) -> Self::Output {
        let cols = self.logits.cols();
        let group = (GROUP / cols.max(1)).clamp(1, FLUSH);
        let mut scratch = self.logits.scratch();
        let mut exps = vec![E::Acc::ZERO; group * cols];
        let mut out = self.out.and_then(E::exact_mut);
        let mut spare = vec![E::Acc::ZERO; if out.is_some() { 0 } else { group * cols }];
        let mut kept = Vec::with_capacity(self.range.len());
        let mut totals = Totals::new(cols);
        let inverse_t = E::Acc::of(1.0 / self.temperature);
        for start in self.range.clone().step_by(group) {
            let end = self.range.end.min(start + group);
            let first = start - self.range.start;
            let p = match &mut out {
                Some(out) => &mut out[first * cols..(end - self.range.start) * cols],
                None => &mut spare[..(end - start) * cols],
            };
            for (i, exps) in (start..end).zip(exps.chunks_exact_mut(cols)) {
                let z = self.logits.in_turn(i, &mut scratch);
                kept.push(exponentials::<I, _>(z, inverse_t, exps));
            }
            let rows = &mut kept[first..];
            weigh::<I, _>(&exps, rows, p);
            totals.add::<I>(rows, p);
        }
        (kept, totals.sums())
    }
}

/// Writes `e^{(z_c - max z) / T}`. The weight is computed later.
#[inline(always)]
fn exponentials<I: Isa, F: Real>(z: &[F], inverse_t: F, out: &mut [F]) -> Row<F> {
    let max = reduce::max(z);
    let total = reduce::exp_shifted::<I, _>(z, max, inverse_t, out);
    let lead = (total < 2.0).then(|| lead(out, total));
    Row {
        weight: F::ZERO,
        max,
        reciprocal: F::of(1.0 / total),
        lead,
    }
}

/// The class whose exponential is 1, where that is more than half of the `total`.
#[inline(always)]
fn lead<F: Real>(exps: &mut [F], total: f64) -> Lead<F> {
    let class = reduce::first(exps, |e| e == F::ONE);
    exps[class] = F::ZERO;
    let others = F::of(reduce::sum(exps) / total);
    exps[class] = F::ONE;
    Lead { class, others }
}

/// Writes the probabilities of at most [`FLUSH`] rows and finds their weights.
#[inline(always)]
fn weigh<I: Isa, F: Real>(exps: &[F], rows: &mut [Row<F>], p: &mut [F]) {
    let cols = p.len() / rows.len();
    let mut weights = [0.0; FLUSH];
    let each = exps.chunks_exact(cols).zip(p.chunks_exact_mut(cols));
    for (((exps, p), row), weight) in each.zip(&*rows).zip(&mut weights) {
        let log2 = reduce::map_sum(exps, p, |e| {
            let p = e * row.reciprocal;
            (p, p * (p + F::of(ENTROPY_EPSILON)).log2_for_sums::<I>())
        });
        *weight = LN_2 * log2;
    }
    for weight in &mut weights {
        *weight = 1.0 + Real::exp::<I>(*weight);
    }
    for (row, weight) in rows.iter_mut().zip(weights) {
        row.weight = F::of(weight);
    }
}

/// Second sweep: the gradient, from the probabilities that the first one left in `out`, or from
/// the logits again where a half type could not hold them.
struct Gradient<'a, E: Element> {
    logits: Rows<'a, E>,
    temperature: f64,
    range: Range<usize>,
    kept: Vec<Row<E::Acc>>,
    /// `1 - e_c / s_c`
    ratio: &'a [E::Acc],
    /// `1 / s_c`
    inverse: &'a [E::Acc],
    scale: f64,
    out: &'a mut [E],
}

impl<E: Element> Kernel for Gradient<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let cols = self.logits.cols();
        let factor = -1.0 / (cols as f64 * self.temperature);
        let inverse_t = E::Acc::of(1.0 / self.temperature);
        let mut room = vec![E::Acc::ZERO; cols + PAGE / size_of::<E::Acc>()];
        let h = apart(&mut room, cols, self.inverse);
        if let Some(out) = E::exact_mut(self.out) {
            for (row, kept) in out.chunks_exact_mut(cols).zip(&self.kept) {
                let factor = E::Acc::of(factor) * kept.weight;
                gradient_row::<I, _>(row, kept, (self.ratio, self.inverse), factor, h);
            }
            return;
        }
        let mut scratch = self.logits.scratch();
        let mut p = vec![E::Acc::ZERO; cols];
        let rows = self
            .range
            .zip(&self.kept)
            .zip(self.out.chunks_exact_mut(cols));
        for ((i, kept), out) in rows {
            let z = self.logits.in_turn(i, &mut scratch);
            for (p, &z) in p.iter_mut().zip(z) {
                *p = ((z - kept.max) * inverse_t).exp_nonpositive::<I>() * kept.reciprocal;
            }
            let factor = E::Acc::of(factor) * kept.weight;
            gradient_row::<I, _>(&mut p, kept, (self.ratio, self.inverse), factor, h);
            store_row(&p, E::Acc::of(self.scale), out);
        }
    }
}

/// Bytes after which a processor that compares only the low bits of addresses takes a load for one of a recent store.
const PAGE: usize = 4096;

/// `count` numbers of `room`, which has [`PAGE`] bytes more, so that storing them does not delay loads of `other` at
/// the same index or behind it.
#[inline(always)]
fn apart<'a, F>(room: &'a mut [F], count: usize, other: &[F]) -> &'a mut [F] {
    let distance = (other.as_ptr() as usize).wrapping_sub(room.as_ptr() as usize + CACHE_LINE);
    let start = distance % PAGE / size_of::<F>();
    &mut room[start..start + count]
}

/// Turns the probabilities of a row into its gradient, in place: with the slopes
/// `g_c = (2 p_c - ratio_c) / s_c` and that of the leading class, `g_m`,
/// `dL/dz_c = factor (h_c - p_c sum_k h_k)`, `h_c = p_c (g_c - g_m)`.
///
/// Any number in place of `g_m` gives the same result. This one makes `h_m = 0`: where `p_m` is near 1, the
/// gradient is a sum of small terms, and not the difference of two large ones.
#[inline(always)]
fn gradient_row<I: Isa, F: Real>(
    row: &mut [F],
    kept: &Row<F>,
    (ratio, inverse): (&[F], &[F]),
    factor: F,
    h: &mut [F],
) {
    let slope = |p: F, ratio: F, inverse: F| inverse * (p + p - ratio);
    let leading = kept.lead.map_or(F::ZERO, |Lead { class, .. }| {
        slope(row[class], ratio[class], inverse[class])
    });
    for (((h, &p), &r), &inverse) in h.iter_mut().zip(&*row).zip(ratio).zip(inverse) {
        *h = p * (slope(p, r, inverse) - leading);
    }
    let total = F::of(-reduce::sum(h));
    for (p, &h) in row.iter_mut().zip(&*h) {
        *p = factor * p.mul_add::<I>(total, h);
    }
}

#[cfg(test)]
mod tests;
