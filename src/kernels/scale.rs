//! The backward of every fused loss: the stored gradient times the incoming one.

use super::element::Element;
use super::isa::{Isa, Kernel, dispatch};
use super::parallel::{cut, run, split};
use super::real::Real;
use std::num::NonZeroUsize;

/// `out = values * factor`, or `values * factor` in place where `values` is `None`.
pub fn scale<E: Element>(values: Option<&[E]>, factor: f64, out: &mut [E], threads: NonZeroUsize) {
    let ranges = split(out.len(), threads);
    let jobs: Vec<_> = cut(out, &ranges, 1)
        .into_iter()
        .zip(&ranges)
        .map(|(out, range)| {
            let sweep = Sweep {
                values: values.map(|v| &v[range.clone()]),
                factor,
                out,
            };
            move || dispatch(sweep)
        })
        .collect();
    run(jobs);
}

struct Sweep<'a, E> {
    values: Option<&'a [E]>,
    factor: f64,
    out: &'a mut [E],
}

impl<E: Element> Kernel for Sweep<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let factor = E::Acc::of(self.factor);
        match self.values {
            Some(values) => {
                for (o, v) in self.out.iter_mut().zip(values) {
                    *o = E::store(v.load() * factor);
                }
            }
            None => {
                for o in self.out {
                    *o = E::store(o.load() * factor);
                }
            }
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
        scale(Some(&values), 0.37, &mut out, NonZeroUsize::new(3).unwrap());
        assert_eq!(out, expected);
        let mut own = values.clone();
        scale(None, 0.37, &mut own, NonZeroUsize::MIN);
        assert_eq!(own, expected);
    }
}
