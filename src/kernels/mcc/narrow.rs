//! Both sweeps over narrow rows, side by side. The second one recomputes the probabilities from the logits.

use super::super::element::Element;
use super::super::isa::{Isa, Kernel};
use super::super::lanes::{
    LANES, Lanes, Narrow, Tile, each_lane, exp_shifted, flush, held, largest, set, tiles,
};
use super::super::real::Real;
use super::{ENTROPY_EPSILON, FLUSH, Gradient, LN_2, Row, Sums, Sweep};

/// Above this probability `1 - p` is computed from the others.
const CERTAIN: f64 = 0.5;

impl<E: Element> Kernel for Narrow<Sweep<'_, E>> {
    type Output = (Vec<Row<E::Acc>>, Sums);

    #[inline(always)]
    fn run<I: Isa>(self) -> Self::Output {
        let Self(sweep) = self;
        let cols = sweep.logits.cols();
        let inverse_t = E::Acc::of(1.0 / sweep.temperature);
        let mut kept = Vec::with_capacity(sweep.range.len());
        let (mut z, mut p) = (Tile::new(cols), Tile::new(cols));
        let (mut s, mut e) = (Tile::new(cols), Tile::new(cols));
        let mut sums = Sums {
            s: vec![0.0; cols],
            e: vec![0.0; cols],
        };
        for (tile, (rows, _)) in tiles(sweep.range).enumerate() {
            sweep.logits.side_by_side(rows.clone(), &mut z);
            let largest = held(largest(&z));
            let total = exp_shifted::<I, _>(&z, &largest, inverse_t, &mut p);
            let mut reciprocal = [E::Acc::ZERO; LANES];
            for k in 0..LANES {
                reciprocal[k] = E::Acc::of(1.0 / total[k]);
            }
            let mut weight = weights::<I, _>(&mut p, &reciprocal);
            for k in 0..rows.len() {
                kept.push(Row {
                    weight: weight[k],
                    max: largest[k],
                    reciprocal: reciprocal[k],
                    lead: None,
                });
            }
            // The remaining lanes repeat a row.
            weight[rows.len()..].fill(E::Acc::ZERO);
            let most = reciprocal.iter().fold(E::Acc::ZERO, |a, &r| r.larger(a));
            let (weight, reciprocal) = (held(weight), held(reciprocal));
            let classes = p.iter().zip(s.iter_mut()).zip(e.iter_mut());
            if most < E::Acc::of(CERTAIN) {
                for ((p, s), e) in classes {
                    add::<I, _>(&weight, p, |k| E::Acc::ONE - p[k], s, e);
                }
            } else {
                let others = held(others(&p, &reciprocal));
                for ((p, s), e) in classes {
                    let not = |k: usize| {
                        let (exact, not) = (others[k], E::Acc::ONE - p[k]);
                        if p[k] == reciprocal[k] { exact } else { not }
                    };
                    add::<I, _>(&weight, p, not, s, e);
                }
            }
            if tile % FLUSH == FLUSH - 1 {
                flush(&mut s, &mut sums.s);
                flush(&mut e, &mut sums.e);
            }
        }
        flush(&mut s, &mut sums.s);
        flush(&mut e, &mut sums.e);
        (kept, sums)
    }
}

/// Turns exponentials into probabilities, and returns the weights of the rows.
#[inline(always)]
pub fn weights<I: Isa, F: Real>(p: &mut [Lanes<F>], reciprocal: &Lanes<F>) -> Lanes<F> {
    let reciprocal = held(*reciprocal);
    let mut log2 = [F::ZERO; LANES];
    for p in p {
        let e = *p;
        set(p, |k| e[k] * reciprocal[k]);
        each_lane(|k| log2[k] += p[k] * (p[k] + F::of(ENTROPY_EPSILON)).log2_for_sums::<I>());
    }
    let mut weights = [F::ZERO; LANES];
    for k in 0..LANES {
        weights[k] = F::of(1.0 + Real::exp::<I>(LN_2 * log2[k].to_f64()));
    }
    weights
}

/// `1 - largest` in each lane, where `largest` is the largest probability: the sum of all others.
#[inline(always)]
fn others<F: Real>(p: &[Lanes<F>], largest: &Lanes<F>) -> Lanes<F> {
    let (mut rest, mut ties) = ([F::ZERO; LANES], [-F::ONE; LANES]);
    for p in p {
        each_lane(|k| {
            let lead = p[k] == largest[k];
            rest[k] += if lead { F::ZERO } else { p[k] };
            ties[k] += if lead { F::ONE } else { F::ZERO };
        });
    }
    std::array::from_fn(|k| rest[k] + ties[k] * largest[k])
}

/// Adds `w p` to `s` and `w p (1 - p)` to `e`, where `not` gives `1 - p`.
#[inline(always)]
fn add<I: Isa, F: Real>(
    w: &Lanes<F>,
    p: &Lanes<F>,
    not: impl Fn(usize) -> F,
    s: &mut Lanes<F>,
    e: &mut Lanes<F>,
) {
    let (before, sum) = (*e, *s);
    set(s, |k| sum[k] + w[k] * p[k]);
    set(e, |k| (w[k] * p[k]).mul_add::<I>(not(k), before[k]));
}

impl<E: Element> Kernel for Narrow<Gradient<'_, E>> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Self(sweep) = self;
        let cols = sweep.logits.cols();
        let inverse_t = E::Acc::of(1.0 / sweep.temperature);
        let factor = E::Acc::of(-sweep.scale / (cols as f64 * sweep.temperature));
        let (mut z, mut h, mut grad) = (Tile::new(cols), Tile::new(cols), Tile::new(cols));
        for (rows, here) in tiles(sweep.range) {
            let rest = [E::Acc::ZERO; LANES];
            let (mut weight, mut largest, mut reciprocal) = (rest, rest, rest);
            for (k, row) in sweep.kept[here.clone()].iter().enumerate() {
                weight[k] = factor * row.weight;
                largest[k] = row.max;
                reciprocal[k] = row.reciprocal;
            }
            sweep.logits.side_by_side(rows, &mut z);
            let (largest, reciprocal) = (held(largest), held(reciprocal));
            // The slopes, and that of the largest class: see `gradient_row`.
            let mut at_largest = [E::Acc::ZERO; LANES];
            let classes = z.iter_mut().zip(h.iter_mut());
            for ((z, h), (&ratio, &inverse)) in classes.zip(sweep.ratio.iter().zip(sweep.inverse)) {
                let (mut p, mut slope) = (*z, *h);
                each_lane(|k| {
                    let e = ((p[k] - largest[k]) * inverse_t).exp_nonpositive::<I>();
                    p[k] = e * reciprocal[k];
                    slope[k] = inverse * (p[k] + p[k] - ratio);
                    let kept = at_largest[k];
                    at_largest[k] = if e == E::Acc::ONE { slope[k] } else { kept };
                });
                (*z, *h) = (p, slope);
            }
            let mut total = [E::Acc::ZERO; LANES];
            for (p, h) in z.iter().zip(h.iter_mut()) {
                let slope = *h;
                set(h, |k| p[k] * (slope[k] - at_largest[k]));
                each_lane(|k| total[k] += h[k]);
            }
            let (weight, total) = (held(weight), held(total));
            for ((p, h), grad) in z.iter().zip(h.iter()).zip(grad.iter_mut()) {
                set(grad, |k| weight[k] * p[k].mul_add::<I>(-total[k], h[k]));
            }
            grad.put_back(sweep.out, here);
        }
    }
}
