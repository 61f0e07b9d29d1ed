//! Consistency of the class confusion of weakly and strongly augmented samples, on the `n` of `B`
//! rows whose weak prediction is confident.
//!
//! With `p = softmax(z / T)` of the weak and `p'` of the strong logits, and the entropy weights `w`,
//! `w'` of [`super::mcc`] (constants to the gradient, as is everything weak), the confusion matrices
//! have columns of sum 1:
//!
//! ```text
//! M_ab = sum_i w_i p_ia p_ib    s_b = sum_i w_i p_ib    N_ab = M_ab / s_b    N' likewise
//! D    = N - N'
//! loss = k sum_ab D_ab^2                                k = n / (B C)
//! ```
//!
//! and with `q' = p' / s'`, `X = Q' D^T` and `Y = P' D`:
//!
//! ```text
//! h_c       = sum_i w'_i q'_ic Y_ic
//! dL/dp'_ic = -2 k w'_i (X_ic + (Y_ic - h_c) / s'_c)
//! dL/dz'_ic = p'_ic (dL/dp'_ic - sum_k p'_ik dL/dp'_ik) / T
//! ```
//!
//! There are two algorithms. [`matrix`] forms `D`; [`gram`] forms products of rows with rows instead, and takes
//! less time and memory where rows are few and classes many. Both process the probabilities some rows or some
//! classes at a time and recompute them when they are needed again, so that only the gradient has the size of
//! the logits. Both work with `a = sqrt(w) p` and `b = sqrt(w') p'`, of which `M` and `M'` are sums of products.
//!
//! Rows are computed in f64. A class of probability 0 in all selected rows (tllib: 0/0 = NaN) has a
//! column of zeros.

mod gram;
mod matrix;
mod narrow;

use super::element::{Element, round_to, stored_scale};
use super::isa::{Isa, Kernel};
use super::lanes;
use super::mcc::ENTROPY_EPSILON;
use super::parallel::{run, split};
use super::real::Real;
use super::reduce;
use super::rows::Rows;
pub use gram::{FEW, gram, room as gram_room};
pub use matrix::matrix;
use std::num::NonZeroUsize;
use std::ops::Range;

/// Bound on the error of a confidence in the computing type, relative to the threshold.
const CLOSE: f64 = 1e-5;
/// The widest rows that are read side by side.
const NARROW: usize = 48;

/// The rows whose confidence is at least `threshold` (compared in the storage type), ascending.
pub fn choose<E: Element>(
    weak: Rows<'_, E>,
    temperature: f64,
    threshold: f64,
    threads: NonZeroUsize,
) -> Vec<usize> {
    let narrow = weak.cols() <= NARROW;
    let jobs: Vec<_> = split(weak.rows(), threads)
        .into_iter()
        .map(|range| {
            let choice = Choice {
                weak,
                temperature,
                threshold,
                range,
            };
            move || lanes::dispatch(choice, narrow)
        })
        .collect();
    run(jobs).concat()
}

struct Choice<'a, E> {
    weak: Rows<'a, E>,
    temperature: f64,
    threshold: f64,
    range: Range<usize>,
}

impl<E: Element> Choice<'_, E> {
    /// Whether a row whose exponentials add up to `total` is chosen. Near the threshold, `exact` computes their
    /// sum in f64.
    #[inline(always)]
    fn takes(&self, mut total: f64, exact: impl FnOnce() -> f64) -> bool {
        let close = (CLOSE + E::EPSILON) * self.threshold;
        if (1.0 / total - self.threshold).abs() <= close {
            total = exact();
        }
        let confidence = round_to::<E>(E::Acc::of(1.0 / total));
        // False for NaN, which selects nothing.
        confidence >= round_to::<E>(E::Acc::of(self.threshold))
    }
}

impl<E: Element> Kernel for Choice<'_, E> {
    type Output = Vec<usize>;

    #[inline(always)]
    fn run<I: Isa>(self) -> Vec<usize> {
        let inverse_t = 1.0 / self.temperature;
        let times = E::Acc::of(inverse_t);
        let mut scratch = self.weak.scratch();
        let mut exact = vec![0.0; self.weak.cols()];
        let mut chosen = Vec::new();
        for i in self.range.clone() {
            let z = self.weak.in_turn(i, &mut scratch);
            let max = reduce::max(z);
            let total = reduce::sum_of(z, |z| ((z - max) * times).exp_nonpositive::<I>());
            let again = || {
                exponentials::<I, _>(z, max.to_f64(), inverse_t, 1.0, &mut exact);
                reduce::sum(&exact)
            };
            if self.takes(total, again) {
                chosen.push(i);
            }
        }
        chosen
    }
}

/// The loss on the chosen rows, of which there is at least one.
#[derive(Clone, Copy)]
pub struct Pairs<'a, E> {
    /// Weak logits.
    pub weak: Rows<'a, E>,
    /// Strong logits, of the same shape.
    pub strong: Rows<'a, E>,
    /// `T`
    pub temperature: f64,
    /// From [`choose`].
    pub chosen: &'a [usize],
    /// Maximum number of threads.
    pub threads: NonZeroUsize,
}

/// What is kept of a row: `p_c = e^{(z_c - max) / T} reciprocal`, and the square root of `w`.
#[derive(Clone, Copy)]
struct Side {
    max: f64,
    reciprocal: f64,
    root: f64,
}

/// What is kept of a chosen row.
#[derive(Clone, Copy)]
struct Pair {
    index: usize,
    weak: Side,
    strong: Side,
}

/// Sums over rows, for each class.
struct Sums {
    /// `s`
    weak: Vec<f64>,
    /// `s'`
    strong: Vec<f64>,
}

/// `1 / s` and `1 / s'`, 0 where the class is absent.
struct Inverse {
    weak: Vec<f64>,
    strong: Vec<f64>,
}

impl<E: Element> Pairs<'_, E> {
    fn cols(&self) -> usize {
        self.weak.cols()
    }

    /// `k`
    fn factor(&self) -> f64 {
        self.chosen.len() as f64 / (self.weak.rows() * self.cols()) as f64
    }

    /// Each thread's range of `count` rows.
    fn shares(&self, count: usize) -> Vec<Range<usize>> {
        split(count, self.threads)
    }

    /// What the stored gradient is multiplied by.
    fn scale(&self, inverse: &Inverse) -> f64 {
        // From |D|, |Y|, |h| <= 1 and |X_ic| <= sum_b q'_ib, where w'_i q'_ib <= 1 and w'_i <= 2.
        let largest = inverse.strong.iter().copied().fold(0.0, f64::max);
        let reach = (2.0 * largest).min(self.cols() as f64);
        stored_scale::<E>(12.0 * self.factor() * reach / self.temperature)
    }

    /// The rows of the gradient that belong to each part of the chosen rows: all up to the start of the next part.
    fn spans(&self, parts: &[Range<usize>]) -> Vec<Range<usize>> {
        let start = |k: usize| match (k, self.chosen.get(k)) {
            (0, _) => 0,
            (_, Some(&i)) => i,
            (_, None) => self.weak.rows(),
        };
        let span = |part: &Range<usize>| start(part.start)..start(part.end);
        parts.iter().map(span).collect()
    }
}

impl Sums {
    fn new(cols: usize) -> Self {
        Self {
            weak: vec![0.0; cols],
            strong: vec![0.0; cols],
        }
    }

    fn add(&mut self, other: &Self) {
        reduce::add(&mut self.weak, &other.weak);
        reduce::add(&mut self.strong, &other.strong);
    }

    /// Whether a class is so rare that a term of its gradient would be out of range of `F`.
    fn rare<F: Real>(&self) -> bool {
        let Inverse { weak, strong } = self.inverse();
        let most = 1.0 / F::TINY.to_f64();
        weak.iter().chain(&strong).any(|&one| one > most)
    }

    fn inverse(&self) -> Inverse {
        // NaN is not below TINY: it stays in the loss.
        let invert = |s: &f64| if *s < f64::TINY { 0.0 } else { 1.0 / s };
        Inverse {
            weak: self.weak.iter().map(invert).collect(),
            strong: self.strong.iter().map(invert).collect(),
        }
    }
}

/// Reads chosen rows.
struct Reader<'a, E: Element> {
    pairs: Pairs<'a, E>,
    inverse_t: f64,
    scratch: Vec<E::Acc>,
    /// `a` of the row that was read last.
    a: Vec<f64>,
    /// `b`
    b: Vec<f64>,
}

impl<'a, E: Element> Reader<'a, E> {
    /// For at most `cols` classes at a time.
    fn new(pairs: Pairs<'a, E>, cols: usize) -> Self {
        Self {
            pairs,
            inverse_t: 1.0 / pairs.temperature,
            scratch: vec![E::Acc::ZERO; cols],
            a: vec![0.0; cols],
            b: vec![0.0; cols],
        }
    }

    /// Reads both sides of a row and adds them to `sums`.
    #[inline(always)]
    fn read<I: Isa>(&mut self, index: usize, sums: &mut Sums) -> Pair {
        let Pairs { weak, strong, .. } = self.pairs;
        let (t, scratch) = (self.inverse_t, &mut self.scratch);
        let z = weak.row(index, scratch);
        let weak = softmax::<I, _>(z, t, &mut self.a, &mut sums.weak);
        let z = strong.row(index, scratch);
        let strong = softmax::<I, _>(z, t, &mut self.b, &mut sums.strong);
        Pair {
            index,
            weak,
            strong,
        }
    }

    /// Reads the classes `range` of both sides of a row again.
    #[inline(always)]
    fn read_again<I: Isa>(&mut self, pair: &Pair, range: Range<usize>) {
        let (t, width) = (self.inverse_t, range.len());
        let (weak, strong) = (
            self.pairs.weak.columns(range.clone()),
            self.pairs.strong.columns(range),
        );
        let scratch = &mut self.scratch[..width];
        let z = weak.row(pair.index, scratch);
        let times = pair.weak.reciprocal * pair.weak.root;
        exponentials::<I, _>(z, pair.weak.max, t, times, &mut self.a[..width]);
        let z = strong.row(pair.index, scratch);
        let times = pair.strong.reciprocal * pair.strong.root;
        exponentials::<I, _>(z, pair.strong.max, t, times, &mut self.b[..width]);
    }
}

/// Writes `times e^{(z_c - max) / T}`.
#[inline(always)]
fn exponentials<I: Isa, F: Real>(z: &[F], max: f64, inverse_t: f64, times: f64, out: &mut [f64]) {
    for (o, &z) in out.iter_mut().zip(z) {
        *o = ((z.to_f64() - max) * inverse_t).exp_nonpositive::<I>() * times;
    }
}

/// Writes `sqrt(w) p`, and adds `w p` to `sums`.
#[inline(always)]
fn softmax<I: Isa, F: Real>(z: &[F], inverse_t: f64, p: &mut [f64], sums: &mut [f64]) -> Side {
    let max = reduce::max(z).to_f64();
    exponentials::<I, _>(z, max, inverse_t, 1.0, p);
    let reciprocal = 1.0 / reduce::sum(p);
    for p in &mut *p {
        *p *= reciprocal;
    }
    let root = (1.0 + (-entropy::<I, _>(p)).exp()).sqrt();
    for (p, sum) in p.iter_mut().zip(sums) {
        *p *= root;
        *sum += root * *p;
    }
    Side {
        max,
        reciprocal,
        root,
    }
}

/// `-sum_c p_c ln(p_c + 1e-5)` of probabilities.
#[inline(always)]
fn entropy<I: Isa, F: Real>(p: &[F]) -> f64 {
    -reduce::sum_of(p, |p| p_ln_p::<I, _>(p))
}

/// `p ln(p + 1e-5)`. The sum in the logarithm is a normal number; where it is NaN, so is the factor in
/// front.
#[inline(always)]
fn p_ln_p<I: Isa, F: Real>(p: F) -> F {
    p * (p + F::of(ENTROPY_EPSILON)).ln_normal::<I>(F::ZERO)
}

#[cfg(test)]
mod tests;
