//! The sums over rows that the loss needs: in the computing type for a few rows, then in f64.

use super::super::isa::Isa;
use super::super::real::Real;
use super::{FLUSH, Lead, Row};

/// `s_c` and `e_c` per class. The sums of several batches add up to those over all their rows.
pub struct Sums {
    /// `s_c`
    pub s: Vec<f64>,
    /// `e_c`
    pub e: Vec<f64>,
}

impl Sums {
    /// Adds the sums over more rows.
    pub(super) fn add(&mut self, other: &Self) {
        let s = self.s.iter_mut().zip(&other.s);
        for (sum, part) in s.chain(self.e.iter_mut().zip(&other.e)) {
            *sum += part;
        }
    }
}

/// The sums over rows, some rows at a time.
pub(super) struct Totals<F> {
    /// What has not been added to `sums` yet.
    s: Vec<F>,
    e: Vec<F>,
    /// The number of rows in these.
    rows: usize,
    sums: Sums,
}

impl<F: Real> Totals<F> {
    #[inline(always)]
    pub(super) fn new(cols: usize) -> Self {
        Self {
            s: vec![F::ZERO; cols],
            e: vec![F::ZERO; cols],
            rows: 0,
            sums: Sums {
                s: vec![0.0; cols],
                e: vec![0.0; cols],
            },
        }
    }

    /// Adds at most [`FLUSH`] rows with their probabilities.
    #[inline(always)]
    pub(super) fn add<I: Isa>(&mut self, rows: &[Row<F>], p: &[F]) {
        if self.rows + rows.len() > FLUSH {
            self.flush();
        }
        self.rows += rows.len();
        let cols = self.s.len();
        let (fours, rest) = rows.as_chunks::<4>();
        let p_rows = p.chunks_exact(cols);
        let (p_fours, p_rest) = p.split_at(4 * fours.len() * cols);
        for (rows, p) in fours.iter().zip(p_fours.chunks_exact(4 * cols)) {
            let weights = [
                rows[0].weight,
                rows[1].weight,
                rows[2].weight,
                rows[3].weight,
            ];
            let row = |k: usize| &p[k * cols..(k + 1) * cols];
            let p = [row(0), row(1), row(2), row(3)];
            add_four::<I, _>(weights, p, &mut self.s, &mut self.e);
        }
        for (row, p) in rest.iter().zip(p_rest.chunks_exact(cols)) {
            add_one::<I, _>(row.weight, p, &mut self.s, &mut self.e);
        }
        for (row, p) in rows.iter().zip(p_rows) {
            let Some(Lead { class, others }) = row.lead else {
                continue;
            };
            // What 1 - p has lost to rounding.
            let p = p[class];
            self.e[class] += row.weight * p * (others - (F::ONE - p));
        }
    }

    #[inline(always)]
    fn flush(&mut self) {
        let s = self.sums.s.iter_mut().zip(&mut self.s);
        for (sum, part) in s.chain(self.sums.e.iter_mut().zip(&mut self.e)) {
            *sum += part.to_f64();
            *part = F::ZERO;
        }
        self.rows = 0;
    }

    #[inline(always)]
    pub(super) fn sums(mut self) -> Sums {
        self.flush();
        self.sums
    }
}

/// Adds `w p_c` to `s_c` and `w p_c (1 - p_c)` to `e_c`.
#[inline(always)]
fn add_one<I: Isa, F: Real>(weight: F, p: &[F], s: &mut [F], e: &mut [F]) {
    for ((&p, s), e) in p.iter().zip(s).zip(e) {
        let wp = weight * p;
        *s += wp;
        *e = wp.mul_add::<I>(F::ONE - p, *e);
    }
}

/// [`add_one`] for four rows, whose sums are read and written once.
#[inline(always)]
fn add_four<I: Isa, F: Real>(w: [F; 4], p: [&[F]; 4], s: &mut [F], e: &mut [F]) {
    let rows = p[0].iter().zip(p[1]).zip(p[2]).zip(p[3]);
    let not = |p: F| F::ONE - p;
    for ((s, e), (((&p, &q), &r), &t)) in s.iter_mut().zip(e).zip(rows) {
        let (wp, wq, wr, wt) = (w[0] * p, w[1] * q, w[2] * r, w[3] * t);
        *s += (wp + wq) + (wr + wt);
        *e += wp.mul_add::<I>(not(p), wq * not(q)) + wr.mul_add::<I>(not(r), wt * not(t));
    }
}
