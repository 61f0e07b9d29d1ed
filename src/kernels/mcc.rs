//! Minimum class confusion, in `O(B C)` and without the `C x C` matrix.
//!
//! With `p = softmax(z / T)` (`B` rows, `C` classes), row entropy
//! `H_i = -sum_c p_ic ln(p_ic + 1e-5)` and weight `w_i ~ 1 + e^{-H_i}` (a constant to the gradient),
//! the confusion matrix is `P^T diag(w) P` with its columns scaled to sum 1. Its trace is then all
//! that is left to know:
//!
//! ```text
//! loss    = 1 - 1/C sum_c d_c / s_c        s_c = sum_i w_i p_ic    d_c = sum_i w_i p_ic^2
//! dL/dp_ic = -(w_i / C) (2 p_ic s_c - d_c) / s_c^2
//! dL/dz_ic = p_ic (dL/dp_ic - sum_k p_ik dL/dp_ik) / T
//! ```
//!
//! Both are unchanged when all weights are scaled together, so the weights stay unnormalised and
//! one sweep finds them and the sums. A class whose probability is 0 in every row (tllib: 0/0 = NaN)
//! has the limits 0 in the trace and 0 in the gradient.

use super::Loss;
use super::element::{Element, stored_scale};
use super::isa::{Isa, Kernel, dispatch};
use super::parallel::{cut_optional, run, split};
use super::real::Real;
use super::reduce;
use super::rows::{Rows, store_row};
use std::num::NonZeroUsize;
use std::ops::Range;

/// Inside the logarithm of the entropy, as in tllib.
pub const ENTROPY_EPSILON: f64 = 1e-5;
/// Rows whose contributions are added in the computing type before they go to the f64 sums.
const FLUSH: usize = 16;

/// What the first sweep keeps of a row, for types whose probabilities the gradient cannot hold.
#[derive(Clone, Copy)]
struct Row<F> {
    weight: F,
    max: F,
    reciprocal: F,
}

/// Per class: `s_c` and `d_c`. Those of several batches add up to those of all their rows.
pub struct Sums {
    /// `s_c`
    pub s: Vec<f64>,
    /// `d_c`
    pub d: Vec<f64>,
}

/// What the first sweep over a batch leaves for the second.
pub struct Swept<E: Element> {
    /// Of this batch; those of a larger one in their place make it a part of that.
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

/// The first sweep. `grad` must reach [`finish`] as it is left here.
pub fn sweep<E: Element>(
    logits: Rows<'_, E>,
    temperature: f64,
    grad: Option<&mut [E]>,
    threads: NonZeroUsize,
) -> Swept<E> {
    let cols = logits.cols();
    let ranges = split(logits.rows(), threads);
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
            move || dispatch(sweep)
        })
        .collect();
    let mut kept = Vec::with_capacity(ranges.len());
    let mut sums = Sums {
        s: vec![0.0; cols],
        d: vec![0.0; cols],
    };
    for (rows, part) in run(sweeps) {
        kept.push(rows);
        for c in 0..cols {
            sums.s[c] += part.s[c];
            sums.d[c] += part.d[c];
        }
    }
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
    // |dL/dz| <= 4 / T, from s_c >= w_i p_ic.
    let scale = stored_scale::<E>(4.0 / temperature);
    let tiny = E::Acc::TINY.to_f64();
    // NaN is not below TINY: it stays in the loss.
    let present = |c: usize| !(sums.s[c] < tiny);
    let trace: f64 = (0..cols)
        .filter(|&c| present(c))
        .map(|c| sums.d[c] / sums.s[c])
        .sum();
    // Of a row, some class is present.
    let value = if (0..cols).any(present) {
        1.0 - trace / cols as f64
    } else {
        f64::NAN
    };

    if grad.is_some() {
        let ratio: Vec<E::Acc> = (0..cols)
            .map(|c| {
                E::Acc::of(if present(c) {
                    sums.d[c] / sums.s[c]
                } else {
                    0.0
                })
            })
            .collect();
        let inverse: Vec<E::Acc> = (0..cols)
            .map(|c| E::Acc::of(if present(c) { 1.0 / sums.s[c] } else { 0.0 }))
            .collect();
        let (ratio, inverse) = (&ratio, &inverse);
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
                Some(move || dispatch(job))
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
        let inverse_t = E::Acc::of(1.0 / self.temperature);
        let mut scratch = self.logits.scratch();
        let mut spare = vec![E::Acc::ZERO; cols];
        let mut out = self.out.and_then(E::exact_mut);
        let mut kept = Vec::with_capacity(self.range.len());
        let mut sums = Sums {
            s: vec![0.0; cols],
            d: vec![0.0; cols],
        };
        let mut partial_s = vec![E::Acc::ZERO; cols];
        let mut partial_d = vec![E::Acc::ZERO; cols];
        for (k, i) in self.range.enumerate() {
            let z = self.logits.in_turn(i, &mut scratch);
            let p = match &mut out {
                Some(out) => &mut out[k * cols..(k + 1) * cols],
                None => &mut spare[..],
            };
            let max = reduce::max(z);
            let total = reduce::exp_shifted::<I, _>(z, max, inverse_t, p);
            let reciprocal = E::Acc::of(1.0 / total);
            let negative_entropy = reduce::sum_of_each(p, |p| {
                *p *= reciprocal;
                p_ln_p::<I, _>(*p)
            });
            let p = &*p;
            let weight = E::Acc::of(1.0 + negative_entropy.exp());
            for ((&p, s), d) in p.iter().zip(&mut partial_s).zip(&mut partial_d) {
                let wp = weight * p;
                *s += wp;
                *d = wp.mul_add::<I>(p, *d);
            }
            if k % FLUSH == FLUSH - 1 {
                flush(&mut partial_s, &mut sums.s);
                flush(&mut partial_d, &mut sums.d);
            }
            kept.push(Row {
                weight,
                max,
                reciprocal,
            });
        }
        flush(&mut partial_s, &mut sums.s);
        flush(&mut partial_d, &mut sums.d);
        (kept, sums)
    }
}

/// `-sum_c p_c ln(p_c + 1e-5)` of probabilities.
#[inline(always)]
pub(super) fn entropy<I: Isa, F: Real>(p: &[F]) -> f64 {
    -reduce::sum_of(p, |p| p_ln_p::<I, _>(p))
}

/// `p ln(p + 1e-5)`. The sum in the logarithm is a normal number; where it is NaN, so is the factor in
/// front.
#[inline(always)]
fn p_ln_p<I: Isa, F: Real>(p: F) -> F {
    p * (p + F::of(ENTROPY_EPSILON)).ln_normal::<I>(F::ZERO)
}

#[inline(always)]
fn flush<F: Real>(partial: &mut [F], sums: &mut [f64]) {
    for (sum, part) in sums.iter_mut().zip(partial) {
        *sum += part.to_f64();
        *part = F::ZERO;
    }
}

/// Second sweep: the gradient, from the probabilities that the first one left in `out`, or from
/// the logits again where a half type could not hold them.
struct Gradient<'a, E: Element> {
    logits: Rows<'a, E>,
    temperature: f64,
    range: Range<usize>,
    kept: Vec<Row<E::Acc>>,
    /// `d_c / s_c`
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
        let mut h = vec![E::Acc::ZERO; cols];
        if let Some(out) = E::exact_mut(self.out) {
            for (row, kept) in out.chunks_exact_mut(cols).zip(&self.kept) {
                let factor = E::Acc::of(factor) * kept.weight;
                gradient_row::<I, _>(row, self.ratio, self.inverse, factor, &mut h);
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
                *p = ((z - kept.max) * inverse_t).exp::<I>() * kept.reciprocal;
            }
            let factor = E::Acc::of(factor) * kept.weight;
            gradient_row::<I, _>(&mut p, self.ratio, self.inverse, factor, &mut h);
            store_row(&p, E::Acc::of(self.scale), out);
        }
    }
}

/// Turns the probabilities of a row into its gradient, in place: with
/// `h_c = (p_c / s_c) (2 p_c - d_c / s_c)`, `dL/dz_c = factor (h_c - p_c sum_k h_k)`.
#[inline(always)]
fn gradient_row<I: Isa, F: Real>(
    row: &mut [F],
    ratio: &[F],
    inverse: &[F],
    factor: F,
    h: &mut [F],
) {
    for (((h, &p), &r), &inverse) in h.iter_mut().zip(&*row).zip(ratio).zip(inverse) {
        *h = p * inverse * (p + p - r);
    }
    let total = F::of(-reduce::sum(h));
    for (p, &h) in row.iter_mut().zip(&*h) {
        *p = factor * p.mul_add::<I>(total, h);
    }
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn matches_the_matrix_formula_and_finite_differences() {
        for (rows, cols, t) in [(1, 5, 1.0), (8, 2, 0.5), (7, 13, 2.5), (35, 3, 1.0)] {
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
        let (rows, cols, t) = (11, 5, 1.5);
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
                .zip(swept.sums.s.iter().chain(&swept.sums.d))
            {
                *total += sum;
            }
            parts.push((view, range, swept));
        }
        for (view, range, mut swept) in parts {
            swept.sums.s.copy_from_slice(&total[..cols]);
            swept.sums.d.copy_from_slice(&total[cols..]);
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
        fn check<E: Element>(tolerance: f64) {
            let (rows, cols, t) = (33, 17, 2.0);
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
        check::<f32>(1e-5);
        check::<F16>(1e-3);
        check::<Bf16>(8e-3);
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
}
