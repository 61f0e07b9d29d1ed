//! Cross entropy with confident pseudo labels.
//!
//! With `q = softmax(t)` of the target logits (a constant to the gradient) and `p = softmax(z)`:
//!
//! ```text
//! label_i = argmax_c q_ic          the first index wins among equal, rounded probabilities
//! mask_i  = max_c q_ic > threshold
//! loss    = 1/B sum_i mask_i (ln sum_c e^{z_ic} - z_i,label_i)
//! dL/dz_ic = mask_i / B (p_ic - [c = label_i])
//! ```
//!
//! The mask multiplies, as in tllib: a row that is not selected still makes the loss NaN when its
//! cross entropy is not finite.

use super::Loss;
use super::element::{Element, round_to, stored_scale};
use super::isa::{Isa, Kernel};
use super::lanes;
use super::parallel::{cut, cut_optional, run, split};
use super::real::Real;
use super::reduce;
use super::rows::Rows;
use super::softmax::{Split, confidence, split_with_gradient};
mod narrow;

use std::num::NonZeroUsize;
use std::ops::Range;

/// The widest rows that are taken side by side.
const NARROW: usize = 63;

/// Where the results go. `mask` and `labels` have one place a row.
pub struct Outputs<'a, E> {
    /// 1 where the row is selected, else 0.
    pub mask: &'a mut [f32],
    /// The pseudo labels.
    pub labels: &'a mut [i64],
    /// The gradient with respect to the logits, contiguous, times [`Loss::scale`].
    pub grad: Option<&'a mut [E]>,
}

/// The loss of `logits` with pseudo labels from `targets` (same shape, at least one column).
pub fn pseudo_label<E: Element>(
    logits: Rows<'_, E>,
    targets: Rows<'_, E>,
    threshold: f64,
    out: Outputs<'_, E>,
    threads: NonZeroUsize,
) -> Loss {
    let (rows, cols) = (logits.rows(), logits.cols());
    let weight = 1.0 / rows as f64;
    let scale = stored_scale::<E>(weight);
    let ranges = split(rows, threads);
    let narrow = lanes::narrow(&ranges, cols, NARROW);
    let masks = cut(out.mask, &ranges, 1);
    let labels = cut(out.labels, &ranges, 1);
    let grads = cut_optional(out.grad, &ranges, cols);
    let jobs: Vec<_> = ranges
        .into_iter()
        .zip(masks.into_iter().zip(labels).zip(grads))
        .map(|(range, ((mask, labels), grad))| {
            let out = Outputs { mask, labels, grad };
            let sweep = Sweep {
                logits,
                targets,
                threshold,
                range,
                weight: weight * scale,
                out,
            };
            move || lanes::dispatch(sweep, narrow)
        })
        .collect();
    let total: f64 = run(jobs).into_iter().sum();
    // Over no rows the mean is 0/0, as in tllib.
    Loss {
        value: total * weight + if rows == 0 { f64::NAN } else { 0.0 },
        scale,
    }
}

struct Sweep<'a, E> {
    logits: Rows<'a, E>,
    targets: Rows<'a, E>,
    threshold: f64,
    range: Range<usize>,
    weight: f64,
    out: Outputs<'a, E>,
}

impl<E: Element> Kernel for Sweep<'_, E> {
    type Output = f64;

    #[inline(always)]
    fn run<I: Isa>(self) -> f64 {
        let cols = self.logits.cols();
        let same = self.logits.same(&self.targets);
        let threshold = round_to::<E>(E::Acc::of(self.threshold));
        let mut scratch = self.logits.scratch();
        let mut target_scratch = self.targets.scratch();
        let mut spare = vec![E::Acc::ZERO; cols];
        let mut out = self.out;
        let mut total = 0.0;
        for (k, i) in self.range.enumerate() {
            let t = self.targets.in_turn(i, &mut target_scratch);
            let target = Target::of::<I>(t);
            let label = target.label::<I, E>(t);
            let selected = target.confidence::<E>() > threshold;
            out.labels[k] = label as i64;
            out.mask[k] = if selected { 1.0 } else { 0.0 };

            let z = self.logits.in_turn(i, &mut scratch);
            let grad = out
                .grad
                .as_deref_mut()
                .map(|grad| &mut grad[k * cols..(k + 1) * cols]);
            if selected {
                let mut norm = if same {
                    target
                } else {
                    Target {
                        max: reduce::max(z),
                        total: 0.0,
                    }
                };
                if let Some(grad) = grad {
                    let weight = |_: &Split| self.weight;
                    let row =
                        split_with_gradient::<I, E>(z, norm.max, label, weight, &mut spare, grad);
                    norm.total = row.total();
                } else if !same {
                    norm.total = reduce::sum_exp_shifted::<I, _>(z, norm.max);
                }
                total += norm.total.ln() + (norm.max.to_f64() - z[label].to_f64());
            } else {
                let max = if same { target.max } else { reduce::max(z) };
                // 0 times the cross entropy: 0, or NaN where that is not finite.
                let row = if max.finite() {
                    E::Acc::ZERO
                } else {
                    E::Acc::NAN
                };
                total += row.to_f64() + 0.0 * z[label].to_f64();
                if let Some(grad) = grad {
                    grad.fill(E::store(row));
                }
            }
        }
        total
    }
}

/// The normalization of a softmax row.
#[derive(Clone, Copy)]
struct Target<F> {
    max: F,
    /// `sum_c e^{t_c - max}`
    total: f64,
}

impl<F: Real> Target<F> {
    #[inline(always)]
    fn of<I: Isa>(row: &[F]) -> Self {
        let max = reduce::max(row);
        Self {
            max,
            total: reduce::sum_exp_shifted::<I, _>(row, max),
        }
    }

    /// The largest probability, as the storage type holds it.
    #[inline(always)]
    fn confidence<E: Element<Acc = F>>(self) -> F {
        confidence::<E>(self.total)
    }

    /// The first class whose rounded probability is the largest one; the first NaN, if any.
    #[inline(always)]
    fn label<I: Isa, E: Element<Acc = F>>(self, row: &[F]) -> usize {
        if self.max.nan() || self.total.is_nan() {
            // All probabilities are NaN: the first of them.
            return 0;
        }
        // Only logits this close to the maximum can round to its probability, 1 / total. The second bound
        // applies where that is subnormal in float16, with tens of thousands of classes.
        let near = self.max - F::of(2.0 * E::EPSILON.max(E::SMALLEST * self.total));
        let (total, confidence) = (F::of(self.total), self.confidence::<E>());
        let ties =
            |z: F| z == self.max || round_to::<E>((z - self.max).exp::<I>() / total) == confidence;
        let start = reduce::first(row, |z| z >= near);
        let tied = row[start..].iter().position(|&z| z >= near && ties(z));
        tied.map_or(0, |k| start + k)
    }
}

#[cfg(test)]
mod tests {
    use super::super::element::{Bf16, F16};
    use super::super::lanes::tests::widened;
    use super::*;

    struct Result_<E> {
        loss: Loss,
        mask: Vec<f32>,
        labels: Vec<i64>,
        grad: Vec<E>,
    }

    fn call<E: Element>(
        z: &[E],
        t: &[E],
        shape: (usize, usize),
        threshold: f64,
        threads: usize,
    ) -> Result_<E> {
        let (mut mask, mut labels) = (vec![9.0; shape.0], vec![-9; shape.0]);
        let mut grad = vec![E::store(E::Acc::ONE); z.len()];
        let out = Outputs {
            mask: &mut mask,
            labels: &mut labels,
            grad: Some(&mut grad),
        };
        let loss = pseudo_label(
            Rows::contiguous(z, shape.0, shape.1).unwrap(),
            Rows::contiguous(t, shape.0, shape.1).unwrap(),
            threshold,
            out,
            NonZeroUsize::new(threads).unwrap(),
        );
        Result_ {
            loss,
            mask,
            labels,
            grad,
        }
    }

    /// [`call`] with the rows themselves, or padded with classes of probability 0.
    fn either<E: Element>(
        z: &[E],
        t: &[E],
        (rows, cols): (usize, usize),
        threshold: f64,
        threads: usize,
        wide: bool,
    ) -> Result_<E> {
        if !wide {
            return call(z, t, (rows, cols), threshold, threads);
        }
        let (z, t) = (widened(z, cols, -1e3), widened(t, cols, -1e3));
        let width = z.len() / rows;
        let mut got = call(&z, &t, (rows, width), threshold, threads);
        let grads = got.grad.chunks(width);
        got.grad = grads.flat_map(|grad| grad[..cols].to_vec()).collect();
        got
    }

    #[test]
    fn a_worked_example() {
        for wide in [false, true] {
            worked_example(wide);
        }
    }

    fn worked_example(wide: bool) {
        let z = [1.0f64, 2.0, 3.0, 0.0, 0.0, 1.0];
        let t = [5.0f64, 0.0, 0.0, 1.0, 1.0, 0.5];
        for threads in [1, 2] {
            let got = either(&z, &t, (2, 3), 0.9, threads, wide);
            assert_eq!((got.mask, got.labels), (vec![1.0, 0.0], vec![0, 0]));
            let total = 1f64.exp() + 2f64.exp() + 3f64.exp();
            assert!((got.loss.value - (total.ln() - 1.0) / 2.0).abs() < 1e-15);
            let expected = [
                (1f64.exp() / total - 1.0) / 2.0,
                2f64.exp() / total / 2.0,
                3f64.exp() / total / 2.0,
                0.0,
                0.0,
                0.0,
            ];
            assert!(
                got.grad
                    .iter()
                    .zip(expected)
                    .all(|(a, b)| (a - b).abs() < 1e-15)
            );
        }
    }

    #[test]
    fn ties_of_the_rounded_softmax_go_to_the_first_index() {
        for wide in [false, true] {
            ties(wide);
        }
    }

    fn ties(to_wide: bool) {
        let (near, next) = (0.125f32, f32::from_bits(0.125f32.to_bits() + 1));
        // One ulp apart: equal probabilities in f32, different ones in f64.
        let t = [near, next, 0.0, 0.0];
        assert_eq!(either(&t, &t, (1, 4), 0.0, 1, to_wide).labels, [0]);
        let wide: Vec<f64> = t.iter().map(|&x| f64::from(x)).collect();
        assert_eq!(either(&wide, &wide, (1, 4), 0.0, 1, to_wide).labels, [1]);
        let half: Vec<Bf16> = [2.0, 2.015_625, 0.0]
            .iter()
            .map(|&x| Bf16::store(x))
            .collect();
        let p = |z: f32| f64::from(z).exp();
        let total = p(2.0) + p(2.015_625) + 1.0;
        let equal =
            Bf16::store((p(2.0) / total) as f32) == Bf16::store((p(2.015_625) / total) as f32);
        assert_eq!(
            either(&half, &half, (1, 3), 0.0, 1, to_wide).labels[0],
            i64::from(!equal)
        );
    }

    #[test]
    fn ties_below_the_normal_numbers_of_float16() {
        // Of 100,000 probabilities near 1e-5, those within 6e-3 of each other round to the same number.
        let mut t = vec![F16::store(0.0); 100_000];
        t[500] = F16::store(0.0005);
        t[70_000] = F16::store(0.001);
        let got = call(&t, &t, (1, t.len()), 0.0, 1);
        assert_eq!(got.labels, [0]);
        t[300] = F16::store(0.02);
        assert_eq!(call(&t, &t, (1, t.len()), 0.0, 1).labels, [300]);
    }

    #[test]
    fn not_finite_values() {
        for wide in [false, true] {
            not_finite(wide);
        }
        assert!(call::<f32>(&[], &[], (0, 3), 0.5, 1).loss.value.is_nan());
    }

    fn not_finite(wide: bool) {
        let nan = f32::NAN;
        let got = either(
            &[0.0, 1.0, 1.0, 0.0],
            &[nan, 0.0, 9.0, 0.0],
            (2, 2),
            0.5,
            1,
            wide,
        );
        assert_eq!(got.mask, [0.0, 1.0]);
        assert!(got.loss.value.is_finite());
        let got = either(
            &[nan, 1.0, 1.0, 0.0],
            &[0.0, 0.0, 9.0, 0.0],
            (2, 2),
            0.9,
            1,
            wide,
        );
        assert!(got.loss.value.is_nan() && got.grad[0].is_nan() && got.grad[2].is_finite());
        let got = either(&[f32::NEG_INFINITY, 1.0], &[0.0, 0.0], (1, 2), 0.9, 1, wide);
        assert!(got.loss.value.is_nan() && got.grad == [0.0, 0.0]);
    }

    #[test]
    fn float16_gradients_of_a_large_batch_do_not_vanish() {
        let rows = 65_536;
        let z: Vec<F16> = (0..rows * 2).map(|k| F16::store((k % 2) as f32)).collect();
        let got = call(&z, &z, (rows, 2), 0.5, 2);
        let expected = 1.0 / (1.0 + 1f64.exp()) / rows as f64;
        let first = f64::from(got.grad[0].load()) / got.loss.scale;
        assert!((first / expected - 1.0).abs() < 1e-3, "{first} {expected}");
    }
}
