//! Row entropy of probabilities, `H_i = -sum_c p_ic ln(p_ic + 1e-5)`, and its gradient
//! `dH_i/dp_ic = -ln(p_ic + 1e-5) - p_ic / (p_ic + 1e-5)`.

use super::element::Element;
use super::isa::{Isa, Kernel};
use super::lanes;
use super::mcc::ENTROPY_EPSILON;
use super::parallel::{cut, cut_optional, run, split};
use super::real::Real;
use super::reduce;
use super::rows::{Rows, store_row};
mod columns;
mod narrow;

pub use columns::entropy_by_columns;
use std::num::NonZeroUsize;
use std::ops::Range;

/// The widest rows that are taken side by side.
const NARROW: usize = 32;

/// Writes the entropy of each row into `out`; with `grad` (contiguous, same shape) also the
/// gradient of each, times `weight`.
pub fn entropy<E: Element>(
    p: Rows<'_, E>,
    out: &mut [f64],
    grad: Option<&mut [E]>,
    weight: f64,
    threads: NonZeroUsize,
) {
    let ranges = split(p.rows(), threads);
    let narrow = lanes::narrow(&ranges, p.cols(), NARROW);
    let outs = cut(out, &ranges, 1);
    let grads = cut_optional(grad, &ranges, p.cols());
    let jobs: Vec<_> = ranges
        .into_iter()
        .zip(outs.into_iter().zip(grads))
        .map(|(range, (out, grad))| {
            let sweep = Sweep {
                p,
                range,
                out,
                grad,
                weight,
            };
            move || lanes::dispatch(sweep, narrow)
        })
        .collect();
    run(jobs);
}

struct Sweep<'a, E> {
    p: Rows<'a, E>,
    range: Range<usize>,
    out: &'a mut [f64],
    grad: Option<&'a mut [E]>,
    weight: f64,
}

impl<E: Element> Kernel for Sweep<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let cols = self.p.cols();
        let (epsilon, weight) = (E::Acc::of(ENTROPY_EPSILON), E::Acc::of(-self.weight));
        let (group, mut scratch) = self.p.groups();
        let mut logs = vec![E::Acc::ZERO; group * cols];
        let mut grad = self.grad;
        for start in self.range.clone().step_by(group) {
            let end = self.range.end.min(start + group);
            let p = self.p.block(start..end, &mut scratch);
            let logs = &mut logs[..p.len()];
            for (log, &p) in logs.iter_mut().zip(p) {
                *log = (p + epsilon).ln::<I>();
            }
            let here = start - self.range.start..end - self.range.start;
            reduce::sums_of_pairs(p, logs, |p, log| -p * log, &mut self.out[here.clone()]);
            if let Some(grad) = grad.as_deref_mut() {
                for (log, &p) in logs.iter_mut().zip(p) {
                    *log += p / (p + epsilon);
                }
                store_row(logs, weight, &mut grad[here.start * cols..here.end * cols]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_and_gradients() {
        let p = [0.2f64, 0.8, 1.0, 0.0];
        for threads in [1, 2] {
            let (mut out, mut grad) = ([0.0; 2], [0.0; 4]);
            let view = Rows::contiguous(&p, 2, 2).unwrap();
            entropy(
                view,
                &mut out,
                Some(&mut grad),
                0.5,
                NonZeroUsize::new(threads).unwrap(),
            );
            assert!((out[0] + 0.2 * 0.20001f64.ln() + 0.8 * 0.80001f64.ln()).abs() < 1e-15);
            assert!((out[1] + 1.00001f64.ln()).abs() < 1e-15);
            for k in 0..4 {
                let exact = -0.5 * ((p[k] + 1e-5).ln() + p[k] / (p[k] + 1e-5));
                assert!((grad[k] - exact).abs() < 1e-14);
            }
        }
    }

    #[test]
    fn every_width() {
        for (rows, cols) in [(1, 1), (16, 3), (35, 32), (35, 33), (3, 700)] {
            let p: Vec<f64> = (0..rows * cols).map(|k| (k % 17) as f64 / 16.0).collect();
            let (mut out, mut grad) = (vec![9.0; rows], vec![9.0; p.len()]);
            let view = Rows::contiguous(&p, rows, cols).unwrap();
            entropy(view, &mut out, Some(&mut grad), 2.0, NonZeroUsize::MIN);
            for (p, out) in p.chunks(cols).zip(out) {
                let exact: f64 = p.iter().map(|p| -p * (p + 1e-5).ln()).sum();
                assert!((out - exact).abs() < 1e-13 * cols as f64, "{out} {exact}");
            }
            for (p, grad) in p.iter().zip(grad) {
                let exact = -2.0 * ((p + 1e-5).ln() + p / (p + 1e-5));
                assert!((grad - exact).abs() < 1e-13);
            }
        }
    }
}
