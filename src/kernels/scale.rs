//! The backward of every fused loss: the stored gradient times the incoming one.

use super::element::Element;
use super::isa::{Isa, Kernel};
use super::lanes::{self, Narrow};
use super::parallel::{cut, run, split};
use super::real::Real;
use super::rows::Spread;
use std::num::NonZeroUsize;

/// The widest rows whose factors are spread.
const NARROW: usize = 32;

/// `out = values * factor`, or `out *= factor` where `values` is `None`: one factor for all, or one for each
/// row.
pub fn scale<E: Element>(
    values: Option<&[E]>,
    factors: &[f64],
    out: &mut [E],
    threads: NonZeroUsize,
) {
    let width = (out.len() / factors.len().max(1)).max(1);
    let narrow = factors.len() > 1 && width <= NARROW;
    // Narrow rows are not cut.
    let unit = if narrow { width } else { 1 };
    let ranges = split(out.len() / unit, threads);
    let jobs: Vec<_> = cut(out, &ranges, unit)
        .into_iter()
        .zip(&ranges)
        .map(|(out, range)| {
            let start = range.start * unit;
            let sweep = Sweep {
                values: values.map(|v| &v[start..start + out.len()]),
                factors: &factors[start / width..(start + out.len()).div_ceil(width)],
                width,
                skipped: start % width,
                out,
            };
            move || lanes::dispatch(sweep, narrow)
        })
        .collect();
    run(jobs);
}

struct Sweep<'a, E> {
    values: Option<&'a [E]>,
    /// Of the rows from the first one on that `out` has a part of.
    factors: &'a [f64],
    /// Of a row.
    width: usize,
    /// The elements of the first row that come before `out`.
    skipped: usize,
    out: &'a mut [E],
}

impl<E: Element> Kernel for Sweep<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let (mut at, mut end) = (0, self.width - self.skipped);
        for &factor in self.factors {
            end = end.min(self.out.len());
            let factor = E::Acc::of(factor);
            let out = &mut self.out[at..end];
            match self.values {
                Some(values) => {
                    for (o, v) in out.iter_mut().zip(&values[at..end]) {
                        *o = E::store(v.load() * factor);
                    }
                }
                None => {
                    for o in out {
                        *o = E::store(o.load() * factor);
                    }
                }
            }
            (at, end) = (end, end + self.width);
        }
    }
}

impl<E: Element> Kernel for Narrow<Sweep<'_, E>> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Self(sweep) = self;
        let mut spread = Spread::new(sweep.width);
        let rows = spread.rows();
        let groups = sweep.out.chunks_mut(rows * sweep.width);
        for (k, (out, factors)) in groups.zip(sweep.factors.chunks(rows)).enumerate() {
            let factors = spread.each(factors, 1.0);
            match sweep.values {
                Some(values) => {
                    let values = &values[k * rows * sweep.width..];
                    for ((o, v), &factor) in out.iter_mut().zip(values).zip(factors) {
                        *o = E::store(v.load() * factor);
                    }
                }
                None => {
                    for (o, &factor) in out.iter_mut().zip(factors) {
                        *o = E::store(o.load() * factor);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::element::{Bf16, F16};
    use super::*;

    #[test]
    fn in_place_and_out_of_place() {
        let values: Vec<f32> = (0..100).map(|k| k as f32).collect();
        let expected: Vec<f32> = values.iter().map(|v| v * 0.37).collect();
        let mut out = vec![0.0; 100];
        let three = NonZeroUsize::new(3).unwrap();
        scale(Some(&values), &[0.37], &mut out, three);
        assert_eq!(out, expected);
        let mut own = values.clone();
        scale(None, &[0.37], &mut own, NonZeroUsize::MIN);
        assert_eq!(own, expected);
    }

    /// Rows of `width` elements, whether they are cut, spread over several groups, or neither.
    fn rows_of<E: Element + PartialEq + std::fmt::Debug>(width: usize, rows: usize) {
        let factors: Vec<f64> = (0..rows).map(|i| i as f64 / 8.0 - 1.5).collect();
        let number = |k: usize| E::Acc::of((k % 97) as f64 / 4.0);
        let values: Vec<E> = (0..rows * width).map(|k| E::store(number(k))).collect();
        let product = |k: usize| E::store(number(k) * E::Acc::of(factors[k / width]));
        let expected: Vec<E> = (0..values.len()).map(product).collect();
        for threads in [1, 2, 7] {
            let threads = NonZeroUsize::new(threads).unwrap();
            let mut own = values.clone();
            scale(None, &factors, &mut own, threads);
            assert_eq!(own, expected, "{rows} rows of {width}");
            let mut out = vec![E::store(E::Acc::ZERO); values.len()];
            scale(Some(&values), &factors, &mut out, threads);
            assert_eq!(out, expected, "{rows} rows of {width}");
        }
    }

    #[test]
    fn a_factor_for_each_row() {
        for width in [1, 2, 3, 4, 5, 8, 9, 31, NARROW, NARROW + 1, 64, 100] {
            for rows in [1, 2, 4, 20, 1100 / width + 3] {
                rows_of::<f32>(width, rows);
                rows_of::<f64>(width, rows);
                rows_of::<F16>(width, rows);
                rows_of::<Bf16>(width, rows);
            }
        }
        scale::<f32>(None, &[], &mut [], NonZeroUsize::MIN);
    }
}
