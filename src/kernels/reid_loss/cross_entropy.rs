//! Cross entropy with soft targets: of another network, or smoothed labels.
//!
//! With `p = softmax(z)` and targets `t` (a constant to the gradient),
//!
//! ```text
//! loss     = 1/B sum_i sum_c -t_ic ln p_ic
//! dL/dz_ic = 1/B (S p_ic - t_ic)             S = sum_c t_ic
//! ```
//!
//! Soft targets are `t = softmax(y)`, `S = 1`. Smoothed labels are `t_ic = (1 - e) [c = label_i] + e/n`;
//! `n` need not be the number of columns, as in tllib, and then `S` is not 1.

use super::super::Loss;
use super::super::element::{Element, stored_scale};
use super::super::isa::{Isa, Kernel};
use super::super::lanes;
use super::super::parallel::{cut_optional, run, split};
use super::super::real::Real;
use super::super::reduce;
use super::super::rows::Rows;
mod narrow;

use std::num::NonZeroUsize;
use std::ops::Range;

/// The widest rows that are taken side by side, against a softmax and against labels, where there is half as much
/// to do.
const NARROW: usize = 100;
const NARROW_SMOOTH: usize = 64;

/// Where the targets come from.
#[derive(Clone, Copy)]
pub enum Targets<'a, E> {
    /// The softmax of these logits, of the shape of the predictions.
    Logits(Rows<'a, E>),
    /// Smoothed labels.
    Smooth {
        /// One label for each row, below the number of columns.
        labels: &'a [i64],
        /// `1 - e`
        hit: f64,
        /// `e / n`
        rest: f64,
    },
}

/// The loss of `logits` (at least one column); with `grad` (contiguous, same shape) also its gradient.
pub fn cross_entropy<E: Element>(
    logits: Rows<'_, E>,
    targets: Targets<'_, E>,
    grad: Option<&mut [E]>,
    threads: NonZeroUsize,
) -> Loss {
    let (rows, cols) = (logits.rows(), logits.cols());
    let weight = 1.0 / rows as f64;
    let (bound, widest) = match targets {
        Targets::Logits(_) => (1.0, NARROW),
        Targets::Smooth { hit, rest, .. } => {
            let bound = hit.abs() + rest.abs() * cols as f64;
            (bound, NARROW_SMOOTH)
        }
    };
    let scale = stored_scale::<E>(weight * bound);
    let ranges = split(rows, threads);
    let narrow = lanes::narrow(&ranges, cols, widest);
    let grads = cut_optional(grad, &ranges, cols);
    let jobs: Vec<_> = ranges
        .into_iter()
        .zip(grads)
        .map(|(range, grad)| {
            let sweep = Sweep {
                logits,
                targets,
                range,
                weight: weight * scale,
                grad,
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

struct Sweep<'a, 'b, E> {
    logits: Rows<'a, E>,
    targets: Targets<'a, E>,
    range: Range<usize>,
    weight: f64,
    grad: Option<&'b mut [E]>,
}

/// `e^{z_c - max}` in `exp`, their sum and the maximum.
struct Softmax<F> {
    exp: Vec<F>,
    max: F,
    total: f64,
}

impl<F: Real> Softmax<F> {
    #[inline(always)]
    fn of<I: Isa>(&mut self, z: &[F]) {
        self.max = reduce::max(z);
        self.total = reduce::exp_shifted::<I, _>(z, self.max, F::ONE, &mut self.exp);
    }
}

impl<E: Element> Kernel for Sweep<'_, '_, E> {
    type Output = f64;

    #[inline(always)]
    fn run<I: Isa>(self) -> f64 {
        let cols = self.logits.cols();
        let softmax = || Softmax {
            exp: vec![E::Acc::ZERO; cols],
            max: E::Acc::ZERO,
            total: 0.0,
        };
        let mut scratch = self.logits.scratch();
        let mut p = softmax();
        let mut grads = self.grad.map(|grad| grad.chunks_exact_mut(cols));
        let mut grad = move || grads.as_mut().and_then(Iterator::next);
        let mut total = 0.0;
        match self.targets {
            Targets::Logits(targets) => {
                let mut target_scratch = targets.scratch();
                let mut q = softmax();
                for i in self.range {
                    let z = self.logits.in_turn(i, &mut scratch);
                    p.of::<I>(z);
                    q.of::<I>(targets.in_turn(i, &mut target_scratch));
                    total += soft_row(z, &p, &q, self.weight, grad());
                }
            }
            Targets::Smooth { labels, hit, rest } => {
                for i in self.range {
                    let z = self.logits.in_turn(i, &mut scratch);
                    p.of::<I>(z);
                    total +=
                        smooth_row(z, &p, (labels[i] as usize, hit, rest), self.weight, grad());
                }
            }
        }
        total
    }
}

/// `ln sum_c e^{z_c - max} - sum_c q_c (z_c - max)`: both terms are positive.
#[inline(always)]
fn soft_row<E: Element>(
    z: &[E::Acc],
    p: &Softmax<E::Acc>,
    q: &Softmax<E::Acc>,
    weight: f64,
    grad: Option<&mut [E]>,
) -> f64 {
    if let Some(grad) = grad {
        let (own, other) = (E::Acc::of(weight / p.total), E::Acc::of(weight / q.total));
        for ((g, &p), &q) in grad.iter_mut().zip(&p.exp).zip(&q.exp) {
            *g = E::store(p * own - q * other);
        }
    }
    p.total.ln() - reduce::sum_of_pairs(&q.exp, z, |q, z| q * (z - p.max)) / q.total
}

#[inline(always)]
fn smooth_row<E: Element>(
    z: &[E::Acc],
    p: &Softmax<E::Acc>,
    (label, hit, rest): (usize, f64, f64),
    weight: f64,
    grad: Option<&mut [E]>,
) -> f64 {
    let cols = z.len() as f64;
    let mass = hit + rest * cols;
    if let Some(grad) = grad {
        let (own, constant) = (
            E::Acc::of(weight * mass / p.total),
            E::Acc::of(weight * rest),
        );
        for (g, &p) in grad.iter_mut().zip(&p.exp) {
            *g = E::store(p * own - constant);
        }
        let p_label = p.exp[label].to_f64() / p.total;
        let at_label = if p_label < 0.5 {
            mass * p_label - hit - rest
        } else {
            // S (p - 1) + (S - t): 1 - p is the sum of the others, which keeps its digits here.
            let others = reduce::sum(&p.exp[..label]) + reduce::sum(&p.exp[label + 1..]);
            (cols - 1.0) * rest - mass * (others / p.total)
        };
        grad[label] = E::store(E::Acc::of(weight * at_label));
    }
    let shifted = |z: &[E::Acc]| reduce::sum_of_pairs(z, z, |z, _| z - p.max);
    let own = z[label] - p.max;
    // Where a target is 0, 0 times an infinite logarithm is NaN, as in tllib.
    let logs = if own.finite() {
        hit * own.to_f64() + rest * shifted(z)
    } else {
        let others = shifted(&z[..label]) + shifted(&z[label + 1..]);
        (hit + rest) * own.to_f64() + rest * others
    };
    mass * p.total.ln() - logs
}

#[cfg(test)]
mod tests {
    use super::super::super::element::Bf16;
    use super::*;

    /// The definition, in f64, for any targets.
    fn plain(z: &[f64], t: &[f64], cols: usize) -> (f64, Vec<f64>) {
        let rows = z.len() / cols;
        let (mut loss, mut grad) = (0.0, Vec::new());
        for (z, t) in z.chunks(cols).zip(t.chunks(cols)) {
            let total: f64 = z.iter().map(|z| z.exp()).sum();
            loss -= z
                .iter()
                .zip(t)
                .map(|(z, t)| t * (z - total.ln()))
                .sum::<f64>();
            let mass: f64 = t.iter().sum();
            grad.extend(
                z.iter()
                    .zip(t)
                    .map(|(z, t)| (mass * z.exp() / total - t) / rows as f64),
            );
        }
        (loss / rows as f64, grad)
    }

    fn logits(n: usize, seed: usize) -> Vec<f64> {
        (0..n)
            .map(|k| ((k * 7919 + seed) % 101) as f64 / 25.0 - 2.0)
            .collect()
    }

    fn check<E: Element>((rows, cols): (usize, usize), tolerance: f64) {
        let z: Vec<E> = logits(rows * cols, 1)
            .iter()
            .map(|&z| E::store(E::Acc::of(z)))
            .collect();
        let y: Vec<E> = logits(rows * cols, 57)
            .iter()
            .map(|&z| E::store(E::Acc::of(z)))
            .collect();
        let wide = |x: &[E]| x.iter().map(|x| x.load().to_f64()).collect::<Vec<f64>>();
        let labels: Vec<i64> = (0..rows).map(|i| (i % cols) as i64).collect();
        let (hit, rest) = (0.8, 0.2 / 23.0);
        let (z64, mut soft, mut smooth) = (wide(&z), wide(&y), vec![rest; rows * cols]);
        for row in soft.chunks_mut(cols) {
            let total: f64 = row.iter().map(|y| y.exp()).sum();
            for y in row.iter_mut() {
                *y = y.exp() / total;
            }
        }
        (0..rows).for_each(|i| smooth[i * cols + i % cols] += hit);
        let view = |x| Rows::contiguous(x, rows, cols).unwrap();
        let cases = [
            (Targets::Logits(view(&y)), soft),
            (
                Targets::Smooth {
                    labels: &labels,
                    hit,
                    rest,
                },
                smooth,
            ),
        ];
        for (targets, t) in cases {
            let (expected, expected_grad) = plain(&z64, &t, cols);
            for threads in [1, 3] {
                let threads = NonZeroUsize::new(threads).unwrap();
                let mut grad = z.clone();
                let loss = cross_entropy(view(&z), targets, Some(&mut grad), threads);
                assert!(
                    (loss.value - expected).abs() < 1e-6,
                    "{} {expected}",
                    loss.value
                );
                for (g, e) in grad.iter().zip(&expected_grad) {
                    assert!(
                        (g.load().to_f64() / loss.scale - e).abs() < tolerance,
                        "{e}"
                    );
                }
                assert_eq!(
                    cross_entropy(view(&z), targets, None, threads).value,
                    loss.value
                );
            }
        }
    }

    #[test]
    fn matches_the_definition() {
        for shape in [(11, 19), (21, 3), (11, 45)] {
            check::<f64>(shape, 1e-15);
            check::<f32>(shape, 1e-7);
            check::<Bf16>(shape, 1e-3);
        }
    }

    #[test]
    fn a_target_near_the_prediction_keeps_its_digits() {
        // Smoothed all the way, the targets are uniform, and so nearly is the prediction.
        let cols = 1000;
        let z: Vec<f32> = (0..cols)
            .map(|k| ((k * 7919) % 101) as f32 / 5000.0)
            .collect();
        let wide: Vec<f64> = z.iter().map(|&z| f64::from(z)).collect();
        let (_, expected) = plain(&wide, &vec![1e-3; cols], cols);
        let targets = Targets::Smooth {
            labels: &[17],
            hit: 0.0,
            rest: 1e-3,
        };
        let mut grad = vec![0.0f32; cols];
        let rows = Rows::contiguous(&z, 1, cols).unwrap();
        cross_entropy(rows, targets, Some(&mut grad), NonZeroUsize::MIN);
        for (&g, e) in grad.iter().zip(&expected) {
            // Some units in the last place of the probability, 1e-3.
            assert!((f64::from(g) - e).abs() < 5e-10, "{g} {e}");
        }
    }

    #[test]
    fn a_label_without_a_chance_leaves_the_other_rows_alone() {
        // Three classes, and label 1 in each of 19 rows.
        let mut z = logits(19 * 3, 5);
        let exact = |z: &[f64], rest: f64| {
            let mut t = vec![rest; z.len()];
            t.iter_mut().skip(1).step_by(3).for_each(|t| *t = 0.25);
            plain(z, &t, 3).0
        };
        let value = |z: &[f64], rest: f64| {
            let targets = Targets::Smooth {
                labels: &[1; 19],
                hit: 0.25 - rest,
                rest,
            };
            let rows = Rows::contiguous(z, 19, 3).unwrap();
            cross_entropy(rows, targets, None, NonZeroUsize::MIN).value
        };
        assert!((value(&z, 0.1) - exact(&z, 0.1)).abs() < 1e-14);
        z[3 * 5 + 1] = f64::NEG_INFINITY;
        // `0.25 - rest` times minus infinity would be plus infinity, and the sum NaN.
        assert!(value(&z, 0.5) == f64::INFINITY && value(&z, 0.1) == f64::INFINITY);
        z[3 * 5 + 1] = f64::NAN;
        assert!(value(&z, 0.1).is_nan());
    }

    #[test]
    fn nothing_and_infinity() {
        let labels = Targets::Smooth {
            labels: &[0],
            hit: 1.0,
            rest: 0.0,
        };
        let z = [0.0f32, f32::NEG_INFINITY];
        let one = NonZeroUsize::MIN;
        assert!(
            cross_entropy(Rows::contiguous(&z, 1, 2).unwrap(), labels, None, one)
                .value
                .is_nan()
        );
        let labels = Targets::Smooth {
            labels: &[0],
            hit: 0.9,
            rest: 0.05,
        };
        let got = cross_entropy(Rows::contiguous(&z, 1, 2).unwrap(), labels, None, one).value;
        assert!(got.is_infinite() && got > 0.0);
        let empty = Rows::<f32>::contiguous(&[], 0, 2).unwrap();
        assert!(
            cross_entropy(empty, Targets::Logits(empty), None, one)
                .value
                .is_nan()
        );
    }
}
