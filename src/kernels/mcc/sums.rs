//! The sums over rows that the loss needs: in the computing type for a few rows, then in f64.

use super::super::isa::{Isa, Kernel, dispatch};
use super::super::parallel::{cut, run, split_classes};
use super::super::real::Real;
use super::super::reduce;
use super::{FLUSH, Lead, Row};

/// `s_c` and `e_c` per class. The sums of several batches add up to those over all their rows.
#[derive(Default)]
pub struct Sums {
    /// `s_c`
    pub s: Vec<f64>,
    /// `e_c`
    pub e: Vec<f64>,
}

impl Sums {
    /// The sums over all rows, from those over parts of them, with at most as many threads as there are parts.
    pub(super) fn of(mut parts: Vec<Self>) -> Self {
        let threads = parts.len();
        let mut sums = parts.swap_remove(0);
        if parts.is_empty() {
            return sums;
        }
        let ranges = split_classes(sums.s.len(), threads);
        let jobs: Vec<_> = cut(&mut sums.s, &ranges, 1)
            .into_iter()
            .zip(cut(&mut sums.e, &ranges, 1))
            .zip(ranges)
            .map(|((s, e), range)| {
                let parts = &parts;
                move || {
                    for part in parts {
                        let parts = [&part.s[range.clone()], &part.e[range.clone()]];
                        dispatch(Add([&mut *s, &mut *e], parts));
                    }
                }
            })
            .collect();
        run(jobs);
        sums
    }
}

/// Adds numbers to others.
struct Add<'a, 'b>([&'a mut [f64]; 2], [&'b [f64]; 2]);

impl Kernel for Add<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        for (sums, parts) in self.0.into_iter().zip(self.1) {
            reduce::add(sums, parts);
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
    /// Empty before the first time.
    sums: Sums,
}

impl<F: Real> Totals<F> {
    #[inline(always)]
    pub(super) fn new(cols: usize) -> Self {
        Self {
            s: vec![F::ZERO; cols],
            e: vec![F::ZERO; cols],
            rows: 0,
            sums: Sums::default(),
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
        self.rows = 0;
        if self.sums.s.is_empty() {
            self.sums = Sums {
                s: widened(&self.s),
                e: widened(&self.e),
            };
            self.s.fill(F::ZERO);
            self.e.fill(F::ZERO);
            return;
        }
        let s = self.sums.s.iter_mut().zip(&mut self.s);
        for (sum, part) in s.chain(self.sums.e.iter_mut().zip(&mut self.e)) {
            *sum += part.to_f64();
            *part = F::ZERO;
        }
    }

    #[inline(always)]
    pub(super) fn sums(mut self) -> Sums {
        self.flush();
        self.sums
    }
}

#[inline(always)]
fn widened<F: Real>(part: &[F]) -> Vec<f64> {
    part.iter().map(|x| x.to_f64()).collect()
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
