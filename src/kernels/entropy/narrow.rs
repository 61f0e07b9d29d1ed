//! The sweep over narrow rows, side by side.

use super::super::element::Element;
use super::super::isa::{Isa, Kernel};
use super::super::lanes::{LANES, Narrow, Tile, each_lane, tiles};
use super::super::mcc::ENTROPY_EPSILON;
use super::super::real::Real;
use super::Sweep;

impl<E: Element> Kernel for Narrow<Sweep<'_, E>> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Self(mut sweep) = self;
        let cols = sweep.p.cols();
        let (epsilon, weight) = (E::Acc::of(ENTROPY_EPSILON), E::Acc::of(-sweep.weight));
        let (mut p, mut grad) = (Tile::new(cols), Tile::new(cols));
        for (rows, here) in tiles(sweep.range.clone()) {
            sweep.p.side_by_side(rows, &mut p);
            let mut sum = [E::Acc::ZERO; LANES];
            for (p, grad) in p.iter().zip(grad.iter_mut()) {
                let mut slope = *grad;
                each_lane(|k| {
                    let shifted = p[k] + epsilon;
                    let log = shifted.ln::<I>();
                    sum[k] += -p[k] * log;
                    slope[k] = (log + p[k] / shifted) * weight;
                });
                *grad = slope;
            }
            for (out, sum) in sweep.out[here.clone()].iter_mut().zip(sum) {
                *out = sum.to_f64();
            }
            if let Some(out) = sweep.grad.as_deref_mut() {
                grad.put_back(out, here);
            }
        }
    }
}
