//! The side-by-side sweeps that read narrow rows. The gradient has none: its output would have to be transposed back,
//! which took longer than it saved.

use super::super::element::Element;
use super::super::isa::{Isa, Kernel};
use super::super::lanes::{
    LANES, Lanes, Narrow, Softmax, Tile, each_lane, flush, held, largest, room, set, tiles,
};
use super::super::mcc::weights;
use super::super::real::Real;
use super::super::rows::Rows;
use super::matrix::Block;
use super::{Choice, Pair, Side, Sums};
use std::array::from_fn;

impl<E: Element> Kernel for Narrow<Choice<'_, E>> {
    type Output = Vec<usize>;

    #[inline(always)]
    fn run<I: Isa>(self) -> Vec<usize> {
        let Self(choice) = self;
        let inverse_t = 1.0 / choice.temperature;
        let times = E::Acc::of(inverse_t);
        let mut room = room(choice.weak.cols());
        let mut chosen = Vec::new();
        for (rows, _) in tiles(choice.range.clone()) {
            let softmax = Softmax::of::<I, _>(&choice.weak, rows.clone(), times, &mut room);
            for (k, i) in rows.enumerate() {
                let max = softmax.max[k].to_f64();
                let exact =
                    |z: &Lanes<E::Acc>| ((z[k].to_f64() - max) * inverse_t).exp_nonpositive::<I>();
                if choice.takes(softmax.total[k], || softmax.z.iter().map(exact).sum()) {
                    chosen.push(i);
                }
            }
        }
        chosen
    }
}

/// Reads chosen rows of one side.
struct Tiles<'a, E: Element, F> {
    logits: Rows<'a, E>,
    inverse_t: f64,
    z: Tile<E::Acc>,
    p: Tile<f64>,
    /// What is written.
    out: Tile<F>,
    /// The sum of `w p` in every lane.
    sums: Tile<f64>,
}

impl<'a, E: Element, F: Real> Tiles<'a, E, F> {
    fn new(logits: Rows<'a, E>, temperature: f64) -> Self {
        let cols = logits.cols();
        Self {
            logits,
            inverse_t: 1.0 / temperature,
            z: Tile::new(cols),
            p: Tile::new(cols),
            out: Tile::new(cols),
            sums: Tile::new(cols),
        }
    }

    /// Writes `sqrt(w) p` of at most [`LANES`] rows.
    #[inline(always)]
    fn read<I: Isa>(&mut self, chosen: &[usize], out: &mut [F]) -> [Side; LANES] {
        self.logits.picked_side_by_side(chosen, &mut self.z);
        let max = held(largest(&self.z).map(Real::to_f64));
        let mut total = [0.0; LANES];
        for (z, p) in self.z.iter().zip(self.p.iter_mut()) {
            set(p, |k| {
                ((z[k].to_f64() - max[k]) * self.inverse_t).exp_nonpositive::<I>()
            });
            each_lane(|k| total[k] += p[k]);
        }
        let reciprocal = total.map(|total| 1.0 / total);
        let mut weight = weights::<I, _>(&mut self.p, &reciprocal);
        let root = weight.map(f64::sqrt);
        // The remaining lanes repeat a row.
        weight[chosen.len()..].fill(0.0);
        let columns = self.p.iter().zip(self.out.iter_mut());
        for ((p, out), sum) in columns.zip(self.sums.iter_mut()) {
            set(out, |k| F::of(root[k] * p[k]));
            let before = *sum;
            set(sum, |k| before[k] + weight[k] * p[k]);
        }
        self.out
            .write_rows(&mut out[..chosen.len() * self.out.len()]);
        from_fn(|k| Side {
            max: max[k],
            reciprocal: reciprocal[k],
            root: root[k],
        })
    }
}

impl<E: Element, F: Real> Kernel for Narrow<Block<'_, E, F>> {
    type Output = (Vec<Pair>, Sums);

    #[inline(always)]
    fn run<I: Isa>(self) -> Self::Output {
        let Self(block) = self;
        let (pairs, cols) = (block.pairs, block.pairs.cols());
        let mut weak = Tiles::new(pairs.weak, pairs.temperature);
        let mut strong = Tiles::new(pairs.strong, pairs.temperature);
        let mut found = Vec::with_capacity(block.chosen.len());
        let parts = block
            .a
            .chunks_mut(LANES * cols)
            .zip(block.b.chunks_mut(LANES * cols));
        for (chosen, (a, b)) in block.chosen.chunks(LANES).zip(parts) {
            let sides = (weak.read::<I>(chosen, a), strong.read::<I>(chosen, b));
            for (k, &index) in chosen.iter().enumerate() {
                found.push(Pair {
                    index,
                    weak: sides.0[k],
                    strong: sides.1[k],
                });
            }
        }
        let mut sums = Sums::new(cols);
        flush(&mut weak.sums, &mut sums.weak);
        flush(&mut strong.sums, &mut sums.strong);
        (found, sums)
    }
}
