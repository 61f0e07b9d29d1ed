//! The sweep over narrow rows, side by side.

use super::super::element::Element;
use super::super::isa::{Isa, Kernel};
use super::super::lanes::{LANES, Narrow, columns, stored, tiles};
use super::super::mcc::ENTROPY_EPSILON;
use super::super::real::Real;
use super::super::rows::put_back;
use super::Sweep;

impl<E: Element> Kernel for Narrow<Sweep<'_, E>> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Self(mut sweep) = self;
        let cols = sweep.p.cols();
        let (epsilon, weight) = (E::Acc::of(ENTROPY_EPSILON), E::Acc::of(-sweep.weight));
        let mut p = columns(cols);
        let mut grad = stored(cols);
        for (rows, here) in tiles(sweep.range.clone()) {
            sweep.p.side_by_side(rows, &mut p);
            let mut sum = [E::Acc::ZERO; LANES];
            for (p, grad) in p.iter().zip(&mut grad) {
                for k in 0..LANES {
                    let shifted = p[k] + epsilon;
                    let log = shifted.ln::<I>();
                    sum[k] += -p[k] * log;
                    grad[k] = E::store((log + p[k] / shifted) * weight);
                }
            }
            for (out, sum) in sweep.out[here.clone()].iter_mut().zip(sum) {
                *out = sum.to_f64();
            }
            if let Some(out) = sweep.grad.as_deref_mut() {
                put_back(&grad, out, here);
            }
        }
    }
}
