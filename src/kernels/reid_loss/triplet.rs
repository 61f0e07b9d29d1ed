//! Triplet losses over mined pairs.
//!
//! With the distances `a_i` of anchor `i` to its hardest positive and `b_i` to its hardest negative
//! and `t_i = a_i - b_i`, a loss is the mean over the anchors of
//!
//! ```text
//! hinge    max(0, t + margin)                                   dl/dt = [t + margin >= 0]
//! soft     -r ln sigma(t) - (1 - r) ln sigma(-t)                dl/dt = sigma(t) - r
//! ```
//!
//! where `r` is the margin, or `sigma(t')` of a teacher's distances of the same pairs. As
//! `dl/da = -dl/db = dl/dt`, only these `2N` pairs carry gradient: with `d = |u - v|`,
//! `dd/du = -dd/dv = (u - v) / d`, and 0 where the squared distance was clamped.
//!
//! With normalization `u = x / max(|x|, 1e-12)` the gradient propagates as
//! `dL/dx = (g - u (u.g)) / |x|`, and as `g / 1e-12` where the norm was raised.

use super::super::Loss;
use super::super::element::Element;
use super::super::isa::{Isa, Kernel, dispatch};
use super::super::parallel::{cut, run, split};
use super::super::real::Real;
use super::super::reduce;
use super::super::rows::{Rows, store_row};
use super::mining::{Found, Hardest};
use super::{CLAMP, OFFSET, SMALLEST_NORM, distance, squared_distance};
use std::num::NonZeroUsize;
use std::ops::{Range, RangeInclusive};

/// Independent sums of an inner product.
const SUMS: usize = 32;
/// So many pulls on a row are added up in the computing type, in which the differences were rounded already.
const FEW: usize = 16;
/// Weights whose products neither overflow nor underflow in any computing type.
const MODERATE: RangeInclusive<f64> = 1e-30..=1e30;

/// Which loss.
#[derive(Clone, Copy, Debug)]
pub enum Objective {
    /// Hinge with this margin.
    Hinge(f64),
    /// Soft, with this constant in place of a teacher.
    Margin(f64),
    /// Soft, with a teacher's reference.
    Taught,
}

/// An anchor's loss, and its derivative with respect to `t`.
fn term(objective: Objective, t: f64, reference: f64) -> (f64, f64) {
    let r = match objective {
        Objective::Hinge(margin) => {
            let hinge = t + margin;
            // The derivative at 0 is 1, as in torch's clamp_min. NaN propagates.
            return if hinge < 0.0 {
                (0.0, 0.0)
            } else {
                (hinge, if hinge.is_nan() { hinge } else { 1.0 })
            };
        }
        Objective::Margin(margin) => margin,
        Objective::Taught => reference,
    };
    let tail = (-t.abs()).exp();
    let both = tail.ln_1p();
    // ln sigma(t) and ln sigma(-t), neither of which cancels.
    let (own, other) = (0f64.min(t) - both, 0f64.min(-t) - both);
    let (own, other) = if t.is_nan() { (t, t) } else { (own, other) };
    // sigma - r from whichever of sigma(t), sigma(-t) is small.
    let small = tail / (1.0 + tail);
    let slope = if t < 0.0 {
        small - r
    } else {
        (1.0 - r) - small
    };
    (-r * own - (1.0 - r) * other, slope)
}

/// `sigma(t')` for each anchor: the teacher's view of the student's pairs, from its own `features`.
pub fn references<F: Element<Acc = F> + Real>(
    features: Rows<'_, F>,
    hardest: &[Hardest],
    threads: NonZeroUsize,
) -> Vec<f64> {
    let mut out = vec![0.0; hardest.len()];
    let ranges = split(hardest.len(), threads);
    let jobs: Vec<_> = cut(&mut out, &ranges, 1)
        .into_iter()
        .zip(ranges)
        .map(|(out, range)| {
            let view = Teacher {
                features,
                hardest,
                range,
                out,
            };
            move || dispatch(view)
        })
        .collect();
    run(jobs);
    out
}

struct Teacher<'a, 'b, F> {
    features: Rows<'a, F>,
    hardest: &'a [Hardest],
    range: Range<usize>,
    out: &'b mut [f64],
}

impl<F: Element<Acc = F> + Real> Kernel for Teacher<'_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        for (i, out) in self.range.zip(self.out) {
            // Without tllib's offset for a missing candidate, which its teacher does not see either.
            let Hardest { positive, negative } = self.hardest[i];
            let t = between(self.features, i, positive) - between(self.features, i, negative);
            *out = 1.0 / (1.0 + (-t).exp());
        }
    }
}

/// The distance of row `i` from what was found for it. A function: a closure would be compiled separately
/// from the kernel, without its instruction set.
#[inline(always)]
fn between<F: Element<Acc = F> + Real>(features: Rows<'_, F>, i: usize, found: Found) -> f64 {
    let (x, y) = (features.row(i, &mut []), features.row(found.index, &mut []));
    distance(squared_distance(x, y))
}

/// A pair as the gradient sees it: `dL/du = weight (u - v)`.
#[derive(Clone, Copy)]
struct Pull {
    anchor: u32,
    candidate: u32,
    weight: f64,
}

/// The pairs that carry gradient, ordered by anchor and by candidate.
pub struct Pulls {
    pairs: Vec<Pull>,
    /// Where each anchor's pairs begin in `pairs`.
    anchor_starts: Vec<u32>,
    /// Indices into `pairs` by candidate, and where each candidate's begin.
    by_candidate: Vec<u32>,
    candidate_starts: Vec<u32>,
}

/// The loss of the mined pairs. `reference` has one value an anchor where the objective is taught.
pub fn loss(
    objective: Objective,
    hardest: &[Hardest],
    reference: &[f64],
    candidates: usize,
) -> (f64, Pulls) {
    let count = hardest.len();
    let mut total = 0.0;
    let mut pairs = Vec::with_capacity(2 * count);
    let mut anchor_starts = Vec::with_capacity(count + 1);
    for (i, &Hardest { positive, negative }) in hardest.iter().enumerate() {
        anchor_starts.push(pairs.len() as u32);
        let a = distance(positive.square) - if positive.missing { OFFSET } else { 0.0 };
        let b = distance(negative.square) + if negative.missing { OFFSET } else { 0.0 };
        let (value, slope) = term(objective, a - b, reference.get(i).copied().unwrap_or(0.0));
        total += value;
        let slope = slope / count as f64;
        for (found, slope) in [(positive, slope), (negative, -slope)] {
            // Skips clamped distances and pairs without weight; NaN is neither, and propagates.
            if !(found.square < CLAMP) && slope != 0.0 {
                let weight = slope / distance(found.square);
                pairs.push(Pull {
                    anchor: i as u32,
                    candidate: found.index as u32,
                    weight,
                });
            }
        }
    }
    anchor_starts.push(pairs.len() as u32);
    let mut candidate_starts = vec![0u32; candidates + 1];
    for pair in &pairs {
        candidate_starts[pair.candidate as usize + 1] += 1;
    }
    for j in 0..candidates {
        candidate_starts[j + 1] += candidate_starts[j];
    }
    let mut next = candidate_starts.clone();
    let mut by_candidate = vec![0; pairs.len()];
    for (k, pair) in pairs.iter().enumerate() {
        let place = &mut next[pair.candidate as usize];
        by_candidate[*place as usize] = k as u32;
        *place += 1;
    }
    (
        total / count as f64,
        Pulls {
            pairs,
            anchor_starts,
            by_candidate,
            candidate_starts,
        },
    )
}

/// Whose gradient is wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Of rows that are only anchors.
    Anchors,
    /// Of rows that are only candidates.
    Candidates,
    /// Of rows that are both.
    Both,
}

/// The gradient with respect to one side.
#[derive(Clone, Copy)]
pub struct Gradient<'a, F> {
    /// `u`
    pub anchors: Rows<'a, F>,
    /// `v`
    pub candidates: Rows<'a, F>,
    /// From [`loss`].
    pub pulls: &'a Pulls,
    /// The side.
    pub role: Role,
    /// The norms that its rows were divided by, if any.
    pub norms: Option<&'a [f64]>,
}

impl<F: Element<Acc = F> + Real> Gradient<'_, F> {
    /// Writes it, times [`Loss::scale`] of `loss`, into the contiguous `out`.
    pub fn store<E: Element<Acc = F>>(self, loss: Loss, out: &mut [E], threads: NonZeroUsize) {
        let side = if self.role == Role::Candidates {
            self.candidates
        } else {
            self.anchors
        };
        let ranges = split(side.rows(), threads);
        let jobs: Vec<_> = cut(out, &ranges, side.cols())
            .into_iter()
            .zip(ranges)
            .map(|(out, range)| {
                let sweep = Sweep {
                    gradient: self,
                    side,
                    scale: loss.scale,
                    range,
                    out,
                };
                move || dispatch(sweep)
            })
            .collect();
        run(jobs);
    }
}

struct Sweep<'a, 'b, F, E> {
    gradient: Gradient<'a, F>,
    side: Rows<'a, F>,
    scale: f64,
    range: Range<usize>,
    out: &'b mut [E],
}

impl<F: Element<Acc = F> + Real, E: Element<Acc = F>> Kernel for Sweep<'_, '_, F, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Gradient {
            anchors,
            candidates,
            pulls,
            role,
            norms,
        } = self.gradient;
        let dim = self.side.cols();
        let (mut few, mut many) = (vec![F::ZERO; dim], Vec::new());
        let mut spare = vec![F::ZERO; dim];
        let mut pulling: Vec<(Rows<'_, F>, u32, f64)> = Vec::new();
        let rows = self.range.zip(self.out.chunks_exact_mut(dim));
        for (k, out) in rows {
            let own = self.side.row(k, &mut []);
            pulling.clear();
            if role != Role::Candidates {
                let pairs = &pulls.pairs[starts(&pulls.anchor_starts, k)];
                pulling.extend(pairs.iter().map(|p| (candidates, p.candidate, p.weight)));
            }
            if role != Role::Anchors {
                let pairs = &pulls.by_candidate[starts(&pulls.candidate_starts, k)];
                let pairs = pairs.iter().map(|&p| pulls.pairs[p as usize]);
                pulling.extend(pairs.map(|p| (anchors, p.anchor, p.weight)));
            }
            let row = Pulled {
                own,
                pulling: &pulling,
                norm: norms.and_then(|norms| norms.get(k)).copied(),
                scale: self.scale,
            };
            if let Some(out) = E::exact_mut(out) {
                row.gradient::<I>(&mut few, &mut many, out);
            } else {
                row.gradient::<I>(&mut few, &mut many, &mut spare);
                store_row(&spare, F::ONE, out);
            }
        }
    }
}

/// A row and what pulls on it.
struct Pulled<'a, F> {
    own: &'a [F],
    /// Rows, of a matrix, with their weights.
    pulling: &'a [(Rows<'a, F>, u32, f64)],
    /// What it was before it was normalized, if it was.
    norm: Option<f64>,
    scale: f64,
}

impl<F: Element<Acc = F> + Real> Pulled<'_, F> {
    /// Whether the computing type does for their sum.
    fn moderate(&self) -> bool {
        let fits = |&(_, _, weight): &(_, _, f64)| MODERATE.contains(&weight.abs());
        self.pulling.len() <= FEW && self.pulling.iter().all(fits)
    }

    /// Writes the gradient of the row into `out`; `few` and `many` are room for the sum of the pulls.
    #[inline(always)]
    fn gradient<I: Isa>(&self, few: &mut [F], many: &mut Vec<f64>, out: &mut [F]) {
        if self.moderate() {
            self.store::<I, F>(few, out);
        } else {
            // One row may be the candidate of every anchor: in f64 its sum keeps every contribution.
            many.resize(out.len(), 0.0);
            self.store::<I, f64>(many, out);
        }
    }

    /// The same by way of `sum`.
    #[inline(always)]
    fn store<I: Isa, S: Real>(&self, sum: &mut [S], out: &mut [F]) {
        add_all::<I, S, F>(sum, self.own, self.pulling);
        let (along, divisor) = match self.norm {
            None => (0.0, 1.0),
            Some(norm) if norm < SMALLEST_NORM => (0.0, SMALLEST_NORM),
            Some(norm) => (inner(sum, self.own), norm),
        };
        let (along, factor) = (S::of(along), S::of(self.scale / divisor));
        for ((o, &s), u) in out.iter_mut().zip(&*sum).zip(self.own) {
            *o = F::of(((s - along * S::of(u.to_f64())) * factor).to_f64());
        }
    }
}

/// Where the pairs of row `k` are.
fn starts(starts: &[u32], k: usize) -> Range<usize> {
    starts[k] as usize..starts[k + 1] as usize
}

/// `sum_j x_j u_j` in f64.
#[inline(always)]
fn inner<S: Real, F: Real>(x: &[S], u: &[F]) -> f64 {
    let mut sums = [0.0; SUMS];
    let (x_chunks, x_rest) = x.as_chunks::<SUMS>();
    let (u_chunks, u_rest) = u.as_chunks::<SUMS>();
    for (x, u) in x_chunks.iter().zip(u_chunks) {
        for k in 0..SUMS {
            sums[k] += x[k].to_f64() * u[k].to_f64();
        }
    }
    let rest = x_rest.iter().zip(u_rest);
    let rest: f64 = rest.map(|(x, u)| x.to_f64() * u.to_f64()).sum();
    sums.iter().sum::<f64>() + rest
}

/// `sum = sum_k weight_k (x - y_k)`, a few `y_k` at a time: accesses to `sum` take most of the time.
#[inline(always)]
fn add_all<I: Isa, S: Real, F: Element<Acc = F> + Real>(
    sum: &mut [S],
    x: &[F],
    pulling: &[(Rows<'_, F>, u32, f64)],
) {
    let row = |k: usize| pulling[k].0.row(pulling[k].1 as usize, &mut []);
    let weight = |k: usize| S::of(pulling[k].2);
    let four = |k: usize| {
        let rows = [row(k), row(k + 1), row(k + 2), row(k + 3)];
        (rows, [0, 1, 2, 3].map(|j| weight(k + j)))
    };
    if pulling.is_empty() {
        return sum.fill(S::ZERO);
    }
    let mut at = match pulling.len() % 4 {
        0 => add::<I, S, F, 4, true>(sum, x, four(0)),
        1 => add::<I, S, F, 1, true>(sum, x, ([row(0)], [weight(0)])),
        2 => add::<I, S, F, 2, true>(sum, x, ([row(0), row(1)], [weight(0), weight(1)])),
        _ => {
            let weights = [weight(0), weight(1), weight(2)];
            add::<I, S, F, 3, true>(sum, x, ([row(0), row(1), row(2)], weights))
        }
    };
    while at < pulling.len() {
        at += add::<I, S, F, 4, false>(sum, x, four(at));
    }
}

/// Adds `sum_k weight_k (x - y_k)` to `sum`, or overwrites `sum` with it if it is the `FIRST`. Returns `N`.
#[inline(always)]
fn add<I: Isa, S: Real, F: Real, const N: usize, const FIRST: bool>(
    sum: &mut [S],
    x: &[F],
    (y, weights): ([&[F]; N], [S; N]),
) -> usize {
    let len = sum.len().min(x.len());
    let (sum, x) = (&mut sum[..len], &x[..len]);
    let y = y.map(|y| &y[..len]);
    for j in 0..len {
        let mut total = if FIRST { S::ZERO } else { sum[j] };
        for k in 0..N {
            let difference = S::of((x[j] - y[k][j]).to_f64());
            total = difference.mul_add::<I>(weights[k], total);
        }
        sum[j] = total;
    }
    N
}

/// Divides every row of `x` by its norm (at least 1e-12) into the contiguous `out`, and returns the
/// norms as they were.
pub fn normalize<E: Element>(
    x: Rows<'_, E>,
    out: &mut [E::Acc],
    threads: NonZeroUsize,
) -> Vec<f64> {
    let mut norms = vec![0.0; x.rows()];
    let ranges = split(x.rows(), threads);
    let jobs: Vec<_> = cut(out, &ranges, x.cols())
        .into_iter()
        .zip(cut(&mut norms, &ranges, 1))
        .zip(ranges)
        .map(|((out, norms), range)| {
            let sweep = Normalize {
                x,
                range,
                out,
                norms,
            };
            move || dispatch(sweep)
        })
        .collect();
    run(jobs);
    norms
}

struct Normalize<'a, 'b, E: Element> {
    x: Rows<'a, E>,
    range: Range<usize>,
    out: &'b mut [E::Acc],
    norms: &'b mut [f64],
}

impl<E: Element> Kernel for Normalize<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let mut scratch = self.x.scratch();
        let rows = self.out.chunks_exact_mut(self.x.cols()).zip(self.norms);
        for (i, (out, norm)) in self.range.zip(rows) {
            let x = self.x.in_turn(i, &mut scratch);
            *norm = reduce::sum_of_pairs(x, x, |x, y| x * y).sqrt();
            let divisor = E::Acc::of(if *norm < SMALLEST_NORM {
                SMALLEST_NORM
            } else {
                *norm
            });
            for (o, &x) in out.iter_mut().zip(x) {
                *o = x / divisor;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_and_their_slopes() {
        let objectives = [
            Objective::Hinge(0.3),
            Objective::Margin(0.2),
            Objective::Taught,
        ];
        for objective in objectives {
            for t in [-40.0, -3.0, -0.7, 0.1, 2.0, 40.0] {
                let value = |t| term(objective, t, 0.7).0;
                let difference = (value(t + 1e-5) - value(t - 1e-5)) / 2e-5;
                assert!(
                    (term(objective, t, 0.7).1 - difference).abs() < 1e-6,
                    "{objective:?} {t}"
                );
            }
            let (value, slope) = term(objective, f64::NAN, 0.7);
            assert!(value.is_nan() && slope.is_nan());
        }
        // Far apart the loss is the small probability, not what rounding leaves of 1.
        let (value, slope) = term(Objective::Margin(0.0), -50.0, 0.0);
        assert!((value / (-50f64).exp() - 1.0).abs() < 1e-12 && slope == value);
    }

    #[test]
    fn gradients_of_few_and_many_pulls_and_of_tiny_ones() {
        let (rows, dim) = (40, 37);
        let data: Vec<f32> = (0..rows * dim)
            .map(|k| (k * 7919 % 101) as f32 / 64.0)
            .collect();
        let x = Rows::contiguous(&data, rows, dim).unwrap();
        let row = |i: usize| &data[i * dim..(i + 1) * dim];
        let found = |i: usize, index: usize| Found {
            index,
            square: squared_distance(row(i), row(index)),
            missing: false,
        };
        // The first row is a candidate of all others.
        let hardest: Vec<_> = (0..rows)
            .map(|i| Hardest {
                positive: found(i, i ^ 1),
                negative: found(i, if i == 0 { 2 } else { 0 }),
            })
            .collect();
        for tiny in [1.0, 1e-42] {
            let (value, mut pulls) = loss(Objective::Hinge(9.0), &hardest, &[], rows);
            for pull in &mut pulls.pairs {
                pull.weight *= tiny;
            }
            let mut expected = vec![0.0f64; rows * dim];
            for pull in &pulls.pairs {
                let (i, j) = (pull.anchor as usize, pull.candidate as usize);
                for c in 0..dim {
                    let pulled = pull.weight * f64::from(row(i)[c] - row(j)[c]);
                    expected[i * dim + c] += pulled;
                    expected[j * dim + c] -= pulled;
                }
            }
            let mut out = vec![9.0f32; rows * dim];
            let gradient = Gradient {
                anchors: x,
                candidates: x,
                pulls: &pulls,
                role: Role::Both,
                norms: None,
            };
            let scale = 1.0 / tiny;
            gradient.store(Loss { value, scale }, &mut out, NonZeroUsize::MIN);
            for (out, expected) in out.chunks(dim).zip(expected.chunks(dim)) {
                let largest = expected.iter().fold(0.0, |most: f64, g| most.max(g.abs()));
                for (&g, e) in out.iter().zip(expected) {
                    let error = (f64::from(g) - scale * e).abs();
                    assert!(error < 4e-7 * scale * largest, "{tiny}: {g} {e}");
                }
            }
        }
    }
}
