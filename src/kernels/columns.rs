//! Sweeps over column-major matrices, for losses that sum a term of each element over its row. The gradients have the
//! layout of the inputs, so that nothing is transposed.

use super::element::Element;
use super::isa::{Isa, Kernel, dispatch};
use super::parallel::{cut_optional, run, split};
use super::real::Real;
use super::reduce;
use super::rows::{Rows, Scratch};
use std::array::from_fn;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::ops::Range;

/// Terms of a row that are summed in the computing type. These sums are added up in f64.
const FLUSH: usize = 32;

/// Rows whose sums stay in the L1 cache while the columns are read.
const BLOCK: usize = 1024;

/// Minimum number of rows for which a column is worth a sweep of its own.
const TALL: usize = 16;

/// Several shorter columns are processed at a time where they are adjacent, as one of about this height.
const HEIGHT: usize = 128;

/// Whether a matrix should be read by [`sweep`].
pub fn fit<E: Element>(rows: &Rows<'_, E>) -> bool {
    rows.column_major() && (rows.rows() >= TALL || rows.transposed().grouped(1).is_some())
}

/// The term that is summed, a function of the elements of `N` matrices at one position.
pub trait Each<const N: usize> {
    /// The term, and its derivative with respect to the first element; that of the second is the negative.
    /// Implementations must be `#[inline(always)]`.
    fn term<I: Isa, F: Real>(elements: [F; N]) -> (F, F);
}

/// Writes the sum of the terms of each row into `sums`, and into `grads` the derivatives, times the weight of the
/// row and contiguous column by column.
pub fn sweep<E: Element, T: Each<N>, const N: usize>(
    inputs: [Rows<'_, E>; N],
    weights: &[E::Acc],
    sums: &mut [f64],
    grads: [Option<&mut [E]>; N],
    threads: NonZeroUsize,
) {
    let columns = inputs.map(|input| input.transposed());
    let count = weights.len();
    let group = HEIGHT
        .checked_div(count)
        .map_or(0, |group| group.min(columns[0].rows()));
    let tall = columns.map(|columns| columns.grouped(group));
    if group <= 1 || tall.iter().any(Option::is_none) {
        return each_column::<E, T, N>(columns, weights, sums, grads, threads);
    }
    let whole = columns[0].rows() / group * group;
    let mut parts = grads.map(|grad| grad.map(|grad| grad.split_at_mut(whole * count)).unzip());
    let rest = columns.map(|columns| columns.slice(whole..columns.rows()));
    let of_rest = from_fn(|k| parts[k].1.take());
    each_column::<E, T, N>(rest, weights, sums, of_rest, NonZeroUsize::MIN);
    let tall = from_fn(|k| tall[k].unwrap_or(columns[k]));
    let (weights, mut each) = (weights.repeat(group), vec![0.0; group * count]);
    let of_tall = from_fn(|k| parts[k].0.take());
    each_column::<E, T, N>(tall, &weights, &mut each, of_tall, threads);
    for part in each.chunks_exact(count) {
        reduce::add(sums, part);
    }
}

/// [`sweep`] of the columns, which are given as rows, one after the other.
fn each_column<E: Element, T: Each<N>, const N: usize>(
    columns: [Rows<'_, E>; N],
    weights: &[E::Acc],
    sums: &mut [f64],
    grads: [Option<&mut [E]>; N],
    threads: NonZeroUsize,
) {
    let ranges = split(columns[0].rows(), threads);
    let mut grads = grads.map(|grad| cut_optional(grad, &ranges, weights.len()).into_iter());
    let jobs: Vec<_> = ranges
        .into_iter()
        .map(|range| {
            let sweep = Sweep::<'_, '_, E, T, N> {
                columns: columns.map(|columns| columns.slice(range.clone())),
                weights,
                grads: from_fn(|k| grads[k].next().flatten()),
                term: PhantomData,
            };
            move || dispatch(sweep)
        })
        .collect();
    sums.fill(0.0);
    for part in run(jobs) {
        reduce::add(sums, &part);
    }
}

struct Sweep<'a, 'b, E: Element, T, const N: usize> {
    columns: [Rows<'a, E>; N],
    weights: &'a [E::Acc],
    grads: [Option<&'b mut [E]>; N],
    term: PhantomData<fn() -> T>,
}

impl<E: Element, T: Each<N>, const N: usize> Kernel for Sweep<'_, '_, E, T, N> {
    type Output = Vec<f64>;

    #[inline(always)]
    fn run<I: Isa>(mut self) -> Vec<f64> {
        let count = self.weights.len();
        let mut sums = vec![0.0; count];
        for (block, sums) in sums.chunks_mut(BLOCK).enumerate() {
            let rows = block * BLOCK..block * BLOCK + sums.len();
            if self.grads.iter().any(Option::is_some) {
                self.block::<I, true>(rows, sums);
            } else {
                self.block::<I, false>(rows, sums);
            }
        }
        sums
    }
}

impl<E: Element, T: Each<N>, const N: usize> Sweep<'_, '_, E, T, N> {
    /// Adds the terms of some rows to their `sums`. `GRAD` says that there are gradients to write.
    #[inline(always)]
    fn block<I: Isa, const GRAD: bool>(&mut self, rows: Range<usize>, sums: &mut [f64]) {
        let weights = &self.weights[rows.clone()];
        let columns = self.columns.map(|columns| columns.columns(rows.clone()));
        let mut scratch = columns.map(|columns| columns.scratch());
        let (mut part, mut slopes) = ([E::Acc::ZERO; BLOCK], [E::Acc::ZERO; BLOCK]);
        let last = columns[0].rows();
        for j in 0..last {
            let column = elements(&columns, j, &mut scratch);
            terms::<I, _, T, N, GRAD>(column, weights, &mut part, &mut slopes);
            for (k, grad) in self.grads.iter_mut().enumerate() {
                if let Some(grad) = grad {
                    let sign = if k == 0 { E::Acc::ONE } else { -E::Acc::ONE };
                    let grad = &mut grad[j * self.weights.len()..][rows.clone()];
                    for (g, &slope) in grad.iter_mut().zip(&slopes) {
                        *g = E::store(slope * sign);
                    }
                }
            }
            if j % FLUSH == FLUSH - 1 || j == last - 1 {
                for (sum, part) in sums.iter_mut().zip(&mut part) {
                    *sum += part.to_f64();
                    *part = E::Acc::ZERO;
                }
            }
        }
    }
}

/// Column `j` of each matrix.
#[inline(always)]
fn elements<'s, E: Element, const N: usize>(
    columns: &'s [Rows<'_, E>; N],
    j: usize,
    scratch: &'s mut [Scratch<E::Acc>; N],
) -> [&'s [E::Acc]; N] {
    let mut each = columns.iter().zip(scratch);
    from_fn(|_| {
        each.next()
            .map_or(&[][..], |(columns, scratch)| columns.in_turn(j, scratch))
    })
}

/// Adds the terms of a column to `part` and, with `GRAD`, writes their derivatives times the weights.
#[inline(always)]
fn terms<I: Isa, F: Real, T: Each<N>, const N: usize, const GRAD: bool>(
    column: [&[F]; N],
    weights: &[F],
    part: &mut [F],
    slopes: &mut [F],
) {
    let count = weights.len();
    let (column, part, slopes) = (
        column.map(|column| &column[..count]),
        &mut part[..count],
        &mut slopes[..count],
    );
    for i in 0..count {
        let (term, slope) = T::term::<I, F>(column.map(|column| column[i]));
        part[i] += term;
        if GRAD {
            slopes[i] = slope * weights[i];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::element::{Bf16, F16};
    use super::super::entropy::{entropy, entropy_by_columns};
    use super::super::pi_model::{Outputs, pi_model, pi_model_by_columns};
    use super::*;

    fn numbers<E: Element>(count: usize, step: usize) -> Vec<E> {
        (0..count)
            .map(|k| E::store(E::Acc::of(((k * step) % 61 + 1) as f64 / 64.0)))
            .collect()
    }

    /// Both ways of reading one matrix agree, and the gradients are each other's transposes.
    fn agree<E: Element>((rows, cols): (usize, usize), tolerance: f64) {
        let (a, b) = (numbers::<E>(rows * cols, 7), numbers::<E>(rows * cols, 11));
        // SAFETY: the transposes of cols x rows matrices.
        let view =
            |data: &[E]| unsafe { Rows::strided(data.as_ptr(), (rows, cols), (1, rows as isize)) };
        let mask: Vec<f64> = (0..rows).map(|i| (i % 5) as f64 / 4.0).collect();
        let close =
            |x: f64, y: f64| assert!((x - y).abs() <= tolerance * y.abs().max(0.1), "{x} {y}");
        let transposes = |by_columns: &[E], by_rows: &[E]| {
            for (k, g) in by_columns.iter().enumerate() {
                let other = by_rows[k % rows * cols + k / rows];
                close(g.load().to_f64(), other.load().to_f64());
            }
        };
        for (threads, mask) in [(1, None), (3, Some(&mask[..]))] {
            let threads = NonZeroUsize::new(threads).unwrap();
            let mut found = Vec::new();
            for kernel in [pi_model::<E>, pi_model_by_columns::<E>] {
                let (mut distances, mut grads) = (vec![9.0; rows], [a.clone(), a.clone()]);
                let [grad_a, grad_b] = &mut grads;
                let out = Outputs {
                    distances: &mut distances,
                    grad_a: Some(grad_a),
                    grad_b: Some(grad_b),
                };
                kernel(view(&a), view(&b), mask, 0.5, out, threads);
                found.push((distances, grads));
            }
            found[1]
                .0
                .iter()
                .zip(&found[0].0)
                .for_each(|(&x, &y)| close(x, y));
            for k in 0..2 {
                transposes(&found[1].1[k], &found[0].1[k]);
            }
            let mut found = Vec::new();
            for kernel in [entropy::<E>, entropy_by_columns::<E>] {
                let (mut out, mut grad) = (vec![9.0; rows], a.clone());
                kernel(view(&a), &mut out, Some(&mut grad), 0.25, threads);
                found.push((out, grad));
            }
            found[1]
                .0
                .iter()
                .zip(&found[0].0)
                .for_each(|(&x, &y)| close(x, y));
            transposes(&found[1].1, &found[0].1);
        }
    }

    #[test]
    fn columns_and_rows_agree() {
        for shape in [
            (1, 3),
            (3, 1000),
            (7, 36),
            (11, 47),
            (32, 2),
            (45, 70),
            (300, 33),
            (BLOCK + 7, 3),
        ] {
            agree::<f64>(shape, 1e-13);
            agree::<f32>(shape, 1e-6);
            agree::<F16>(shape, 2e-3);
            agree::<Bf16>(shape, 2e-2);
        }
    }

    #[test]
    fn no_gradient_and_no_columns() {
        let data = numbers::<f32>(64, 5);
        let view = |cols| {
            // SAFETY: at most the transpose of a 2 x 32 matrix.
            unsafe { Rows::strided(data.as_ptr(), (32, cols), (1, 32)) }
        };
        assert!(fit(&view(2)) && !fit(&view(2).slice(0..15)));
        // SAFETY: the transpose of a 20 x 3 matrix.
        assert!(fit(&unsafe {
            Rows::strided(data.as_ptr(), (3, 20), (1, 3))
        }));
        let mut out = vec![9.0; 32];
        entropy_by_columns(view(0), &mut out, None, 1.0, NonZeroUsize::MIN);
        assert!(out.iter().all(|&h| h == 0.0));
        entropy_by_columns(view(2), &mut out, None, 1.0, NonZeroUsize::MIN);
        assert!(out.iter().all(|&h| h > 0.0));
        let none = view(2).slice(0..0);
        entropy_by_columns(none, &mut [], None, 1.0, NonZeroUsize::MIN);
    }
}
