//! Consistency of the class confusion of weakly and strongly augmented samples, on the `n` of `B`
//! rows whose weak prediction is confident.
//!
//! With `p = softmax(z / T)` of the weak and `p'` of the strong logits, and the entropy weights `w`,
//! `w'` of [`super::mcc`] (constants to the gradient, as is everything weak), the confusion matrices
//! have columns of sum 1:
//!
//! ```text
//! s_b = sum_i w_i p_ib    q_ib = p_ib / s_b    N_ab = sum_i w_i p_ia q_ib    N' likewise
//! D    = N - N'
//! loss = k sum_ab D_ab^2                       k = n / (B C)
//! ```
//!
//! `D` is a sum of `2n` outer products, of differences, so that what is small is computed small:
//!
//! ```text
//! D = U^T V      U = [w p - w' p'; w p]    V = [q'; q - q']    (2n rows of C)
//! ```
//!
//! Two ways lead from there to the loss and to the products that its gradient needs,
//! `X = Q' D^T` and `Y = P' D`; which one is shorter is for the caller to say:
//!
//! ```text
//! C small   form D (C x C)                               sum D^2 = <D, D>
//! C large   form U U^T and V V^T (2n x 2n), never D      sum D^2 = <U U^T, V V^T>
//!           X = (Q' V^T) U    Y = (P' U^T) V
//!
//! h_c      = sum_i w'_i q'_ic Y_ic
//! dL/dp'_ic = -2 k w'_i (X_ic + (Y_ic - h_c) / s'_c)
//! dL/dz'_ic = p'_ic (dL/dp'_ic - sum_k p'_ik dL/dp'_ik) / T
//! ```
//!
//! Rows are computed in f64. A class of probability 0 in all selected rows (tllib: 0/0 = NaN) has a
//! column of zeros.

use super::element::{Element, round_to, stored_scale};
use super::isa::{Isa, Kernel, dispatch};
use super::mcc::entropy;
use super::parallel::{cut, run, split};
use super::real::Real;
use super::reduce;
use super::rows::Rows;
use std::num::NonZeroUsize;
use std::ops::Range;

/// One side of the comparison: weak or strong.
#[derive(Default)]
struct Side {
    /// Probabilities of the selected rows, one after the other.
    p: Vec<f64>,
    /// The weight of each.
    weight: Vec<f64>,
    /// `sum_i w_i p_ic`
    sums: Vec<f64>,
}

/// What one thread found in its rows.
#[derive(Default)]
struct Part {
    /// The rows, relative to its first one.
    rows: Vec<usize>,
    weak: Side,
    strong: Side,
}

/// The selected rows of a batch.
pub struct Selected {
    ranges: Vec<Range<usize>>,
    parts: Vec<Part>,
    cols: usize,
    temperature: f64,
    /// `1 / s_c`, 0 where the class is absent.
    inverse: Vec<f64>,
    /// `1 / s'_c`
    inverse_strong: Vec<f64>,
}

/// Where [`Selected::factors`] writes.
pub struct Factors<'a, F> {
    /// `U`
    pub u: &'a mut [F],
    /// `V`
    pub v: &'a mut [F],
    /// `P'`
    pub strong: &'a mut [F],
}

/// Selects the rows of `weak` whose confidence is at least `threshold` (compared in the storage
/// type), and takes the probabilities of both sides there.
pub fn select<E: Element>(
    weak: Rows<'_, E>,
    strong: Rows<'_, E>,
    temperature: f64,
    threshold: f64,
    threads: NonZeroUsize,
) -> Selected {
    let ranges = split(weak.rows(), threads);
    let jobs: Vec<_> = ranges
        .iter()
        .map(|range| {
            let sweep = Sweep {
                weak,
                strong,
                temperature,
                threshold,
                range: range.clone(),
            };
            move || dispatch(sweep)
        })
        .collect();
    let parts = run(jobs);
    let inverse = |side: fn(&Part) -> &Side| -> Vec<f64> {
        // NaN is not below TINY: it stays in the loss.
        let invert = |s: f64| if s < f64::TINY { 0.0 } else { 1.0 / s };
        let sum = |c: usize| parts.iter().map(|part| side(part).sums[c]).sum();
        (0..weak.cols()).map(|c| invert(sum(c))).collect()
    };
    let (inverse, inverse_strong) = (inverse(|part| &part.weak), inverse(|part| &part.strong));
    Selected {
        ranges,
        parts,
        cols: weak.cols(),
        temperature,
        inverse,
        inverse_strong,
    }
}

struct Sweep<'a, E> {
    weak: Rows<'a, E>,
    strong: Rows<'a, E>,
    temperature: f64,
    threshold: f64,
    range: Range<usize>,
}

impl<E: Element> Kernel for Sweep<'_, E> {
    type Output = Part;

    #[inline(always)]
    fn run<I: Isa>(self) -> Part {
        let cols = self.weak.cols();
        let inverse_t = 1.0 / self.temperature;
        let threshold = round_to::<E>(E::Acc::of(self.threshold));
        let (mut scratch, mut strong_scratch) = (self.weak.scratch(), self.strong.scratch());
        let (mut z, mut p) = (vec![0.0; cols], vec![0.0; cols]);
        let mut part = Part::default();
        part.weak.sums.resize(cols, 0.0);
        part.strong.sums.resize(cols, 0.0);
        for (k, i) in self.range.enumerate() {
            widen(self.weak.row(i, &mut scratch), &mut z);
            let total = exponentials::<I>(&z, inverse_t, &mut p);
            // False for NaN, which selects nothing.
            if round_to::<E>(E::Acc::of(1.0 / total)) >= threshold {
                part.rows.push(k);
                part.weak.push::<I>(&mut p, total);
                widen(self.strong.row(i, &mut strong_scratch), &mut z);
                let total = exponentials::<I>(&z, inverse_t, &mut p);
                part.strong.push::<I>(&mut p, total);
            }
        }
        part
    }
}

#[inline(always)]
fn widen<F: Real>(row: &[F], out: &mut [f64]) {
    for (o, &z) in out.iter_mut().zip(row) {
        *o = z.to_f64();
    }
}

/// `e^((z - max z) / T)` into `p`; returns the sum.
#[inline(always)]
fn exponentials<I: Isa>(z: &[f64], inverse_t: f64, p: &mut [f64]) -> f64 {
    reduce::exp_shifted::<I, _>(z, reduce::max(z), inverse_t, p)
}

impl Side {
    /// Takes a row of exponentials with their sum.
    #[inline(always)]
    fn push<I: Isa>(&mut self, p: &mut [f64], total: f64) {
        let reciprocal = 1.0 / total;
        for p in &mut *p {
            *p *= reciprocal;
        }
        let weight = 1.0 + (-entropy::<I, _>(p)).exp();
        for (sum, &p) in self.sums.iter_mut().zip(&*p) {
            *sum += weight * p;
        }
        self.p.extend_from_slice(p);
        self.weight.push(weight);
    }
}

impl Selected {
    /// How many rows.
    pub fn count(&self) -> usize {
        self.parts.iter().map(|part| part.rows.len()).sum()
    }

    /// Writes `U` and `V` (`2n x C`) and `P'` (`n x C`).
    pub fn factors<F: Real>(&self, out: Factors<'_, F>) {
        let half = self.count() * self.cols;
        let (difference, weighted) = out.u.split_at_mut(half);
        let (strong, moved) = out.v.split_at_mut(half);
        let mut start = 0;
        for part in &self.parts {
            let range = start..start + part.rows.len() * self.cols;
            start = range.end;
            dispatch(WriteFactors {
                all: self,
                part,
                difference: &mut difference[range.clone()],
                weighted: &mut weighted[range.clone()],
                strong: &mut strong[range.clone()],
                moved: &mut moved[range.clone()],
                p: &mut out.strong[range],
            });
        }
    }

    /// Writes the gradient with respect to the strong logits (contiguous, all `B` rows) from
    /// `X` and `Y` (`n x C`), and returns the scale it is stored with.
    pub fn gradient<E: Element, F: Real>(
        &self,
        x: &[F],
        y: &[F],
        factor: f64,
        grad: &mut [E],
    ) -> f64 {
        // From |D|, |Y|, |h| <= 1 and |X_ic| <= sum_b q'_ib.
        let reach = self
            .parts
            .iter()
            .map(|part| self.reach(part))
            .fold(0.0, f64::max);
        let scale = stored_scale::<E>(12.0 * factor * reach / self.temperature);
        let counts: Vec<_> = self
            .parts
            .iter()
            .map(|part| part.rows.len() * self.cols)
            .collect();
        let piece = |k: usize| {
            let start = counts[..k].iter().sum::<usize>();
            start..start + counts[k]
        };
        let mut h = vec![0.0; self.cols];
        for (k, part) in self.parts.iter().enumerate() {
            dispatch(AddMeans {
                all: self,
                part,
                y: &y[piece(k)],
                h: &mut h,
            });
        }
        let (h, factor) = (&h, -2.0 * factor * scale / self.temperature);
        let jobs: Vec<_> = cut(grad, &self.ranges, self.cols)
            .into_iter()
            .enumerate()
            .map(|(k, out)| {
                let (x, y) = (&x[piece(k)], &y[piece(k)]);
                let job = Gradient {
                    all: self,
                    part: &self.parts[k],
                    x,
                    y,
                    h,
                    factor,
                    out,
                };
                move || dispatch(job)
            })
            .collect();
        run(jobs);
        scale
    }

    /// `max_i w'_i sum_b q'_ib`
    fn reach(&self, part: &Part) -> f64 {
        let row = |p: &[f64]| {
            p.iter()
                .zip(&self.inverse_strong)
                .map(|(p, inverse)| p * inverse)
                .sum::<f64>()
        };
        let rows = part
            .strong
            .p
            .chunks_exact(self.cols)
            .zip(&part.strong.weight);
        rows.map(|(p, weight)| weight * row(p)).fold(0.0, f64::max)
    }
}

struct WriteFactors<'a, F> {
    all: &'a Selected,
    part: &'a Part,
    /// `w p - w' p'`
    difference: &'a mut [F],
    /// `w p`
    weighted: &'a mut [F],
    /// `q'`
    strong: &'a mut [F],
    /// `q - q'`
    moved: &'a mut [F],
    /// `p'`
    p: &'a mut [F],
}

impl<F: Real> Kernel for WriteFactors<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let cols = self.all.cols;
        let (inverse, inverse_strong) =
            (&self.all.inverse[..cols], &self.all.inverse_strong[..cols]);
        for k in 0..self.part.rows.len() {
            let row = k * cols..(k + 1) * cols;
            let (w, w_strong) = (self.part.weak.weight[k], self.part.strong.weight[k]);
            let (weak, strong) = (
                &self.part.weak.p[row.clone()],
                &self.part.strong.p[row.clone()],
            );
            let (a, b) = (
                &mut self.difference[row.clone()],
                &mut self.weighted[row.clone()],
            );
            for c in 0..cols {
                let wp = w * weak[c];
                a[c] = F::of(wp - w_strong * strong[c]);
                b[c] = F::of(wp);
            }
            let (q, e) = (&mut self.strong[row.clone()], &mut self.moved[row.clone()]);
            for c in 0..cols {
                let q_strong = strong[c] * inverse_strong[c];
                q[c] = F::of(q_strong);
                e[c] = F::of(weak[c] * inverse[c] - q_strong);
            }
            for (o, &p) in self.p[row].iter_mut().zip(strong) {
                *o = F::of(p);
            }
        }
    }
}

/// Adds `w'_i q'_ic Y_ic` to `h_c`.
struct AddMeans<'a, F> {
    all: &'a Selected,
    part: &'a Part,
    y: &'a [F],
    h: &'a mut [f64],
}

impl<F: Real> Kernel for AddMeans<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let cols = self.all.cols;
        let side = &self.part.strong;
        let rows = side
            .p
            .chunks_exact(cols)
            .zip(self.y.chunks_exact(cols))
            .zip(&side.weight);
        for ((p, y), weight) in rows {
            for (((h, p), y), inverse) in self
                .h
                .iter_mut()
                .zip(p)
                .zip(y)
                .zip(&self.all.inverse_strong)
            {
                *h += weight * p * inverse * y.to_f64();
            }
        }
    }
}

struct Gradient<'a, E, F> {
    all: &'a Selected,
    part: &'a Part,
    x: &'a [F],
    y: &'a [F],
    h: &'a [f64],
    factor: f64,
    out: &'a mut [E],
}

impl<E: Element, F: Real> Kernel for Gradient<'_, E, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let cols = self.all.cols;
        let inverse = &self.all.inverse_strong[..cols];
        let mut slope = vec![0.0; cols];
        self.out.fill(E::store(E::Acc::ZERO));
        for (k, &i) in self.part.rows.iter().enumerate() {
            let row = k * cols..(k + 1) * cols;
            let p = &self.part.strong.p[row.clone()];
            let (x, y) = (&self.x[row.clone()], &self.y[row]);
            for c in 0..cols {
                slope[c] = x[c].to_f64() + (y[c].to_f64() - self.h[c]) * inverse[c];
            }
            let mean = reduce::sum_of_pairs(p, &slope, |p, slope| p * slope);
            let factor = self.factor * self.part.strong.weight[k];
            let out = &mut self.out[i * cols..(i + 1) * cols];
            for ((o, p), slope) in out.iter_mut().zip(p).zip(&slope) {
                *o = E::store(E::Acc::of(factor * p * (slope - mean)));
            }
        }
    }
}

/// `sum_k x_k y_k`
pub fn inner<F: Real>(x: &[F], y: &[F]) -> f64 {
    dispatch(Inner { x, y })
}

struct Inner<'a, F> {
    x: &'a [F],
    y: &'a [F],
}

impl<F: Real> Kernel for Inner<'_, F> {
    type Output = f64;

    #[inline(always)]
    fn run<I: Isa>(self) -> f64 {
        reduce::sum_of_pairs(self.x, self.y, |x, y| x * y)
    }
}

#[cfg(test)]
mod tests;
