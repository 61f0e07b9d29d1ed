//! The sums over rows that the loss needs: in the computing type for a few rows, then in f64.

use super::super::isa::Isa;
use super::super::real::Real;
use super::{FLUSH, Row};

/// Per class: `s_c` and `d_c`. Those of several batches add up to those of all their rows.
pub struct Sums {
    /// `s_c`
    pub s: Vec<f64>,
    /// `d_c`
    pub d: Vec<f64>,
}

/// The sums over rows, some rows at a time.
pub(super) struct Totals<F> {
    /// What has not gone to `sums` yet.
    s: Vec<F>,
    d: Vec<F>,
    /// Rows in it.
    rows: usize,
    sums: Sums,
}

impl<F: Real> Totals<F> {
    #[inline(always)]
    pub(super) fn new(cols: usize) -> Self {
        Self {
            s: vec![F::ZERO; cols],
            d: vec![F::ZERO; cols],
            rows: 0,
            sums: Sums {
                s: vec![0.0; cols],
                d: vec![0.0; cols],
            },
        }
    }

    /// At most [`FLUSH`] rows with their probabilities.
    #[inline(always)]
    pub(super) fn add<I: Isa>(&mut self, rows: &[Row<F>], p: &[F]) {
        if self.rows + rows.len() > FLUSH {
            self.flush();
        }
        self.rows += rows.len();
        let cols = self.s.len();
        let (fours, rest) = rows.as_chunks::<4>();
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
            add_four::<I, _>(weights, p, &mut self.s, &mut self.d);
        }
        for (row, p) in rest.iter().zip(p_rest.chunks_exact(cols)) {
            add_one::<I, _>(row.weight, p, &mut self.s, &mut self.d);
        }
    }

    #[inline(always)]
    fn flush(&mut self) {
        let s = self.sums.s.iter_mut().zip(&mut self.s);
        for (sum, part) in s.chain(self.sums.d.iter_mut().zip(&mut self.d)) {
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

/// Adds `w p_c` to `s_c` and `w p_c^2` to `d_c`.
#[inline(always)]
fn add_one<I: Isa, F: Real>(weight: F, p: &[F], s: &mut [F], d: &mut [F]) {
    for ((&p, s), d) in p.iter().zip(s).zip(d) {
        let wp = weight * p;
        *s += wp;
        *d = wp.mul_add::<I>(p, *d);
    }
}

/// [`add_one`] for four rows, whose sums are read and written once.
#[inline(always)]
fn add_four<I: Isa, F: Real>(w: [F; 4], p: [&[F]; 4], s: &mut [F], d: &mut [F]) {
    let rows = p[0].iter().zip(p[1]).zip(p[2]).zip(p[3]);
    for ((s, d), (((&a, &b), &c), &e)) in s.iter_mut().zip(d).zip(rows) {
        let (wa, wb, wc, we) = (w[0] * a, w[1] * b, w[2] * c, w[3] * e);
        *s += (wa + wb) + (wc + we);
        *d += wa.mul_add::<I>(a, wb * b) + wc.mul_add::<I>(c, we * e);
    }
}
