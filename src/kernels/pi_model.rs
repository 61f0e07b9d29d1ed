//! Squared distance between two predictions, `d_i = sum_c (a_ic - b_ic)^2`.
//!
//! The loss is a sum of the `m_i d_i` with a mask `m`; its gradients are `dd_i/da_ic = 2 (a_ic - b_ic)`,
//! `dd_i/db_ic` the negative, and `d_i` for the mask.

use super::element::Element;
use super::isa::{Isa, Kernel};
use super::lanes;
use super::parallel::{cut, cut_optional, run, split};
use super::real::Real;
use super::reduce;
use super::rows::Rows;
mod columns;
mod narrow;

pub use columns::pi_model_by_columns;
use std::num::NonZeroUsize;
use std::ops::Range;

/// The widest rows whose sums are taken side by side: there is little to do, and wider ones are summed faster
/// than transposed.
const NARROW: usize = 31;

/// Where the results go. Gradients are contiguous.
pub struct Outputs<'a, E> {
    /// The distance of each row, without its mask.
    pub distances: &'a mut [f64],
    /// `factor m_i dd_i/da_i`
    pub grad_a: Option<&'a mut [E]>,
    /// `factor m_i dd_i/db_i`
    pub grad_b: Option<&'a mut [E]>,
}

/// The distances of the rows of `a` and `b` (same shape), and their gradients with the mask `mask`
/// (1 where there is none) and times `factor`.
pub fn pi_model<E: Element>(
    a: Rows<'_, E>,
    b: Rows<'_, E>,
    mask: Option<&[f64]>,
    factor: f64,
    out: Outputs<'_, E>,
    threads: NonZeroUsize,
) {
    let ranges = split(a.rows(), threads);
    let grads_a = cut_optional(out.grad_a, &ranges, a.cols());
    let grads_b = cut_optional(out.grad_b, &ranges, a.cols());
    let jobs: Vec<_> = cut(out.distances, &ranges, 1)
        .into_iter()
        .zip(grads_a.into_iter().zip(grads_b))
        .zip(ranges)
        .map(|((distances, (grad_a, grad_b)), range)| {
            let out = Outputs {
                distances,
                grad_a,
                grad_b,
            };
            let sweep = Sweep {
                a,
                b,
                mask,
                factor,
                range,
                out,
            };
            move || lanes::dispatch(sweep, a.cols() <= NARROW)
        })
        .collect();
    run(jobs);
}

struct Sweep<'a, E> {
    a: Rows<'a, E>,
    b: Rows<'a, E>,
    mask: Option<&'a [f64]>,
    factor: f64,
    range: Range<usize>,
    out: Outputs<'a, E>,
}

impl<E: Element> Kernel for Sweep<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let cols = self.a.cols();
        let (mut scratch_a, mut scratch_b) = (self.a.scratch(), self.b.scratch());
        let mut out = self.out;
        for (k, i) in self.range.enumerate() {
            let a = self.a.in_turn(i, &mut scratch_a);
            let b = self.b.in_turn(i, &mut scratch_b);
            out.distances[k] = reduce::sum_of_pairs(a, b, |a, b| (a - b) * (a - b));
            let factor = E::Acc::of(2.0 * self.factor * self.mask.map_or(1.0, |m| m[i]));
            for (grad, factor) in [(&mut out.grad_a, factor), (&mut out.grad_b, -factor)] {
                let Some(grad) = grad.as_deref_mut() else {
                    continue;
                };
                let row = &mut grad[k * cols..(k + 1) * cols];
                for ((g, &a), &b) in row.iter_mut().zip(a).zip(b) {
                    *g = E::store((a - b) * factor);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_and_gradients() {
        let a = [1.0f64, 2.0, 0.5, -1.0, 3.0, 3.0];
        let b = [0.0f64, 4.0, 0.5, 1.0, 3.0, f64::NAN];
        for threads in [1, 2] {
            let (mut distances, mut grad_a, mut grad_b) = ([9.0; 3], [9.0; 6], [9.0; 6]);
            let out = Outputs {
                distances: &mut distances,
                grad_a: Some(&mut grad_a),
                grad_b: Some(&mut grad_b),
            };
            let view = |data| Rows::contiguous(data, 3, 2).unwrap();
            let threads = NonZeroUsize::new(threads).unwrap();
            pi_model(
                view(&a),
                view(&b),
                Some(&[1.0, 0.0, 0.0]),
                0.5,
                out,
                threads,
            );
            assert_eq!(distances[..2], [5.0, 4.0]);
            assert_eq!(grad_a[..5], [1.0, -2.0, 0.0, 0.0, 0.0]);
            assert_eq!(grad_b[..5], [-1.0, 2.0, 0.0, 0.0, 0.0]);
            // A masked-out NaN stays, as in tllib.
            assert!(distances[2].is_nan() && grad_a[5].is_nan() && grad_b[5].is_nan());
        }
    }

    #[test]
    fn every_width() {
        let few = [(1, 1), (16, 2), (19, 3), (5, 33), (3, 5000)];
        // Several groups of rows whose factors are spread together.
        let many = [(1500, 1), (700, 4), (700, 7), (60, 31)];
        for (rows, cols) in few.into_iter().chain(many) {
            let number = |k: usize, step: usize| ((k * step) % 17) as f64 / 16.0;
            let a: Vec<f64> = (0..rows * cols).map(|k| number(k, 5)).collect();
            let b: Vec<f64> = (0..rows * cols).map(|k| number(k, 7)).collect();
            let weights: Vec<f64> = (0..rows).map(|i| number(i, 3)).collect();
            let view = |data| Rows::contiguous(data, rows, cols).unwrap();
            for mask in [None, Some(&weights[..])] {
                let (mut distances, mut grad_a) = (vec![9.0; rows], vec![9.0; a.len()]);
                let mut grad_b = grad_a.clone();
                let out = Outputs {
                    distances: &mut distances,
                    grad_a: Some(&mut grad_a),
                    grad_b: Some(&mut grad_b),
                };
                let two = NonZeroUsize::new(2).unwrap();
                pi_model(view(&a), view(&b), mask, 0.5, out, two);
                for k in 0..a.len() {
                    let expected = (a[k] - b[k]) * mask.map_or(1.0, |m| m[k / cols]);
                    assert!((grad_a[k] - expected).abs() < 1e-15 && grad_b[k] == -grad_a[k]);
                }
                for (i, distance) in distances.iter().enumerate() {
                    let row = i * cols..(i + 1) * cols;
                    let pairs = a[row.clone()].iter().zip(&b[row]);
                    let exact: f64 = pairs.map(|(a, b)| (a - b) * (a - b)).sum();
                    assert!((distance - exact).abs() <= 1e-14 * exact, "{rows} {cols}");
                }
            }
        }
    }

    #[test]
    fn no_mask_is_one_everywhere() {
        let (mut distances, mut grad) = ([0.0], [0.0f32; 2]);
        let out = Outputs {
            distances: &mut distances,
            grad_a: None,
            grad_b: Some(&mut grad),
        };
        let (a, b) = ([1.0f32, 0.0], [0.0f32, 0.0]);
        let view = |data| Rows::contiguous(data, 1, 2).unwrap();
        pi_model(view(&a), view(&b), None, 1.0, out, NonZeroUsize::MIN);
        assert_eq!((distances, grad), ([1.0], [-2.0, 0.0]));
    }
}
