//! The sweep over narrow rows, side by side.

use super::super::element::{Element, round_to};
use super::super::isa::{Isa, Kernel};
use super::super::lanes::{
    LANES, Lanes, Narrow, Softmax, Tile, add, each_lane, held, room, rounded, split, tiles,
    write_labels,
};
use super::super::real::Real;
use super::super::softmax::confidence as confidence_of;
use super::Sweep;

impl<E: Element> Kernel for Narrow<Sweep<'_, E>> {
    type Output = f64;

    #[inline(always)]
    fn run<I: Isa>(self) -> Self::Output {
        let Self(mut sweep) = self;
        let cols = sweep.logits.cols();
        let same = sweep.logits.same(&sweep.targets);
        let threshold = round_to::<E>(E::Acc::of(sweep.threshold));
        let mut room = room(cols);
        let mut grad = Tile::new(cols);
        let mut total = [0.0; LANES];
        for (rows, here) in tiles(sweep.range.clone()) {
            let q = Softmax::of::<I, _>(&sweep.targets, rows.clone(), E::Acc::ONE, &mut room);
            let (confidence, label) = predictions::<E>(q.exp, &q.total);
            let mut mask = [0.0; LANES];
            for k in 0..LANES {
                mask[k] = if confidence[k] > threshold { 1.0 } else { 0.0 };
            }
            write_labels(&label, &mut sweep.out.labels[here.clone()]);
            for (out, mask) in sweep.out.mask[here.clone()].iter_mut().zip(mask) {
                *out = mask;
            }

            let p = if same {
                q
            } else {
                Softmax::of::<I, _>(&sweep.logits, rows, E::Acc::ONE, &mut room)
            };
            let split = split(p.z, p.exp, &label);
            let (mut values, mut factor) = (split.cross_entropy::<I>(&p.max), [0.0; LANES]);
            for k in 0..LANES {
                // The mask multiplies: 0 times a non-finite loss or gradient is NaN.
                let mask = f64::from(mask[k]);
                values[k] *= mask;
                factor[k] = mask * (sweep.weight / (split.own[k] + split.others[k]));
            }
            add(&mut total, &values, here.len());
            if let Some(out) = sweep.out.grad.as_deref_mut() {
                split.gradient(p.exp, &factor, &mut grad);
                grad.put_back(out, here);
            }
        }
        total.iter().sum()
    }
}

/// The largest probability, as the storage type holds it, and the first class that has it; class 0
/// where they are NaN. From exponentials and their sum.
#[inline(always)]
fn predictions<E: Element>(
    e: &[Lanes<E::Acc>],
    sum: &Lanes<f64>,
) -> (Lanes<E::Acc>, Lanes<E::Acc>) {
    let (mut confidence, mut label) = ([E::Acc::ZERO; LANES], [E::Acc::ZERO; LANES]);
    for k in 0..LANES {
        confidence[k] = confidence_of::<E>(sum[k]);
    }
    let (sum, largest) = (held(rounded(sum)), held(confidence));
    let mut class = E::Acc::of(e.len() as f64);
    for e in e.iter().rev() {
        class = class - E::Acc::ONE;
        each_lane(|k| {
            let tied = round_to::<E>(e[k] / sum[k]) == largest[k];
            label[k] = if tied { class } else { label[k] };
        });
    }
    (confidence, label)
}
