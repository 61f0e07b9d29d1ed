//! The sweep over narrow rows, side by side.

use super::super::super::element::Element;
use super::super::super::isa::{Isa, Kernel};
use super::super::super::lanes::{
    LANES, Lanes, Narrow, Softmax, Tile, add, at_label, difference, each_lane, held, room, split,
    tiles,
};
use super::super::super::real::Real;
use super::{Sweep, Targets};

impl<E: Element> Kernel for Narrow<Sweep<'_, '_, E>> {
    type Output = f64;

    #[inline(always)]
    fn run<I: Isa>(self) -> Self::Output {
        let Self(mut sweep) = self;
        let cols = sweep.logits.cols();
        let (mut own, mut other) = (room(cols), room(cols));
        let mut grad = Tile::new(cols);
        let mut total = [0.0; LANES];
        for (rows, here) in tiles(sweep.range.clone()) {
            let mut p = Softmax::of::<I, _>(&sweep.logits, rows.clone(), E::Acc::ONE, &mut own);
            // A copy: in place, half of the sums would be kept in memory while they are made.
            p.total = held(p.total);
            let wanted = sweep.grad.is_some().then_some(&mut grad[..]);
            let values = match sweep.targets {
                Targets::Logits(targets) => {
                    let q = Softmax::of::<I, _>(&targets, rows, E::Acc::ONE, &mut other);
                    soft::<I, _>(&p, &q, sweep.weight, wanted)
                }
                Targets::Smooth { labels, hit, rest } => {
                    let mut label = [E::Acc::ZERO; LANES];
                    for (label, &index) in label.iter_mut().zip(&labels[rows]) {
                        *label = E::Acc::of(index as f64);
                    }
                    smooth::<I, _>(p, (&label, hit, rest), sweep.weight, wanted)
                }
            };
            add(&mut total, &values, here.len());
            if let Some(out) = sweep.grad.as_deref_mut() {
                grad.put_back(out, here);
            }
        }
        total.iter().sum()
    }
}

/// As [`soft_row`](super::soft_row), for each lane.
#[inline(always)]
fn soft<I: Isa, F: Real>(
    p: &Softmax<'_, F>,
    q: &Softmax<'_, F>,
    weight: f64,
    grad: Option<&mut [Lanes<F>]>,
) -> Lanes<f64> {
    let mut cross = [0.0; LANES];
    for (q, z) in q.exp.iter().zip(p.z) {
        each_lane(|k| {
            let term = q[k] * (z[k] - p.max[k]);
            cross[k] += term.to_f64();
        });
    }
    let (mut values, mut of_p, mut of_q) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
    for k in 0..LANES {
        let (p_total, q_total) = (p.total[k], q.total[k]);
        values[k] = Real::ln::<I>(p_total) - cross[k] / q_total;
        of_p[k] = weight / p_total;
        of_q[k] = weight / q_total;
    }
    if let Some(grad) = grad {
        difference((p.exp, &of_p), (q.exp, &of_q), grad);
    }
    values
}

/// Corrects the sums `sum_c t_c (z_c - max)` in the lanes where the logit of the label is not finite: that class counts
/// once, with all of its target.
#[cold]
#[inline(never)]
fn correct<F: Real>(
    z: &[Lanes<F>],
    max: &Lanes<F>,
    (label, hit, rest): (&Lanes<F>, f64, f64),
    logit: &Lanes<F>,
    logs: &mut Lanes<f64>,
) {
    for k in (0..LANES).filter(|&k| !logit[k].finite()) {
        let label = label[k].to_f64() as usize;
        let columns = z.iter().enumerate().filter(|&(c, _)| c != label);
        let others: f64 = columns.map(|(_, z)| (z[k] - max[k]).to_f64()).sum();
        logs[k] = (hit + rest) * logit[k].to_f64() + rest * others;
    }
}

/// As [`smooth_row`](super::smooth_row), for each lane.
#[inline(always)]
fn smooth<I: Isa, F: Real>(
    p: Softmax<'_, F>,
    (label, hit, rest): (&Lanes<F>, f64, f64),
    weight: f64,
    grad: Option<&mut [Lanes<F>]>,
) -> Lanes<f64> {
    let cols = p.z.len() as f64;
    let mass = hit + rest * cols;
    let mut shifted = [F::ZERO; LANES];
    for z in p.z {
        each_lane(|k| shifted[k] += z[k] - p.max[k]);
    }
    let split = split(p.z, p.exp, label);
    let (mut logit, mut logs) = ([F::ZERO; LANES], [0.0; LANES]);
    let mut finite = true;
    // A call inside the loops over lanes would keep them from vectorizing.
    for k in 0..LANES {
        logit[k] = split.logit[k] - p.max[k];
        logs[k] = hit * logit[k].to_f64() + rest * shifted[k].to_f64();
        finite &= logit[k].finite();
    }
    if !finite {
        // Not all of `p`, whose sums would then be kept in memory.
        correct(p.z, &{ p.max }, (label, hit, rest), &logit, &mut logs);
    }
    let mut values = [0.0; LANES];
    let (mut own, mut of_others) = ([F::ZERO; LANES], [F::ZERO; LANES]);
    for k in 0..LANES {
        let total = split.own[k] + split.others[k];
        values[k] = mass * Real::ln::<I>(total) - logs[k];
        let p_label = split.own[k] / total;
        let direct = mass * p_label - hit - rest;
        // S (p - 1) + (S - t): 1 - p is the sum of the others, which keeps its digits here.
        let by_others = (cols - 1.0) * rest - mass * (split.others[k] / total);
        let at_label = if p_label < 0.5 { direct } else { by_others };
        own[k] = F::of(weight * at_label);
        of_others[k] = F::of(weight * mass / total);
    }
    if let Some(grad) = grad {
        let (constant, of_others) = (F::of(weight * rest), held(of_others));
        let columns = grad.iter_mut().zip(&*p.exp);
        at_label(&held(*label), &held(own), columns, |e, k| {
            e[k] * of_others[k] - constant
        });
    }
    values
}
