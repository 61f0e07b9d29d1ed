//! The sweep over narrow rows, side by side.

use super::super::element::Element;
use super::super::isa::{Isa, Kernel};
use super::super::lanes::{
    LANES, Lanes, Narrow, Softmax, Split, Tile, add, argmax, room, split, tiles, write_labels,
};
use super::super::real::Real;
use super::{Goal, OFFSET, Sweep};

impl<E: Element> Kernel for Narrow<Sweep<'_, E>> {
    type Output = f64;

    #[inline(always)]
    fn run<I: Isa>(self) -> Self::Output {
        let Self(mut sweep) = self;
        let cols = sweep.logits.cols();
        let (mut main, mut adversarial) = (Tile::new(cols), room(cols));
        let mut grad = Tile::new(cols);
        let mut total = [0.0; LANES];
        for (rows, here) in tiles(sweep.range.clone()) {
            sweep.main.side_by_side(rows.clone(), &mut main);
            let (_, label) = argmax(&main);
            write_labels(&label, &mut sweep.out.labels[here.clone()]);
            let p = Softmax::of::<I, _>(&sweep.logits, rows, E::Acc::ONE, &mut adversarial);
            let split = split(p.z, p.exp, &label);
            let (values, factor) = match sweep.goal {
                Goal::Agree => agreement::<I, _>(&p.max, &split),
                Goal::Disagree => disagreement::<I, _>(&split),
            };
            add(&mut total, &values, here.len());
            if let Some(out) = sweep.out.grad.as_deref_mut() {
                split.gradient(p.exp, &factor.map(|f| f * sweep.weight), &mut grad);
                grad.put_back(out, here);
            }
        }
        total.iter().sum()
    }
}

/// The loss of each row, and [`Goal::slope`] divided by `sum_c e^{z_c - max}`.
#[inline(always)]
fn agreement<I: Isa, F: Real>(max: &Lanes<F>, split: &Split<F>) -> (Lanes<f64>, Lanes<f64>) {
    let mut factors = [0.0; LANES];
    for k in 0..LANES {
        factors[k] = 1.0 / (split.own[k] + split.others[k]);
    }
    (split.cross_entropy::<I>(max), factors)
}

/// As [`agreement`].
#[inline(always)]
fn disagreement<I: Isa, F: Real>(split: &Split<F>) -> (Lanes<f64>, Lanes<f64>) {
    let (mut values, mut factors) = ([0.0; LANES], [0.0; LANES]);
    for k in 0..LANES {
        let total = split.own[k] + split.others[k];
        let (p, u) = (split.own[k] / total, split.others[k] / total + OFFSET);
        let clamped = p < OFFSET;
        // The form that does not cancel.
        let accurate = if p < 0.5 { 1.0 + (OFFSET - p) } else { u };
        values[k] = -Real::ln::<I>(if clamped { 1.0 } else { accurate });
        factors[k] = if clamped { 0.0 } else { -p / u / total };
    }
    (values, factors)
}
