//! The sweep over narrow rows, side by side.

use super::super::element::{Element, round_to};
use super::super::isa::{Isa, Kernel};
use super::super::lanes::{LANES, Narrow, Softmax, Tile, add, difference, each_lane, room, tiles};
use super::super::real::Real;
use super::super::softmax::confidence;
use super::Sweep;

impl<E: Element> Kernel for Narrow<Sweep<'_, E>> {
    type Output = (f64, usize);

    #[inline(always)]
    fn run<I: Isa>(self) -> Self::Output {
        let Self(mut sweep) = self;
        let cols = sweep.strong.cols();
        let threshold = round_to::<E>(E::Acc::of(sweep.threshold));
        let inverse_t = E::Acc::of(1.0 / sweep.temperature);
        let (mut strong, mut weak) = (room(cols), room(cols));
        let mut grad = Tile::new(cols);
        let (mut total, mut selected) = ([0.0; LANES], 0);
        for (rows, here) in tiles(sweep.range.clone()) {
            let q = Softmax::of::<I, _>(&sweep.weak, rows.clone(), E::Acc::ONE, &mut weak);
            let mut mask = [0.0; LANES];
            for k in 0..LANES {
                let confident = confidence::<E>(q.total[k]) > threshold;
                mask[k] = if confident { 1.0 } else { 0.0 };
            }
            selected += mask[..here.len()].iter().filter(|&&m| m > 0.0).count();

            let p = Softmax::of::<I, _>(&sweep.strong, rows, inverse_t, &mut strong);
            let mut cross = [0.0; LANES];
            for ((y, e), z) in q.z.iter().zip(&*q.exp).zip(p.z) {
                each_lane(|k| {
                    // q ln q is defined as 0 at q = 0; q ln p is not, and NaN where p = 0 too, as in tllib.
                    let log = y[k] - q.max[k];
                    let ln_q = if e[k] == E::Acc::ZERO {
                        E::Acc::ZERO
                    } else {
                        log
                    };
                    let term = e[k] * (ln_q - (z[k] - p.max[k]) * inverse_t);
                    cross[k] += term.to_f64();
                });
            }
            let (mut values, mut of_p, mut of_q) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
            let factor = sweep.scale / sweep.temperature;
            for k in 0..LANES {
                let norms = Real::ln::<I>(p.total[k]) - Real::ln::<I>(q.total[k]);
                // The mask multiplies: 0 times a non-finite loss or gradient is NaN.
                values[k] = mask[k] * (cross[k] / q.total[k] + norms);
                of_p[k] = mask[k] * (factor / p.total[k]);
                of_q[k] = mask[k] * (factor / q.total[k]);
            }
            add(&mut total, &values, here.len());
            if let Some(out) = sweep.grad.as_deref_mut() {
                difference((p.exp, &of_p), (q.exp, &of_q), &mut grad);
                grad.put_back(out, here);
            }
        }
        (total.iter().sum(), selected)
    }
}
