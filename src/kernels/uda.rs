//! Consistency of strong with weak predictions, of unsupervised data augmentation.
//!
//! With `q = softmax(y)` of the weak logits (a constant to the gradient) and `p = softmax(z / T)` of
//! the strong ones, over the `n` rows where `max_c q_ic > threshold`:
//!
//! ```text
//! loss     = 1/max(n, 1) sum_i m_i sum_c q_ic (ln q_ic - ln p_ic)      0 ln 0 = 0
//! dL/dz_ic = m_i / (max(n, 1) T) (p_ic - q_ic)
//! ```
//!
//! `n` is known after the sweep only, so the gradient is stored times `n`, and backward divides.
//! The mask multiplies, as in tllib: a row that is not selected still makes the loss NaN when its
//! divergence is not finite.

use super::Loss;
use super::element::{Element, round_to, stored_scale};
use super::isa::{Isa, Kernel};
use super::lanes;
use super::parallel::{cut_optional, run, split};
use super::real::Real;
use super::reduce;
use super::rows::Rows;
use super::softmax::confidence;
mod narrow;

use std::num::NonZeroUsize;
use std::ops::Range;

/// The widest rows that are taken side by side.
const NARROW: usize = 100;

/// The loss of the `strong` logits against the `weak` ones (same shape, at least one column); with
/// `grad` (contiguous, same shape) also its gradient with respect to `strong`.
pub fn uda<E: Element>(
    strong: Rows<'_, E>,
    weak: Rows<'_, E>,
    threshold: f64,
    temperature: f64,
    grad: Option<&mut [E]>,
    threads: NonZeroUsize,
) -> Loss {
    let scale = stored_scale::<E>(1.0 / temperature);
    let ranges = split(strong.rows(), threads);
    let narrow = lanes::narrow(&ranges, strong.cols(), NARROW);
    let grads = cut_optional(grad, &ranges, strong.cols());
    let jobs: Vec<_> = ranges
        .into_iter()
        .zip(grads)
        .map(|(range, grad)| {
            let sweep = Sweep {
                strong,
                weak,
                threshold,
                temperature,
                range,
                scale,
                grad,
            };
            move || lanes::dispatch(sweep, narrow)
        })
        .collect();
    let (mut total, mut selected) = (0.0, 0);
    for (value, count) in run(jobs) {
        total += value;
        selected += count;
    }
    let selected = selected.max(1) as f64;
    Loss {
        value: total / selected,
        scale: scale * selected,
    }
}

struct Sweep<'a, E> {
    strong: Rows<'a, E>,
    weak: Rows<'a, E>,
    threshold: f64,
    temperature: f64,
    range: Range<usize>,
    scale: f64,
    grad: Option<&'a mut [E]>,
}

impl<E: Element> Kernel for Sweep<'_, E> {
    /// The sum of the divergences and the number of selected rows.
    type Output = (f64, usize);

    #[inline(always)]
    fn run<I: Isa>(self) -> Self::Output {
        let cols = self.strong.cols();
        let threshold = round_to::<E>(E::Acc::of(self.threshold));
        let inverse_t = E::Acc::of(1.0 / self.temperature);
        let (mut strong_scratch, mut weak_scratch) = (self.strong.scratch(), self.weak.scratch());
        let mut buffers = Buffers::new(cols);
        let mut grad = self.grad;
        let (mut total, mut selected) = (0.0, 0);
        for (k, i) in self.range.enumerate() {
            let z = self.strong.in_turn(i, &mut strong_scratch);
            let y = self.weak.in_turn(i, &mut weak_scratch);
            let grad = grad
                .as_deref_mut()
                .map(|grad| &mut grad[k * cols..(k + 1) * cols]);
            let max = reduce::max(y);
            let q_total = reduce::exp_shifted::<I, _>(y, max, E::Acc::ONE, &mut buffers.q);
            if confidence::<E>(q_total) > threshold {
                selected += 1;
                total += buffers.divergence::<I>((y, max, q_total), z, inverse_t);
                if let Some(grad) = grad {
                    buffers.gradient(self.scale / self.temperature, q_total, grad);
                }
            } else {
                // 0 times the divergence and its gradient: 0, or NaN where they are not finite.
                total += if max.finite() {
                    reduce::sum_of_pairs(z, z, |z, _| z * E::Acc::ZERO)
                } else {
                    f64::NAN
                };
                if let Some(grad) = grad {
                    let finite = max.finite() && reduce::max(z).finite();
                    grad.fill(E::store(if finite { E::Acc::ZERO } else { E::Acc::NAN }));
                }
            }
        }
        (total, selected)
    }
}

/// Intermediate results of a row.
struct Buffers<F> {
    /// `e^{y_c - max y}`
    q: Vec<F>,
    /// `e^{(z_c - max z) / T}`
    p: Vec<F>,
    /// The sum of `p`.
    p_total: f64,
    /// Terms of the divergence.
    terms: Vec<F>,
}

impl<F: Real> Buffers<F> {
    fn new(cols: usize) -> Self {
        let zeros = || vec![F::ZERO; cols];
        Self {
            q: zeros(),
            p: zeros(),
            p_total: 0.0,
            terms: zeros(),
        }
    }

    /// `sum_c q_c (ln q_c - ln p_c)` for `q` in its buffer, from the logits `y` and their norm.
    #[inline(always)]
    fn divergence<I: Isa>(
        &mut self,
        (y, y_max, q_total): (&[F], F, f64),
        z: &[F],
        inverse_t: F,
    ) -> f64 {
        let z_max = reduce::max(z);
        self.p_total = reduce::exp_shifted::<I, _>(z, z_max, inverse_t, &mut self.p);
        let rows = self.terms.iter_mut().zip(&self.q).zip(y.iter().zip(z));
        for ((term, &q), (&y, &z)) in rows {
            // q ln q is defined as 0 at q = 0; q ln p is not, and NaN where p = 0 too, as in tllib.
            let ln_q = if q == F::ZERO { F::ZERO } else { y - y_max };
            *term = q * (ln_q - (z - z_max) * inverse_t);
        }
        reduce::sum(&self.terms) / q_total - q_total.ln() + self.p_total.ln()
    }

    /// `factor (p - q)`
    #[inline(always)]
    fn gradient<E: Element<Acc = F>>(&self, factor: f64, q_total: f64, grad: &mut [E]) {
        let (of_p, of_q) = (F::of(factor / self.p_total), F::of(factor / q_total));
        for ((g, &p), &q) in grad.iter_mut().zip(&self.p).zip(&self.q) {
            *g = E::store(p * of_p - q * of_q);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::element::{Bf16, F16};
    use super::super::lanes::tests::widened;
    use super::*;

    fn call<E: Element>(
        z: &[E],
        y: &[E],
        cols: usize,
        threshold: f64,
        threads: usize,
    ) -> (Loss, Vec<E>) {
        let rows = z.len() / cols;
        let mut grad = vec![E::store(E::Acc::ONE); z.len()];
        let view = |data| Rows::contiguous(data, rows, cols).unwrap();
        let threads = NonZeroUsize::new(threads).unwrap();
        let loss = uda(view(z), view(y), threshold, 0.4, Some(&mut grad), threads);
        let alone = uda(view(z), view(y), threshold, 0.4, None, threads);
        assert!(alone.value == loss.value || loss.value.is_nan());
        (loss, grad)
    }

    fn softmax(z: &[f64], t: f64) -> Vec<f64> {
        let total: f64 = z.iter().map(|z| (z / t).exp()).sum();
        z.iter().map(|z| (z / t).exp() / total).collect()
    }

    #[test]
    fn values_and_gradients() {
        for (rows, cols, threshold) in [(9, 4, 0.5), (35, 4, 0.5), (9, 41, 0.071)] {
            value_and_gradient(rows, cols, threshold);
        }
    }

    fn value_and_gradient(rows: usize, cols: usize, threshold: f64) {
        let z: Vec<f64> = (0..rows * cols)
            .map(|k| ((k * 37 + 5) % 23) as f64 / 5.0 - 2.0)
            .collect();
        let y: Vec<f64> = (0..rows * cols)
            .map(|k| ((k * 11) % 13) as f64 / 4.0)
            .collect();
        let selected: Vec<bool> = y
            .chunks(cols)
            .map(|y| softmax(y, 1.0).into_iter().any(|q| q > threshold))
            .collect();
        let n = selected.iter().filter(|&&s| s).count();
        assert!(n > 0 && n < rows);
        let mut expected = 0.0;
        let mut gradient = Vec::new();
        for ((z, y), &chosen) in z.chunks(cols).zip(y.chunks(cols)).zip(&selected) {
            for (p, q) in softmax(z, 0.4).into_iter().zip(softmax(y, 1.0)) {
                expected += if chosen {
                    q * (q / p).ln() / n as f64
                } else {
                    0.0
                };
                gradient.push(if chosen {
                    (p - q) / 0.4 / n as f64
                } else {
                    0.0
                });
            }
        }
        for threads in [1, 4] {
            let (loss, grad) = call(&z, &y, cols, threshold, threads);
            assert!(
                (loss.value - expected).abs() < 1e-13,
                "{} {expected}",
                loss.value
            );
            for (g, e) in grad.iter().zip(&gradient) {
                assert!((g / loss.scale - e).abs() < 1e-14);
            }
        }
    }

    #[test]
    fn nothing_selected_and_no_rows_are_zero() {
        let z = [1.0f32, 2.0];
        let (loss, grad) = call(&z, &z, 2, 1.0, 1);
        assert_eq!((loss.value, grad), (0.0, vec![0.0, 0.0]));
        assert_eq!(call::<f32>(&[], &[], 3, 0.5, 1).0.value, 0.0);
    }

    #[test]
    fn infinities_and_nan() {
        not_finite(|z, y| call(z, y, z.len(), 0.5, 1));
        not_finite(|z, y| {
            let (z, y) = (widened(z, 2, 0.0), widened(y, 2, -1e3));
            call(&z, &y, z.len(), 0.5, 1)
        });
    }

    fn not_finite(call: impl Fn(&[f64], &[f64]) -> (Loss, Vec<f64>)) {
        let inf = f64::INFINITY;
        // Selected: infinite where q > 0, NaN where q = 0 too; the gradient is finite.
        let (loss, grad) = call(&[0.0, -inf], &[2.0, 0.0]);
        assert!(loss.value == inf && grad.iter().all(|g| g.is_finite()));
        let (loss, grad) = call(&[0.0, -inf], &[2.0, -inf]);
        assert!(loss.value.is_nan() && grad.iter().all(|g| g.is_finite()));
        let (loss, grad) = call(&[1.0, 0.0], &[2.0, -inf]);
        assert!(loss.value.is_finite() && grad.iter().all(|g| g.is_finite()));
        // Not selected: the mask multiplies.
        let (loss, grad) = call(&[0.0, -inf], &[0.0, 0.0]);
        assert!(loss.value.is_nan() && grad.iter().all(|&g| g == 0.0));
        for (z, y) in [([0.0, f64::NAN], [0.0, 0.0]), ([0.0, 1.0], [0.0, f64::NAN])] {
            let (loss, grad) = call(&z, &y);
            assert!(loss.value.is_nan() && grad.iter().all(|g| g.is_nan()));
        }
    }

    #[test]
    fn half_types_agree_with_f64() {
        fn check<E: Element>(cols: usize, tolerance: f64) {
            let stored = |step: usize| -> Vec<E> {
                (0..33 * cols)
                    .map(|k| E::store(E::Acc::of(((k * step) % 31) as f64 / 8.0)))
                    .collect()
            };
            let exact = |x: &[E]| x.iter().map(|z| z.load().to_f64()).collect::<Vec<_>>();
            let (z, y) = (stored(7), stored(11));
            let (expected, gradient) = call(&exact(&z), &exact(&y), cols, 0.1, 1);
            let (loss, grad) = call(&z, &y, cols, 0.1, 1);
            assert!((loss.value - expected.value).abs() < 1e-6 * expected.value);
            let largest = gradient.iter().fold(0.0f64, |a, g| a.max(g.abs())) / expected.scale;
            for (g, e) in grad.iter().zip(gradient) {
                let difference = g.load().to_f64() / loss.scale - e / expected.scale;
                assert!(difference.abs() <= tolerance * largest);
            }
        }
        for cols in [7, 40] {
            check::<f32>(cols, 1e-6);
            check::<F16>(cols, 1e-3);
            check::<Bf16>(cols, 8e-3);
        }
    }
}
