//! Worst-case estimation of debiased self-training.
//!
//! With `p = softmax(z)` of the adversarial head and `a_i` the prediction of the main head (a constant
//! to the gradient; the first class wins among equal logits), the loss is the sum of
//!
//! ```text
//! agree    = w mean_i -ln p_ia            dL/dz_i = w/B (p - onehot_a)
//! disagree = w mean_i -ln min(u_i, 1)     dL/dz_i = -w/B (p_a / u_i) (p - onehot_a), or 0 where u_i > 1
//! u_i      = 1 - p_ia + 1e-6
//! ```
//!
//! over the labeled and the unlabeled rows. Where `p_a` is near 1, `1 - p_a` is computed as the sum of
//! the other probabilities: the difference would leave `u` without a correct digit in f32.

use super::Loss;
use super::element::{Element, stored_scale};
use super::isa::{Isa, Kernel};
use super::lanes;
use super::parallel::{cut, cut_optional, run, split};
use super::real::Real;
use super::reduce;
use super::rows::Rows;
use super::softmax::{self, Split};
mod narrow;

use std::num::NonZeroUsize;
use std::ops::Range;

/// The widest rows that are taken side by side.
const NARROW: usize = 128;

/// Keeps the logarithm finite; the offset of tllib's `shift_log`.
pub const OFFSET: f64 = 1e-6;

/// Which of the two losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Predict what the main head predicts.
    Agree,
    /// Predict anything else.
    Disagree,
}

/// Where the results go.
pub struct Outputs<'a, E> {
    /// The predictions of the main head, one a row.
    pub labels: &'a mut [i64],
    /// The gradient with respect to the adversarial logits, contiguous, times [`Loss::scale`].
    pub grad: Option<&'a mut [E]>,
}

/// One of the two losses, times `weight`: of the adversarial head's `logits` given the `main` head's
/// (same shape, at least one column).
pub fn dst<E: Element>(
    goal: Goal,
    logits: Rows<'_, E>,
    main: Rows<'_, E>,
    weight: f64,
    out: Outputs<'_, E>,
    threads: NonZeroUsize,
) -> Loss {
    // Over no rows the mean is 0/0, as in tllib.
    let weight = weight / logits.rows() as f64;
    // |p_a / u| (1 - p_a) < 1.
    let scale = stored_scale::<E>(weight.abs());
    let ranges = split(logits.rows(), threads);
    let narrow = lanes::narrow(&ranges, logits.cols(), NARROW);
    let grads = cut_optional(out.grad, &ranges, logits.cols());
    let jobs: Vec<_> = cut(out.labels, &ranges, 1)
        .into_iter()
        .zip(grads)
        .zip(ranges)
        .map(|((labels, grad), range)| {
            let out = Outputs { labels, grad };
            let sweep = Sweep {
                goal,
                logits,
                main,
                range,
                weight: weight * scale,
                out,
            };
            move || lanes::dispatch(sweep, narrow)
        })
        .collect();
    let total: f64 = run(jobs).into_iter().sum();
    Loss {
        value: total * weight,
        scale,
    }
}

struct Sweep<'a, E> {
    goal: Goal,
    logits: Rows<'a, E>,
    main: Rows<'a, E>,
    range: Range<usize>,
    weight: f64,
    out: Outputs<'a, E>,
}

impl<E: Element> Kernel for Sweep<'_, E> {
    type Output = f64;

    #[inline(always)]
    fn run<I: Isa>(self) -> f64 {
        let cols = self.logits.cols();
        let mut scratch = self.logits.scratch();
        let mut main_scratch = self.main.scratch();
        let mut spare = vec![E::Acc::ZERO; cols];
        let mut out = self.out;
        let mut total = 0.0;
        for (k, i) in self.range.enumerate() {
            let label = reduce::argmax(self.main.in_turn(i, &mut main_scratch));
            out.labels[k] = label as i64;
            let z = self.logits.in_turn(i, &mut scratch);
            let max = reduce::max(z);
            let split = match out.grad.as_deref_mut() {
                Some(grad) => {
                    let grad = &mut grad[k * cols..(k + 1) * cols];
                    let weight = |s: &Split| self.weight * self.goal.slope(s);
                    softmax::split_with_gradient::<I, E>(z, max, label, weight, &mut spare, grad)
                }
                None => softmax::split::<I, _>(z, max, label, &mut spare),
            };
            total += match self.goal {
                Goal::Agree => split.total().ln() + (max.to_f64() - z[label].to_f64()),
                Goal::Disagree => disagreement(&split),
            };
        }
        total
    }
}

impl Goal {
    /// `-p_a dL/dp_a`
    #[inline(always)]
    fn slope(self, split: &Split) -> f64 {
        match self {
            Goal::Agree => 1.0,
            Goal::Disagree if clamped(split) => 0.0,
            Goal::Disagree => -split.probability() / (split.remainder() + OFFSET),
        }
    }
}

/// `u > 1`; false for NaN, which stays in the result.
#[inline(always)]
fn clamped(split: &Split) -> bool {
    split.probability() < OFFSET
}

/// `-ln min(u, 1)`
#[inline(always)]
fn disagreement(split: &Split) -> f64 {
    let p = split.probability();
    if clamped(split) {
        0.0
    } else if p < 0.5 {
        -(OFFSET - p).ln_1p()
    } else {
        -(split.remainder() + OFFSET).ln()
    }
}

#[cfg(test)]
mod tests {
    use super::super::element::{Bf16, F16};
    use super::super::lanes::tests::widened;
    use super::*;

    fn call<E: Element>(
        goal: Goal,
        z: &[E],
        y: &[E],
        cols: usize,
        threads: usize,
    ) -> (Loss, Vec<i64>, Vec<E>) {
        let rows = z.len() / cols;
        let (mut labels, mut grad) = (vec![-9; rows], vec![E::store(E::Acc::ONE); z.len()]);
        let view = |data| Rows::contiguous(data, rows, cols).unwrap();
        let threads = NonZeroUsize::new(threads).unwrap();
        let out = Outputs {
            labels: &mut labels,
            grad: Some(&mut grad),
        };
        let loss = dst(goal, view(z), view(y), 2.0, out, threads);
        let mut again = vec![0; rows];
        let out = Outputs {
            labels: &mut again,
            grad: None,
        };
        let alone = dst(goal, view(z), view(y), 2.0, out, threads);
        assert!((alone.value - loss.value).abs() <= 1e-6 * loss.value.abs() || loss.value.is_nan());
        assert_eq!(labels, again);
        (loss, labels, grad)
    }

    fn reference(goal: Goal, z: &[f64], labels: &[i64], cols: usize) -> f64 {
        let rows = labels.len();
        let each = z.chunks(cols).zip(labels).map(|(z, &a)| {
            let total: f64 = z.iter().map(|z| z.exp()).sum();
            let p = z[a as usize].exp() / total;
            -if goal == Goal::Agree {
                p.ln()
            } else {
                (1.0 - p + OFFSET).min(1.0).ln()
            }
        });
        2.0 * each.sum::<f64>() / rows as f64
    }

    #[test]
    fn values_and_finite_differences() {
        for (rows, cols) in [(7, 5), (19, 3), (7, 35)] {
            finite_differences(rows, cols);
        }
    }

    fn finite_differences(rows: usize, cols: usize) {
        let z: Vec<f64> = (0..rows * cols)
            .map(|k| ((k * 37 + 5) % 23) as f64 / 5.0 - 2.0)
            .collect();
        let y: Vec<f64> = (0..rows * cols).map(|k| ((k * 11) % 13) as f64).collect();
        for goal in [Goal::Agree, Goal::Disagree] {
            for threads in [1, 3] {
                let (loss, labels, grad) = call(goal, &z, &y, cols, threads);
                assert!((loss.value - reference(goal, &z, &labels, cols)).abs() < 1e-13);
                for k in 0..z.len() {
                    let (mut up, mut down) = (z.clone(), z.clone());
                    up[k] += 1e-6;
                    down[k] -= 1e-6;
                    let f = |z: &[f64]| reference(goal, z, &labels, cols);
                    assert!((grad[k] - (f(&up) - f(&down)) / 2e-6).abs() < 1e-8);
                }
            }
        }
    }

    #[test]
    fn a_saturated_row_keeps_its_gradient() {
        let z = [20.0f32, 0.0];
        let others = 1.0 / (1.0 + 20f64.exp());
        let exact = 2.0 * (1.0 - others) * others / (others + OFFSET);
        for z in [z.to_vec(), widened(&z, 2, -1e3)] {
            let (loss, _, grad) = call(Goal::Disagree, &z, &z, z.len(), 1);
            assert!((loss.value / 2.0 + (others + OFFSET).ln()).abs() < 1e-6);
            assert!(
                (f64::from(grad[0]) / exact - 1.0).abs() < 1e-5,
                "{} {exact}",
                grad[0]
            );
            assert!((f64::from(grad[1]) / exact + 1.0).abs() < 1e-5);
        }
    }

    #[test]
    fn clamped_rows_ties_nan_and_no_rows() {
        for wide in [false, true] {
            let call = |z: &[f64], y: &[f64]| {
                let row = |x: &[f64]| {
                    if wide {
                        widened(x, 2, -1e3)
                    } else {
                        x.to_vec()
                    }
                };
                let (z, y) = (row(z), row(y));
                call(Goal::Disagree, &z, &y, z.len(), 1)
            };
            let (loss, labels, grad) = call(&[-20.0, 0.0], &[1.0, 1.0]);
            assert_eq!((loss.value, labels), (0.0, vec![0]));
            assert!(grad.iter().all(|&g| g == 0.0));
            let (loss, labels, grad) = call(&[0.0, f64::NAN], &[1.0, f64::NAN]);
            assert!(loss.value.is_nan() && grad.iter().all(|g| g.is_nan()));
            assert_eq!(labels, [1]);
        }
        let (loss, _, _) = call::<f32>(Goal::Agree, &[], &[], 3, 1);
        assert!(loss.value.is_nan());
    }

    #[test]
    fn half_types_agree_with_f64() {
        fn check<E: Element>(goal: Goal, cols: usize, tolerance: f64) {
            let stored: Vec<E> = (0..33 * cols)
                .map(|k| E::store(E::Acc::of(((k * 7) % 31) as f64 / 8.0)))
                .collect();
            let exact: Vec<f64> = stored.iter().map(|z| z.load().to_f64()).collect();
            let (expected, _, gradient) = call(goal, &exact, &exact, cols, 1);
            let (loss, _, grad) = call(goal, &stored, &stored, cols, 1);
            assert!((loss.value - expected.value).abs() < 1e-6 * expected.value.abs());
            let largest = gradient.iter().fold(0.0f64, |a, g| a.max(g.abs()));
            for (g, e) in grad.iter().zip(gradient) {
                assert!((g.load().to_f64() / loss.scale - e).abs() <= tolerance * largest);
            }
        }
        for (goal, cols) in [Goal::Agree, Goal::Disagree]
            .into_iter()
            .flat_map(|goal| [(goal, 7), (goal, 40)])
        {
            check::<f32>(goal, cols, 1e-6);
            check::<F16>(goal, cols, 1e-3);
            check::<Bf16>(goal, cols, 8e-3);
        }
    }
}
