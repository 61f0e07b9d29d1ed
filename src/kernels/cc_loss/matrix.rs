//! The algorithm that forms the `C x C` matrix. A block of rows at a time, it accumulates two sums over all rows, `M`
//! and `M'`, from which everything else follows. They are symmetric, so that
//!
//! ```text
//! D_cd = M_cd / s_d - M'_cd / s'_d    D_dc = M_cd / s_c - M'_cd / s'_c
//! h_c  = sum_d D_dc M'_cd / s'_c
//! X_ic + Y_ic / s'_c = (P' G)_ic      G_cd = D_cd / s'_d + D_dc / s'_c
//! ```

use super::super::Loss;
use super::super::element::Element;
use super::super::isa::{Isa, Kernel, dispatch};
use super::super::lanes;
use super::super::parallel::{cut, run};
use super::super::product::{Multiply, zeros};
use super::super::real::Real;
use super::super::reduce;
use super::{Inverse, NARROW, Pair, Pairs, Reader, Sums, exponentials};

/// Rows that go into a product together.
const ROWS: usize = 128;

/// The loss, with products in `F`; with `grad` (contiguous, of the shape of the logits) also its gradient.
/// `None` where a class is too rare for `F`.
pub fn matrix<E: Element, F: Real, M: Multiply<F>>(
    pairs: Pairs<'_, E>,
    grad: Option<&mut [E]>,
    products: &M,
) -> Result<Option<Loss>, M::Error> {
    let cols = pairs.cols();
    let (height, narrow) = (ROWS.min(pairs.chosen.len()), cols <= NARROW);
    let mut block = vec![F::ZERO; 2 * height * cols];
    // In one piece: of two, an allocator that gives back what is free beyond twice the largest piece would make the
    // system supply both anew in each call.
    let mut both = zeros::<F>(2 * cols * cols);
    let (weak, strong) = both.split_at_mut(cols * cols);
    let mut sums = Sums::new(cols);
    let mut found = Vec::with_capacity(pairs.chosen.len());
    for chosen in pairs.chosen.chunks(ROWS) {
        let size = chosen.len() * cols;
        let (a, b) = block.split_at_mut(height * cols);
        let (a, b) = (&mut a[..size], &mut b[..size]);
        let shares = pairs.shares(chosen.len());
        let jobs: Vec<_> = shares
            .iter()
            .zip(cut(a, &shares, cols))
            .zip(cut(b, &shares, cols))
            .map(|((share, a), b)| {
                let chosen = &chosen[share.clone()];
                let block = Block {
                    pairs,
                    chosen,
                    a,
                    b,
                };
                move || lanes::dispatch(block, narrow)
            })
            .collect();
        for (part, of_part) in run(jobs) {
            found.extend(part);
            sums.add(&of_part);
        }
        // Before the last products: all of them, if there is one block.
        if found.len() == pairs.chosen.len() && sums.rare::<F>() {
            return Ok(None);
        }
        products.outer(a, cols, weak)?;
        products.outer(b, cols, strong)?;
    }
    products.finish(cols, weak);
    products.finish(cols, strong);
    let inverse = sums.inverse();
    let (square, level) = combine(pairs, &inverse, weak, strong, grad.is_some());
    let scale = pairs.scale(&inverse);
    if let Some(grad) = grad {
        let slopes = Slopes {
            pairs,
            matrix: strong,
            level: &level,
            factor: -2.0 * pairs.factor() * scale / pairs.temperature,
        };
        slopes.gradient(&found, &mut block, grad, products)?;
    }
    Ok(Some(Loss {
        value: pairs.factor() * square,
        scale,
    }))
}

/// Writes `a` and `b` of some rows.
pub(super) struct Block<'a, E, F> {
    pub(super) pairs: Pairs<'a, E>,
    pub(super) chosen: &'a [usize],
    pub(super) a: &'a mut [F],
    pub(super) b: &'a mut [F],
}

impl<E: Element, F: Real> Kernel for Block<'_, E, F> {
    type Output = (Vec<Pair>, Sums);

    #[inline(always)]
    fn run<I: Isa>(self) -> Self::Output {
        let cols = self.pairs.cols();
        let mut reader = Reader::new(self.pairs, cols);
        let mut sums = Sums::new(cols);
        let mut found = Vec::with_capacity(self.chosen.len());
        let rows = self
            .a
            .chunks_exact_mut(cols)
            .zip(self.b.chunks_exact_mut(cols));
        for (&index, (a, b)) in self.chosen.iter().zip(rows) {
            found.push(reader.read::<I>(index, &mut sums));
            for (out, &a) in a.iter_mut().zip(&reader.a) {
                *out = F::of(a);
            }
            for (out, &b) in b.iter_mut().zip(&reader.b) {
                *out = F::of(b);
            }
        }
        (found, sums)
    }
}

/// `sum D^2`; where a gradient is `wanted` also `h_c / s'_c`, and `G` in place of `M'`.
fn combine<E: Element, F: Real>(
    pairs: Pairs<'_, E>,
    inverse: &Inverse,
    weak: &[F],
    strong: &mut [F],
    wanted: bool,
) -> (f64, Vec<f64>) {
    let cols = pairs.cols();
    let shares = pairs.shares(cols);
    let jobs: Vec<_> = cut(strong, &shares, cols)
        .into_iter()
        .zip(&shares)
        .map(|(strong, rows)| {
            let job = Combine {
                weak: &weak[rows.start * cols..rows.end * cols],
                strong,
                first: rows.start,
                inverse,
                wanted,
            };
            move || dispatch(job)
        })
        .collect();
    let (mut square, mut level) = (0.0, vec![0.0; cols]);
    for (part, columns) in run(jobs) {
        square += part;
        for (sum, column) in level.iter_mut().zip(columns) {
            *sum += column;
        }
    }
    for (level, inverse) in level.iter_mut().zip(&inverse.strong) {
        // Two multiplications: the square of the inverse may be out of range.
        *level = *level * inverse * inverse;
    }
    (square, level)
}

/// Processes some rows of the matrices.
struct Combine<'a, F> {
    weak: &'a [F],
    strong: &'a mut [F],
    first: usize,
    inverse: &'a Inverse,
    wanted: bool,
}

impl<F: Real> Kernel for Combine<'_, F> {
    type Output = (f64, Vec<f64>);

    #[inline(always)]
    fn run<I: Isa>(self) -> Self::Output {
        let Inverse { weak, strong } = self.inverse;
        let cols = weak.len();
        let (mut squares, mut level) = (vec![0.0; cols], vec![0.0; cols]);
        let rows = self
            .weak
            .chunks_exact(cols)
            .zip(self.strong.chunks_exact_mut(cols));
        for (c, (m, m_strong)) in rows.enumerate() {
            let m_strong = m_strong.iter_mut();
            let columns = weak.iter().zip(strong);
            if !self.wanted {
                for (((m, m_strong), (weak, strong)), square) in
                    m.iter().zip(m_strong).zip(columns).zip(&mut squares)
                {
                    let d = m.to_f64() * weak - m_strong.to_f64() * strong;
                    *square += d * d;
                }
                continue;
            }
            let (of_row, of_row_strong) = (weak[self.first + c], strong[self.first + c]);
            for ((((m, m_strong), (weak, strong)), square), level) in m
                .iter()
                .zip(m_strong)
                .zip(columns)
                .zip(&mut squares)
                .zip(&mut level)
            {
                let (m, shared) = (m.to_f64(), m_strong.to_f64());
                let d = m * weak - shared * strong;
                *square += d * d;
                *level += d * shared;
                let turned = m * of_row - shared * of_row_strong;
                *m_strong = F::of(d * strong + turned * of_row_strong);
            }
        }
        (reduce::sum(&squares), level)
    }
}

/// What the gradient is computed from.
struct Slopes<'a, E, F> {
    pairs: Pairs<'a, E>,
    /// `G`
    matrix: &'a [F],
    /// `h_c / s'_c`
    level: &'a [f64],
    factor: f64,
}

impl<E: Element, F: Real> Slopes<'_, E, F> {
    /// Writes the gradient, some rows at a time, with `block` as scratch space.
    fn gradient<M: Multiply<F>>(
        &self,
        found: &[Pair],
        block: &mut [F],
        grad: &mut [E],
        products: &M,
    ) -> Result<(), M::Error> {
        let cols = self.pairs.cols();
        let height = ROWS.min(found.len());
        let (p, slopes) = block.split_at_mut(height * cols);
        let mut rest = grad;
        let mut done = 0;
        for (turn, found) in found.chunks(ROWS).enumerate() {
            let first = turn * ROWS;
            let (p, slopes) = (
                &mut p[..found.len() * cols],
                &mut slopes[..found.len() * cols],
            );
            let shares = self.pairs.shares(found.len());
            let jobs: Vec<_> = shares
                .iter()
                .zip(cut(p, &shares, cols))
                .map(|(share, p)| {
                    let again = Again {
                        pairs: self.pairs,
                        found: &found[share.clone()],
                        p,
                    };
                    move || dispatch(again)
                })
                .collect();
            run(jobs);
            products.combine(p, self.matrix, cols, false, slopes)?;
            let parts: Vec<_> = shares
                .iter()
                .map(|share| first + share.start..first + share.end)
                .collect();
            let spans = self.pairs.spans(&parts);
            let end = spans.last().map_or(done, |span| span.end);
            let (here, after) = std::mem::take(&mut rest).split_at_mut((end - done) * cols);
            (rest, done) = (after, end);
            let jobs: Vec<_> = shares
                .iter()
                .zip(cut(slopes, &shares, cols))
                .zip(cut(here, &spans, cols).into_iter().zip(&spans))
                .map(|((share, slopes), (out, span))| {
                    let job = Gradient {
                        found: &found[share.clone()],
                        p: &p[share.start * cols..share.end * cols],
                        slopes,
                        level: self.level,
                        factor: self.factor,
                        first: span.start,
                        out,
                    };
                    move || dispatch(job)
                })
                .collect();
            run(jobs);
        }
        Ok(())
    }
}

/// Recomputes `p'` of some rows.
struct Again<'a, E, F> {
    pairs: Pairs<'a, E>,
    found: &'a [Pair],
    p: &'a mut [F],
}

impl<E: Element, F: Real> Kernel for Again<'_, E, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let cols = self.pairs.cols();
        let mut scratch = vec![E::Acc::ZERO; cols];
        let mut exact = vec![0.0; cols];
        let inverse_t = 1.0 / self.pairs.temperature;
        for (pair, p) in self.found.iter().zip(self.p.chunks_exact_mut(cols)) {
            let z = self.pairs.strong.row(pair.index, &mut scratch);
            let side = pair.strong;
            exponentials::<I, _>(z, side.max, inverse_t, side.reciprocal, &mut exact);
            for (p, &exact) in p.iter_mut().zip(&exact) {
                *p = F::of(exact);
            }
        }
    }
}

/// Writes the gradient of some rows, and zeros in those that were not chosen.
struct Gradient<'a, E, F> {
    found: &'a [Pair],
    p: &'a [F],
    /// `(P' G)`
    slopes: &'a mut [F],
    level: &'a [f64],
    factor: f64,
    /// The row that `out` begins with.
    first: usize,
    out: &'a mut [E],
}

impl<E: Element, F: Real> Kernel for Gradient<'_, E, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let cols = self.level.len();
        self.out.fill(E::store(E::Acc::ZERO));
        let rows = self
            .p
            .chunks_exact(cols)
            .zip(self.slopes.chunks_exact_mut(cols));
        for (pair, (p, slopes)) in self.found.iter().zip(rows) {
            for (slope, &level) in slopes.iter_mut().zip(self.level) {
                *slope = F::of(slope.to_f64() - level);
            }
            let mean = F::of(reduce::sum_of_pairs(p, slopes, |p, slope| p * slope));
            let factor = F::of(self.factor * pair.strong.root * pair.strong.root);
            let out = &mut self.out[(pair.index - self.first) * cols..][..cols];
            for ((o, &p), &slope) in out.iter_mut().zip(p).zip(&*slopes) {
                *o = E::store(E::Acc::of((factor * p * (slope - mean)).to_f64()));
            }
        }
    }
}
