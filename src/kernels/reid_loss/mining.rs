//! Hard example mining: for each anchor `u_i` the hardest candidates `v_j`.
//!
//! ```text
//! d_ij^2   = |u_i|^2 + |v_j|^2 - 2 u_i.v_j
//! positive = argmax of d_ij over the j of the same identity (the anchor itself may be among them)
//! negative = argmin of d_ij over the others
//! ```
//!
//! The products `u_i.v_j` come from the caller, some rows at a time; nothing of size `N x N` is kept.
//! `|u_i|^2` is constant in a row, so a row is searched by `key_j = |v_j|^2 - 2 u_i.v_j`. The formula
//! cancels: rounding may reorder close candidates. Those within its error of the best one are compared
//! again by distances computed from differences, so that the pair, its distance and its gradient do not
//! depend on how the product was rounded. Of equal distances the first index wins.

use super::super::element::Element;
use super::super::isa::{Isa, Kernel, dispatch};
use super::super::parallel::{cut, run, split};
use super::super::real::Real;
use super::super::reduce;
use super::super::rows::Rows;
use super::{CLAMP, squared_distance};
use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::ops::Range;

/// Error of a key, in units of epsilon times the squared norms, within which candidates are
/// compared again.
pub const ERROR: f64 = 16.0;
/// Maximum number of candidates of one anchor that are compared again, so that features that
/// collapsed to a point do not cost `N^2 F`.
const COMPARED: usize = 16;
const LANES: usize = 16;

/// The identities of anchors and candidates, as small numbers.
pub struct Identities {
    anchors: Vec<u32>,
    candidates: Vec<u32>,
    /// How many candidates each identity has.
    counts: Vec<usize>,
}

impl Identities {
    /// From any labels. Without `candidates` the anchors are the candidates.
    pub fn new(anchors: &[i64], candidates: Option<&[i64]>) -> Self {
        let mut known = HashMap::new();
        let mut number = |label: &i64| {
            let next = known.len() as u32;
            *known.entry(*label).or_insert(next)
        };
        let anchors: Vec<u32> = anchors.iter().map(&mut number).collect();
        let candidates =
            candidates.map_or_else(|| anchors.clone(), |c| c.iter().map(&mut number).collect());
        let mut counts = vec![0; known.len()];
        for &identity in &candidates {
            counts[identity as usize] += 1;
        }
        Self {
            anchors,
            candidates,
            counts,
        }
    }
}

/// One end of a pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Found {
    /// The candidate.
    pub index: usize,
    /// Its squared distance from the anchor.
    pub square: f64,
    /// No candidate qualified, so that tllib's offset decides: it is the best among all.
    pub missing: bool,
}

impl Found {
    const NAN: Self = Self {
        index: 0,
        square: f64::NAN,
        missing: false,
    };
}

/// The hardest candidates of one anchor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hardest {
    /// The farthest of the same identity.
    pub positive: Found,
    /// The nearest of the others.
    pub negative: Found,
}

impl Hardest {
    /// Before mining, and for an anchor whose distances are not finite.
    pub const NAN: Self = Self {
        positive: Found::NAN,
        negative: Found::NAN,
    };
}

/// What mining looks at.
#[derive(Clone, Copy)]
pub struct Mining<'a, F> {
    /// `u`, contiguous rows.
    pub anchors: Rows<'a, F>,
    /// `v`, contiguous rows of the same length; at least one.
    pub candidates: Rows<'a, F>,
    /// Their identities.
    pub identities: &'a Identities,
    /// `|u_i|^2`, from [`squares`].
    pub anchor_squares: &'a [F],
    /// `|v_j|^2`.
    pub squares: &'a [F],
}

impl<F: Element<Acc = F> + Real> Mining<'_, F> {
    /// Mines the anchors `first..first + products.rows()`, whose products with all candidates are
    /// the contiguous `products`, into `out`.
    pub fn mine(
        self,
        products: Rows<'_, F>,
        first: usize,
        out: &mut [Hardest],
        threads: NonZeroUsize,
    ) {
        let ranges = split(products.rows(), threads);
        let jobs: Vec<_> = cut(out, &ranges, 1)
            .into_iter()
            .zip(ranges)
            .map(|(out, range)| {
                let search = Search {
                    mining: self,
                    products,
                    first,
                    range,
                    out,
                };
                move || dispatch(search)
            })
            .collect();
        run(jobs);
    }
}

/// `|x_i|^2` of every row.
pub fn squares<F: Element<Acc = F> + Real>(rows: Rows<'_, F>, threads: NonZeroUsize) -> Vec<F> {
    let jobs: Vec<_> = split(rows.rows(), threads)
        .into_iter()
        .map(|range| move || dispatch(Squares(rows.slice(range))))
        .collect();
    run(jobs).concat()
}

struct Squares<'a, F>(Rows<'a, F>);

impl<F: Element<Acc = F> + Real> Kernel for Squares<'_, F> {
    type Output = Vec<F>;

    #[inline(always)]
    fn run<I: Isa>(self) -> Vec<F> {
        let square = |x: &[F]| F::of(reduce::sum_of_pairs(x, x, |x, y| x * y));
        (0..self.0.rows())
            .map(|i| square(self.0.row(i, &mut [])))
            .collect()
    }
}

struct Search<'a, 'b, F> {
    mining: Mining<'a, F>,
    products: Rows<'a, F>,
    first: usize,
    range: Range<usize>,
    out: &'b mut [Hardest],
}

impl<F: Element<Acc = F> + Real> Kernel for Search<'_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Mining {
            anchors,
            candidates,
            identities,
            anchor_squares,
            squares,
        } = self.mining;
        let largest = reduce::max(squares).to_f64();
        let mut keys = vec![F::ZERO; squares.len()];
        for (k, out) in self.range.zip(self.out) {
            let i = self.first + k;
            let anchor = anchors.row(i, &mut []);
            let mut defect = F::ZERO;
            for ((key, &g), &square) in keys
                .iter_mut()
                .zip(self.products.row(k, &mut []))
                .zip(squares)
            {
                *key = g.mul_add::<I>(-(F::ONE + F::ONE), square);
                // 0 while all are finite, NaN for ever after one that is not.
                defect += *key * F::ZERO;
            }
            if !defect.finite() {
                *out = Hardest::NAN;
                continue;
            }
            let own = identities.anchors[i];
            let norm = anchor_squares[i].to_f64() + largest;
            let error = F::of(ERROR * F::EPSILON * norm);
            let square = |j: usize| squared_distance(anchor, candidates.row(j, &mut []));
            let ids = &identities.candidates;
            let positives = identities.counts[own as usize];

            let who = if positives > 0 {
                Who::Same(own)
            } else {
                Who::All
            };
            let (index, found) = best(&keys, ids, who, error, |j| clamped(square(j)));
            let positive = Found {
                index,
                square: found,
                missing: positives == 0,
            };

            for key in &mut keys {
                *key = -*key;
            }
            let who = if positives < ids.len() {
                Who::Other(own)
            } else {
                Who::All
            };
            let (index, found) = best(&keys, ids, who, error, |j| -clamped(square(j)));
            let negative = Found {
                index,
                square: -found,
                missing: positives == ids.len(),
            };
            *out = Hardest { positive, negative };
        }
    }
}

/// Below the clamp all distances are equal, and equal to a value that gets no gradient.
fn clamped(square: f64) -> f64 {
    if square < CLAMP { 0.0 } else { square }
}

/// Which candidates take part.
#[derive(Clone, Copy)]
enum Who {
    Same(u32),
    Other(u32),
    All,
}

/// The first index with the largest `exact` value among those whose key is within `error` of the
/// largest key, and that value.
#[inline(always)]
fn best<F: Real>(
    keys: &[F],
    ids: &[u32],
    who: Who,
    error: F,
    exact: impl Fn(usize) -> f64,
) -> (usize, f64) {
    let (id, same) = match who {
        Who::Same(id) => (id, true),
        Who::Other(id) => (id, false),
        // No identity has this number.
        Who::All => (u32::MAX, false),
    };
    let takes_part = |other: u32| (other == id) == same;
    let mut lanes = [F::NEG_INFINITY; LANES];
    for (keys, ids) in keys.chunks(LANES).zip(ids.chunks(LANES)) {
        for ((lane, &key), &id) in lanes.iter_mut().zip(keys).zip(ids) {
            let key = if takes_part(id) { key } else { F::NEG_INFINITY };
            *lane = key.larger(*lane);
        }
    }
    let largest = reduce::max(&lanes);
    let floor = largest - error;
    let mut found = (0, f64::NEG_INFINITY);
    let (mut compared, mut met) = (0, false);
    for (c, (keys, ids)) in keys.chunks(LANES).zip(ids.chunks(LANES)).enumerate() {
        let mut any = false;
        for (&key, &id) in keys.iter().zip(ids) {
            #[allow(
                clippy::needless_bitwise_bool,
                reason = "a branch would keep it from vectorising"
            )]
            {
                any |= takes_part(id) & (key >= floor);
            }
        }
        if !any {
            continue;
        }
        for (l, (&key, &id)) in keys.iter().zip(ids).enumerate() {
            if !takes_part(id) || key < floor {
                continue;
            }
            // The largest key is always among those compared, whatever their number.
            let first_largest = !met && key == largest;
            if compared < COMPARED || first_largest {
                let value = exact(c * LANES + l);
                if value > found.1 {
                    found = (c * LANES + l, value);
                }
            }
            compared += 1;
            met |= first_largest;
        }
        if compared >= COMPARED && met {
            break;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(n: usize, dim: usize, offset: f64) -> Vec<f64> {
        (0..n * dim)
            .map(|k| ((k * 7919 + 31 * (k / dim)) % 101) as f64 / 50.0 + offset)
            .collect()
    }

    fn mined<F: Element<Acc = F> + Real>(
        x: &[F],
        dim: usize,
        labels: &[i64],
        threads: usize,
    ) -> Vec<Hardest> {
        let n = labels.len();
        let rows = Rows::contiguous(x, n, dim).unwrap();
        let dot = |i: usize, j: usize| {
            (0..dim)
                .map(|k| x[i * dim + k].to_f64() * x[j * dim + k].to_f64())
                .sum::<f64>()
        };
        let products: Vec<F> = (0..n * n).map(|k| F::of(dot(k / n, k % n))).collect();
        let identities = Identities::new(labels, None);
        let squares = squares(rows, NonZeroUsize::new(2).unwrap());
        let mining = Mining {
            anchors: rows,
            candidates: rows,
            identities: &identities,
            anchor_squares: &squares,
            squares: &squares,
        };
        let mut out = vec![Hardest::NAN; n];
        let products = Rows::contiguous(&products, n, n).unwrap();
        mining.mine(products, 0, &mut out, NonZeroUsize::new(threads).unwrap());
        out
    }

    #[test]
    fn finds_what_a_plain_search_finds() {
        let (n, dim) = (37, 19);
        let x = features(n, dim, 0.0);
        let labels: Vec<i64> = (0..n as i64).map(|i| i * i % 7 - 3).collect();
        let d = |i: usize, j: usize| {
            squared_distance(&x[i * dim..(i + 1) * dim], &x[j * dim..(j + 1) * dim])
        };
        for threads in [1, 3] {
            for (i, got) in mined(&x, dim, &labels, threads).iter().enumerate() {
                let same: Vec<usize> = (0..n).filter(|&j| labels[j] == labels[i]).collect();
                let others: Vec<usize> = (0..n).filter(|&j| labels[j] != labels[i]).collect();
                let farthest = same.iter().map(|&j| d(i, j)).fold(0.0, f64::max);
                let nearest = others.iter().map(|&j| d(i, j)).fold(f64::MAX, f64::min);
                assert_eq!(
                    (got.positive.square, got.negative.square),
                    (farthest, nearest)
                );
                assert_eq!(d(i, got.positive.index), farthest);
                assert!(labels[got.negative.index] != labels[i] && !got.positive.missing);
            }
        }
    }

    #[test]
    fn a_common_offset_does_not_change_the_pairs() {
        let (n, dim) = (16, 8);
        let labels: Vec<i64> = (0..n as i64).map(|i| i / 4).collect();
        let index = |offset: f64| -> Vec<_> {
            // Halves of integers are exact in f32 with the offset too.
            let x: Vec<f32> = features(n, dim, 0.0)
                .iter()
                .map(|x| ((x * 50.0).round() / 2.0 + offset) as f32)
                .collect();
            mined(&x, dim, &labels, 1)
                .iter()
                .map(|h| (h.positive, h.negative))
                .collect()
        };
        assert_eq!(index(0.0), index(4000.0));
    }

    #[test]
    fn singletons_twins_and_one_identity() {
        let x = [0.0f32, 1.0, 0.0, 1.0, 5.0, 1.0, 9.0, 9.0];
        let got = mined(&x, 2, &[1, 1, 2, 3], 1);
        // Twins: the anchor and its double are equally far, the first index wins.
        assert_eq!(
            got[1].positive,
            Found {
                index: 0,
                square: 0.0,
                missing: false
            }
        );
        assert_eq!(
            got[2].positive,
            Found {
                index: 2,
                square: 0.0,
                missing: false
            }
        );
        assert_eq!(
            got[2].negative,
            Found {
                index: 0,
                square: 25.0,
                missing: false
            }
        );
        let got = mined(&x, 2, &[1, 1, 1, 1], 1);
        assert_eq!(
            got[3].negative,
            Found {
                index: 3,
                square: 0.0,
                missing: true
            }
        );
        let collapsed = [0.5f32; 128];
        assert_eq!(mined(&collapsed, 2, &[4; 64], 1)[40].positive.index, 0);
    }

    #[test]
    fn values_that_are_not_finite_reach_the_pair() {
        let x = [0.0f32, 1.0, f32::NAN, 1.0];
        assert!(
            mined(&x, 2, &[1, 2], 1)
                .iter()
                .all(|h| h.positive.square.is_nan() && h.negative.square.is_nan())
        );
    }
}
