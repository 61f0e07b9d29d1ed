//! Hard example mining of a given matrix of distances.
//!
//! With distances `d` and weights of identity `s` (1 for the same, 0 for others),
//!
//! ```text
//! positive_i = argmax_j d_ij - 1e7 (1 - s_ij)
//! negative_i = argmin_j d_ij + 1e7 s_ij
//! ```
//!
//! evaluated in the storage type: in f32, adding the offset rounds the distance away, and which index
//! then comes first is part of tllib's result.

use super::super::element::Element;
use super::super::isa::{Isa, Kernel, dispatch};
use super::super::parallel::{cut, run, split};
use super::super::real::Real;
use super::super::reduce;
use super::super::rows::Rows;
use super::OFFSET;
use std::num::NonZeroUsize;
use std::ops::Range;

/// The first index of the largest and of the smallest value above in each row. NaN is larger than
/// every number.
pub fn hardest<F: Element<Acc = F> + Real>(
    distances: Rows<'_, F>,
    identity: Rows<'_, F>,
    positive: &mut [i64],
    negative: &mut [i64],
    threads: NonZeroUsize,
) {
    let ranges = split(distances.rows(), threads);
    let jobs: Vec<_> = cut(positive, &ranges, 1)
        .into_iter()
        .zip(cut(negative, &ranges, 1))
        .zip(ranges)
        .map(|((positive, negative), range)| {
            let scan = MatrixScan {
                distances,
                identity,
                range,
                positive,
                negative,
            };
            move || dispatch(scan)
        })
        .collect();
    run(jobs);
}

struct MatrixScan<'a, 'b, F> {
    distances: Rows<'a, F>,
    identity: Rows<'a, F>,
    range: Range<usize>,
    positive: &'b mut [i64],
    negative: &'b mut [i64],
}

impl<F: Element<Acc = F> + Real> Kernel for MatrixScan<'_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let offset = F::of(OFFSET);
        let mut scratch = (self.distances.scratch(), self.identity.scratch());
        let mut keys = vec![F::ZERO; self.distances.cols()];
        let out = self.positive.iter_mut().zip(self.negative);
        for (i, (positive, negative)) in self.range.zip(out) {
            let d = self.distances.in_turn(i, &mut scratch.0);
            let s = self.identity.in_turn(i, &mut scratch.1);
            for ((key, &d), &s) in keys.iter_mut().zip(d).zip(s) {
                *key = d + -offset * (F::ONE - s);
            }
            *positive = reduce::argmax(&keys) as i64;
            for ((key, &d), &s) in keys.iter_mut().zip(d).zip(s) {
                let sum = d + offset * s;
                *key = if sum.to_f64().is_nan() {
                    F::NEG_INFINITY
                } else {
                    -sum
                };
            }
            *negative = reduce::argmax(&keys) as i64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_matrix_form() {
        let nan = f64::NAN;
        let d = [3.0, 1.0, 2.0, 2.0, 4.0, 5.0, 5.0, 1.0, 1.0, 0.0, nan, 3.0];
        let s = [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0];
        let (mut positive, mut negative) = ([9; 3], [9; 3]);
        let (d, s) = (
            Rows::contiguous(&d, 3, 4).unwrap(),
            Rows::contiguous(&s, 3, 4).unwrap(),
        );
        hardest(
            d,
            s,
            &mut positive,
            &mut negative,
            NonZeroUsize::new(2).unwrap(),
        );
        assert_eq!((positive, negative), ([0, 1, 2], [2, 3, 1]));
    }
}
