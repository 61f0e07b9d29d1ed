//! The sweep over narrow rows, many at a time; their sums are taken side by side.

use super::super::element::Element;
use super::super::isa::{Isa, Kernel};
use super::super::lanes::{Narrow, sums_of_squares};
use super::super::real::Real;
use super::super::rows::store_row;
use super::Sweep;

impl<E: Element> Kernel for Narrow<Sweep<'_, E>> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Self(Sweep {
            a,
            b,
            mask,
            factor,
            range,
            mut out,
        }) = self;
        let cols = a.cols();
        let ((group, mut scratch_a), (_, mut scratch_b)) = (a.groups(), b.groups());
        let mut difference = vec![E::Acc::ZERO; group * cols];
        for start in range.clone().step_by(group) {
            let rows = start..range.end.min(start + group);
            let here = start - range.start..rows.end - range.start;
            let a = a.block(rows.clone(), &mut scratch_a);
            let b = b.block(rows.clone(), &mut scratch_b);
            let difference = &mut difference[..a.len()];
            for ((d, &a), &b) in difference.iter_mut().zip(a).zip(b) {
                *d = a - b;
            }
            sums_of_squares(difference, &mut out.distances[here.clone()]);
            for (grad, factor) in [(&mut out.grad_a, factor), (&mut out.grad_b, -factor)] {
                let Some(grad) = grad.as_deref_mut() else {
                    continue;
                };
                let grad = &mut grad[here.start * cols..here.end * cols];
                let Some(mask) = mask else {
                    store_row(difference, E::Acc::of(2.0 * factor), grad);
                    continue;
                };
                let each = grad
                    .chunks_exact_mut(cols)
                    .zip(difference.chunks_exact(cols));
                for ((grad, difference), m) in each.zip(&mask[rows.clone()]) {
                    store_row(difference, E::Acc::of(2.0 * factor * m), grad);
                }
            }
        }
    }
}
