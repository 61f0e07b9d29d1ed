//! The backward of every fused loss: the stored gradient times the incoming one.

use super::element::Element;
use super::isa::{Isa, Kernel, dispatch};
use super::lanes::{self, Narrow};
use super::parallel::{cut, run, split};
use super::real::Real;
use super::rows::Spread;
use std::num::NonZeroUsize;
use std::ops::Range;

/// The widest rows whose factors are spread.
const NARROW: usize = 32;
/// Rows with a factor for each column are multiplied several at a time if they are shorter than half of this.
const LONG: usize = 512;

/// What a matrix, contiguous row by row, is multiplied by.
#[derive(Clone, Copy)]
pub enum Factors<'a> {
    /// One for all, or one for each row.
    Rows(&'a [f64]),
    /// One for each column.
    Columns(&'a [f64]),
}

/// `out = values * factor`, or `out *= factor` where `values` is `None`.
pub fn scale<E: Element>(
    values: Option<&[E]>,
    factors: Factors<'_>,
    out: &mut [E],
    threads: NonZeroUsize,
) {
    match factors {
        Factors::Rows(factors) => by_rows(values, factors, out, threads),
        Factors::Columns(factors) => by_columns(values, factors, out, threads),
    }
}

/// A part of `values`, where there are any.
fn part<E>(values: Option<&[E]>, range: Range<usize>) -> Option<&[E]> {
    values.map(|values| &values[range])
}

fn by_rows<E: Element>(
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
                values: part(values, start..start + out.len()),
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

fn by_columns<E: Element>(
    values: Option<&[E]>,
    factors: &[f64],
    out: &mut [E],
    threads: NonZeroUsize,
) {
    let converted = factors.iter().map(|&factor| E::Acc::of(factor));
    let factors = converted.collect::<Vec<_>>();
    // Those of a short row are repeated.
    let factors = factors.repeat((LONG / factors.len().max(1)).max(1));
    let ranges = split(out.len(), threads);
    let jobs: Vec<_> = cut(out, &ranges, 1)
        .into_iter()
        .zip(ranges)
        .map(|(out, range)| {
            let repeated = Repeated {
                at: range.start % factors.len().max(1),
                values: part(values, range),
                factors: &factors,
                out,
            };
            move || dispatch(repeated)
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
            let start = k * rows * sweep.width;
            let values = part(sweep.values, start..start + out.len());
            each(values, spread.each(factors, 1.0), out);
        }
    }
}

/// The factors of a row, again and again.
struct Repeated<'a, E: Element> {
    values: Option<&'a [E]>,
    factors: &'a [E::Acc],
    /// That of the first element.
    at: usize,
    out: &'a mut [E],
}

impl<E: Element> Kernel for Repeated<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let (mut at, mut start) = (self.at, 0);
        while start < self.out.len() {
            let factors = &self.factors[at..];
            let range = start..self.out.len().min(start + factors.len());
            let out = &mut self.out[range.clone()];
            each(part(self.values, range.clone()), factors, out);
            (at, start) = (0, range.end);
        }
    }
}

/// One factor for each element.
#[inline(always)]
fn each<E: Element>(values: Option<&[E]>, factors: &[E::Acc], out: &mut [E]) {
    match values {
        Some(values) => {
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
        let factor = Factors::Rows(&[0.37]);
        scale(Some(&values), factor, &mut out, three);
        assert_eq!(out, expected);
        let mut own = values.clone();
        scale(None, factor, &mut own, NonZeroUsize::MIN);
        assert_eq!(own, expected);
    }

    /// Rows of `width` elements, whether they are cut, spread over several groups, or neither; and columns.
    fn matrix<E: Element + PartialEq + std::fmt::Debug>(width: usize, rows: usize) {
        let of_rows: Vec<f64> = (0..rows).map(|i| i as f64 / 8.0 - 1.5).collect();
        let of_columns: Vec<f64> = (0..width).map(|j| 2.25 - j as f64 / 4.0).collect();
        let number = |k: usize| E::Acc::of((k % 97) as f64 / 4.0);
        let values: Vec<E> = (0..rows * width).map(|k| E::store(number(k))).collect();
        for factors in [Factors::Rows(&of_rows), Factors::Columns(&of_columns)] {
            let factor = |k: usize| match factors {
                Factors::Rows(factors) => factors[k / width],
                Factors::Columns(factors) => factors[k % width],
            };
            let product = |k: usize| E::store(number(k) * E::Acc::of(factor(k)));
            let expected: Vec<E> = (0..values.len()).map(product).collect();
            for threads in [1, 2, 7] {
                let threads = NonZeroUsize::new(threads).unwrap();
                let mut own = values.clone();
                scale(None, factors, &mut own, threads);
                assert_eq!(own, expected, "{rows} rows of {width}");
                let mut out = vec![E::store(E::Acc::ZERO); values.len()];
                scale(Some(&values), factors, &mut out, threads);
                assert_eq!(out, expected, "{rows} rows of {width}");
            }
        }
    }

    #[test]
    fn a_factor_for_each_row_or_column() {
        for width in [1, 2, 3, 4, 5, 8, 9, 31, NARROW, NARROW + 1, 64, 100, 600] {
            for rows in [1, 2, 4, 20, 1100 / width + 3] {
                matrix::<f32>(width, rows);
                matrix::<f64>(width, rows);
                matrix::<F16>(width, rows);
                matrix::<Bf16>(width, rows);
            }
        }
        for factors in [Factors::Rows(&[]), Factors::Columns(&[])] {
            scale::<f32>(None, factors, &mut [], NonZeroUsize::MIN);
        }
    }
}
