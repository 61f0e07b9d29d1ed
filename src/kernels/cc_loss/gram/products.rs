//! The products of rows with rows, and what is computed from them.

use super::super::super::isa::{Isa, Kernel, dispatch};
use super::super::super::mirror::mirror;
use super::super::super::product::{Multiply, zeros};
use super::super::super::reduce;
use super::super::Pair;
use std::num::NonZeroUsize;

/// The products of rows with rows that are needed, `n x n`.
#[derive(Default)]
pub(super) struct Grams {
    rows: usize,
    /// `delta delta^T`
    pub(super) dd: Vec<f64>,
    /// `delta b^T`
    pub(super) db: Vec<f64>,
    /// `b b^T`
    pub(super) bb: Vec<f64>,
    /// `alpha alpha^T`
    pub(super) aa: Vec<f64>,
    /// `alpha epsilon^T`
    pub(super) ae: Vec<f64>,
    /// `epsilon epsilon^T`
    pub(super) ee: Vec<f64>,
}

/// The parenthesized factors of `X` and `Y`.
pub(super) struct Factors {
    /// `Q' alpha^T`
    x_delta: Vec<f64>,
    /// `Q' epsilon^T`
    x_b: Vec<f64>,
    /// `P' delta^T`
    y_alpha: Vec<f64>,
    /// `P' b^T`
    y_epsilon: Vec<f64>,
    rows: usize,
}

impl Grams {
    pub(super) fn new(rows: usize) -> Self {
        let room = || zeros(rows * rows);
        Self {
            rows,
            dd: room(),
            db: room(),
            bb: room(),
            aa: room(),
            ae: room(),
            ee: room(),
        }
    }

    /// Adds the products over other classes.
    pub(super) fn add(&mut self, other: &Self) {
        let sums = [
            &mut self.dd,
            &mut self.db,
            &mut self.bb,
            &mut self.aa,
            &mut self.ae,
            &mut self.ee,
        ];
        let parts = [
            &other.dd, &other.db, &other.bb, &other.aa, &other.ae, &other.ee,
        ];
        for (sums, parts) in sums.into_iter().zip(parts) {
            reduce::add(sums, parts);
        }
    }

    /// Fills the lower triangles of the symmetric products.
    pub(super) fn mirror(&mut self) {
        for of in [&mut self.dd, &mut self.bb, &mut self.aa, &mut self.ee] {
            mirror(of, self.rows, NonZeroUsize::MIN);
        }
    }

    /// `sum D^2`
    pub(super) fn square(&self) -> f64 {
        inner(&self.dd, &self.aa) + 2.0 * inner(&self.db, &self.ae) + inner(&self.bb, &self.ee)
    }

    /// Computes the factors, reusing the memory.
    pub(super) fn factors(self, found: &[Pair]) -> Factors {
        let Self {
            rows,
            dd: mut y_alpha,
            db,
            bb: mut y_epsilon,
            aa: mut x_delta,
            ae: mut x_b,
            ee,
        } = self;
        for (i, pair) in found.iter().enumerate() {
            let inverse = 1.0 / pair.strong.root;
            for j in 0..rows {
                let (at, turned) = (i * rows + j, j * rows + i);
                y_alpha[at] = inverse * db[turned];
                y_epsilon[at] *= inverse;
                x_delta[at] = inverse * (x_delta[at] - x_b[turned]);
            }
        }
        for ((x, ee), pair) in x_b
            .chunks_exact_mut(rows)
            .zip(ee.chunks_exact(rows))
            .zip(found)
        {
            for (x, ee) in x.iter_mut().zip(ee) {
                *x = (*x - ee) / pair.strong.root;
            }
        }
        Factors {
            x_delta,
            x_b,
            y_alpha,
            y_epsilon,
            rows,
        }
    }
}

impl Factors {
    /// Writes `X`.
    pub(super) fn x<M: Multiply<f64>>(
        &self,
        products: &M,
        (delta, b): (&[f64], &[f64]),
        width: usize,
        out: &mut [f64],
    ) -> Result<(), M::Error> {
        products.combine(&self.x_delta, delta, width, false, out)?;
        products.combine(&self.x_b, b, width, true, out)
    }

    /// Writes `Y`.
    pub(super) fn y<M: Multiply<f64>>(
        &self,
        products: &M,
        (alpha, epsilon): (&[f64], &[f64]),
        width: usize,
        out: &mut [f64],
    ) -> Result<(), M::Error> {
        products.combine(&self.y_alpha, alpha, width, false, out)?;
        products.combine(&self.y_epsilon, epsilon, width, true, out)
    }

    /// `sum_k p'_ik X_ik + sum_k q'_ik Y_ik` of each row.
    pub(super) fn sums(&self) -> Vec<f64> {
        let row = |of: &[f64], other: &[f64], i: usize| {
            let place = i * self.rows..(i + 1) * self.rows;
            inner(&of[place.clone()], &other[place])
        };
        let sum = |i| row(&self.x_delta, &self.y_alpha, i) + row(&self.x_b, &self.y_epsilon, i);
        (0..self.rows).map(|i| 2.0 * sum(i)).collect()
    }
}

/// `sum_k x_k y_k`
fn inner(x: &[f64], y: &[f64]) -> f64 {
    dispatch(Inner { x, y })
}

struct Inner<'a> {
    x: &'a [f64],
    y: &'a [f64],
}

impl Kernel for Inner<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<I: Isa>(self) -> f64 {
        reduce::sum_of_pairs(self.x, self.y, |x, y| x * y)
    }
}
