//! The backward of every fused loss: the stored gradient times the incoming one.

use super::element::Element;
use super::isa::{Isa, Kernel, dispatch};
use super::parallel::{cut, run, split};
use super::real::Real;
use std::num::NonZeroUsize;

/// `out = values * factor`, or `out *= factor` where `values` is `None`: one factor for all, or one for each
/// row.
pub fn scale<E: Element>(
    values: Option<&[E]>,
    factors: &[f64],
    out: &mut [E],
    threads: NonZeroUsize,
) {
    let width = (out.len() / factors.len().max(1)).max(1);
    let ranges = split(out.len(), threads);
    let jobs: Vec<_> = cut(out, &ranges, 1)
        .into_iter()
        .zip(&ranges)
        .map(|(out, range)| {
            let sweep = Sweep {
                values: values.map(|v| &v[range.clone()]),
                factors,
                width,
                start: range.start,
                out,
            };
            move || dispatch(sweep)
        })
        .collect();
    run(jobs);
}

struct Sweep<'a, E> {
    values: Option<&'a [E]>,
    factors: &'a [f64],
    /// Of a row.
    width: usize,
    /// The index of the first element among all.
    start: usize,
    out: &'a mut [E],
}

impl<E: Element> Kernel for Sweep<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let (mut at, len) = (0, self.out.len());
        while at < len {
            let row = (self.start + at) / self.width;
            let end = len.min((row + 1) * self.width - self.start);
            let factor = E::Acc::of(self.factors[row]);
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
            at = end;
        }
    }
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn a_factor_for_each_row() {
        // Rows that lie across the borders of threads.
        for (rows, threads) in [(1, 1), (4, 3), (20, 7), (100, 2)] {
            let factors: Vec<f64> = (0..rows).map(|i| i as f64 - 1.5).collect();
            let values: Vec<f32> = (0..100).map(|k| k as f32).collect();
            let factor = |k: usize| factors[k * rows / 100] as f32;
            let expected: Vec<f32> = (0..100).map(|k| values[k] * factor(k)).collect();
            let mut own = values.clone();
            scale(
                None,
                &factors,
                &mut own,
                NonZeroUsize::new(threads).unwrap(),
            );
            assert_eq!(own, expected, "{rows}");
            let mut out = vec![0.0; 100];
            scale(Some(&values), &factors, &mut out, NonZeroUsize::MIN);
            assert_eq!(out, expected, "{rows}");
        }
        scale::<f32>(None, &[], &mut [], NonZeroUsize::MIN);
    }
}
