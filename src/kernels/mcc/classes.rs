//! What the loss and its gradient need of each class, from the sums over all rows.

use super::super::isa::{Isa, Kernel, dispatch};
use super::super::parallel::{cut_optional, run, split_classes};
use super::super::real::Real;
use super::super::reduce;
use super::Sums;

/// Classes whose terms are computed before they are added up.
const BLOCK: usize = 512;

/// For the gradient.
pub(super) struct Slopes<F> {
    /// `1 - e_c / s_c`
    pub(super) ratio: Vec<F>,
    /// `1 / s_c`, 0 for a class that is absent.
    pub(super) inverse: Vec<F>,
}

impl<F: Real> Slopes<F> {
    /// Room for those of `count` classes.
    pub(super) fn new(count: usize) -> Self {
        Self {
            ratio: vec![F::ZERO; count],
            inverse: vec![F::ZERO; count],
        }
    }

    /// No `|dL/dz_ic| T` is above this.
    pub(super) fn bound(&self) -> f64 {
        // `dL/dp_ic` is between -2 and 1 times `w_i / (C s_c)`, and `w_i <= 2`: it differs from its mean over the row
        // by at most `1 - p_ic` times `6 / (C s)`, with the least `s`. And `p (1 - p) <= 1/4`.
        let largest = self.inverse.iter().fold(F::ZERO, |a, &i| i.larger(a));
        let by_sums = 1.5 * largest.to_f64() / self.inverse.len() as f64;
        // From `s_c >= w_i p_ic`.
        by_sums.min(4.0)
    }
}

/// `sum_c e_c / s_c`, with 1 for a class that is absent, and NaN if all are: then there was no row. Also writes what
/// the gradient needs.
pub(super) fn total<F: Real>(sums: &Sums, slopes: Option<&mut Slopes<F>>, threads: usize) -> f64 {
    let ranges = split_classes(sums.s.len(), threads);
    let (ratio, inverse) = match slopes {
        Some(slopes) => (Some(&mut slopes.ratio[..]), Some(&mut slopes.inverse[..])),
        None => (None, None),
    };
    let jobs: Vec<_> = cut_optional(ratio, &ranges, 1)
        .into_iter()
        .zip(cut_optional(inverse, &ranges, 1))
        .zip(ranges)
        .map(|((ratio, inverse), range)| {
            let part = Part {
                s: &sums.s[range.clone()],
                e: &sums.e[range],
                slopes: ratio.zip(inverse),
            };
            move || dispatch(part)
        })
        .collect();
    let found = run(jobs);
    if found.iter().all(|&(_, present)| present == 0) {
        return f64::NAN;
    }
    found.iter().map(|(total, _)| total).sum()
}

/// Some of the classes.
struct Part<'a, F> {
    s: &'a [f64],
    e: &'a [f64],
    slopes: Option<(&'a mut [F], &'a mut [F])>,
}

impl<F: Real> Kernel for Part<'_, F> {
    /// The sum of the terms, and how many classes are present.
    type Output = (f64, usize);

    #[inline(always)]
    fn run<I: Isa>(mut self) -> Self::Output {
        let tiny = F::TINY.to_f64();
        let (mut terms, mut total, mut present) = ([0.0; BLOCK], 0.0, 0);
        for (block, (s, e)) in self.s.chunks(BLOCK).zip(self.e.chunks(BLOCK)).enumerate() {
            let terms = &mut terms[..s.len()];
            for ((term, &s), &e) in terms.iter_mut().zip(s).zip(e) {
                // NaN is not below TINY: it stays in the loss.
                *term = if s < tiny { 1.0 } else { e / s };
                present += usize::from(!(s < tiny));
            }
            total += reduce::sum(terms);
            if let Some((ratio, inverse)) = &mut self.slopes {
                let out = ratio[block * BLOCK..]
                    .iter_mut()
                    .zip(&mut inverse[block * BLOCK..]);
                for (((ratio, inverse), &term), &s) in out.zip(&*terms).zip(s) {
                    *ratio = F::of(1.0 - term);
                    *inverse = F::of(if s < tiny { 0.0 } else { 1.0 / s });
                }
            }
        }
        (total, present)
    }
}
