//! Hard example mining: for each anchor `u_i` the hardest candidates `v_j`.
//!
//! ```text
//! d_ij^2   = |u_i|^2 + |v_j|^2 - 2 u_i.v_j
//! positive = argmax of d_ij over the j of the same identity (the anchor itself may be among them)
//! negative = argmin of d_ij over the others
//! ```
//!
//! The products `u_i.v_j` come from the caller, a tile at a time; nothing of size `N x N` is kept. `|u_i|^2` is
//! constant in a row, so candidates are ranked by `key_j = |v_j|^2 - 2 u_i.v_j`. The formula cancels: rounding may
//! reorder close candidates. Those within its error of the best one, if they are few, are remembered, and compared at
//! the end by distances computed from differences, so that the pair, its distance and its gradient depend neither on
//! how the product was rounded nor on the tiles. Of equal distances the first index wins.
//!
//! If the candidates are the anchors, the products are symmetric: a tile above the diagonal also serves the anchors of
//! its columns, and none below is needed.

use super::super::columns::{self, Each};
use super::super::element::Element;
use super::super::isa::{Isa, Kernel, dispatch};
use super::super::parallel::{cut, run, split};
use super::super::real::Real;
use super::super::reduce;
use super::super::rows::Rows;
use super::{CLAMP, squared_distance};
use search::{Look, Near, Side, Who};
use std::collections::HashMap;
use std::num::NonZeroUsize;

mod search;

pub use search::Seen;

/// Error of a key, in units of epsilon times the squared norms, within which candidates are
/// compared again.
pub const ERROR: f64 = 16.0;

/// Labels whose range is less than so many times their number are looked up in a table, and not in a hash map.
const DENSE: usize = 4;

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
        let (least, most) = [Some(anchors), candidates]
            .into_iter()
            .flatten()
            .map(|labels| dispatch(Extremes(labels)))
            .fold((i64::MAX, i64::MIN), |(least, most), (low, high)| {
                (least.min(low), most.max(high))
            });
        let count = anchors.len() + candidates.map_or(0, <[i64]>::len);
        // `None` if the difference is too large for the type, and without labels.
        match most.checked_sub(least).map(usize::try_from) {
            Some(Ok(span)) if span < count.saturating_mul(DENSE) => {
                let mut table = vec![u32::MAX; span + 1];
                Self::numbered(anchors, candidates, |label, next| {
                    let number = &mut table[(label - least) as usize];
                    *number = next.min(*number);
                    *number
                })
            }
            _ => {
                let mut known = HashMap::new();
                Self::numbered(anchors, candidates, |label, next| {
                    *known.entry(label).or_insert(next)
                })
            }
        }
    }

    /// Numbers the labels in the order in which they first occur. `number(label, next)` is the number that the label
    /// was given, `next` the first time.
    fn numbered(
        anchors: &[i64],
        candidates: Option<&[i64]>,
        mut number: impl FnMut(i64, u32) -> u32,
    ) -> Self {
        let mut next = 0;
        let mut number = |&label: &i64| {
            let number = number(label, next);
            next += u32::from(number == next);
            number
        };
        let anchors: Vec<u32> = anchors.iter().map(&mut number).collect();
        let candidates =
            candidates.map_or_else(|| anchors.clone(), |c| c.iter().map(&mut number).collect());
        let mut counts = vec![0; next as usize];
        for &identity in &candidates {
            counts[identity as usize] += 1;
        }
        Self {
            anchors,
            candidates,
            counts,
        }
    }

    /// Who the positives and the negatives of an anchor are: all candidates where none qualifies.
    fn of(&self, anchor: usize) -> (Who, Who) {
        let own = self.anchors[anchor];
        let positives = self.counts[own as usize];
        (
            if positives > 0 {
                Who::Same(own)
            } else {
                Who::All
            },
            if positives < self.candidates.len() {
                Who::Other(own)
            } else {
                Who::All
            },
        )
    }
}

/// The least and the largest of some numbers.
struct Extremes<'a>(&'a [i64]);

impl Kernel for Extremes<'_> {
    type Output = (i64, i64);

    #[inline(always)]
    fn run<I: Isa>(self) -> (i64, i64) {
        let (mut least, mut most) = (i64::MAX, i64::MIN);
        for &number in self.0 {
            (least, most) = (least.min(number), most.max(number));
        }
        (least, most)
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
    /// Of an anchor whose distances are not finite.
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
    /// `v`, rows of the same length, at least one; fast where they are contiguous.
    pub candidates: Rows<'a, F>,
    /// Their identities.
    pub identities: &'a Identities,
    /// `|u_i|^2`, from [`squares`].
    pub anchor_squares: &'a [F],
    /// `|v_j|^2`.
    pub squares: &'a [F],
    /// The largest of these.
    pub largest_square: F,
}

/// Products of some anchors with some candidates.
#[derive(Clone, Copy)]
pub struct Tile<'a, F> {
    /// `u_i.v_j`, contiguous.
    pub products: Rows<'a, F>,
    /// The first anchor and the first candidate.
    pub first: (usize, usize),
    /// Whether candidates are anchors too, and those of the columns after the last row are to see the anchors of the
    /// rows.
    pub mirrored: bool,
}

impl<F: Element<Acc = F> + Real> Mining<'_, F> {
    /// The state of every anchor before the first tile.
    pub fn start(&self) -> Vec<Seen<F>> {
        vec![Seen::NOTHING; self.anchors.rows()]
    }

    /// Takes a tile into account that is not the last. Every anchor has to see every candidate once, in order.
    pub fn look(self, tile: Tile<'_, F>, seen: &mut [Seen<F>], threads: NonZeroUsize) {
        let rows = tile.first.0..tile.first.0 + tile.products.rows();
        let cols = tile.first.1..tile.first.1 + tile.products.cols();
        let after = if tile.mirrored {
            cols.start.max(rows.end)..cols.end.max(rows.end)
        } else {
            rows.end..rows.end
        };
        let (head, tail) = seen.split_at_mut(rows.end);
        let sides = [
            (Side::Rows, &mut head[rows.start..], rows.start),
            (
                Side::Columns,
                &mut tail[after.start - rows.end..after.end - rows.end],
                after.start,
            ),
        ];
        // Each thread takes a part of either side.
        let mut parts: Vec<Vec<Look<'_, '_, F>>> = Vec::new();
        parts.resize_with(threads.get(), Vec::new);
        for (side, seen, first) in sides {
            let ranges = split(seen.len(), threads);
            let cuts = cut(seen, &ranges, 1).into_iter().zip(ranges);
            for (part, (seen, range)) in parts.iter_mut().zip(cuts) {
                if !seen.is_empty() {
                    part.push(Look {
                        mining: self,
                        tile,
                        side,
                        seen,
                        anchor: first + range.start,
                    });
                }
            }
        }
        let jobs = parts
            .into_iter()
            .map(|part| move || part.into_iter().for_each(dispatch));
        run(jobs.collect());
    }

    /// The hardest pairs, when every anchor has seen every candidate but those of the last tile, which has the last
    /// anchors and the last candidates.
    pub fn finish(
        self,
        last: Tile<'_, F>,
        seen: &mut [Seen<F>],
        threads: NonZeroUsize,
    ) -> Vec<Hardest> {
        let ranges = split(seen.len(), threads);
        let jobs: Vec<_> = cut(seen, &ranges, 1)
            .into_iter()
            .zip(ranges)
            .map(|(seen, range)| {
                let finish = Finish {
                    mining: self,
                    last,
                    seen,
                    first: range.start,
                };
                move || dispatch(finish)
            })
            .collect();
        run(jobs).concat()
    }
}

/// `|x_i|^2` of every row.
pub fn squares<E: Element>(rows: Rows<'_, E>, threads: NonZeroUsize) -> Vec<E::Acc> {
    // In half types a result does not depend on the layout.
    if E::EXACT && columns::fit(&rows) {
        let mut sums = vec![0.0; rows.rows()];
        let weights = vec![E::Acc::ONE; rows.rows()];
        columns::sweep::<E, Square, 1>([rows], &weights, &mut sums, [None], threads);
        return sums.into_iter().map(E::Acc::of).collect();
    }
    let jobs: Vec<_> = split(rows.rows(), threads)
        .into_iter()
        .map(|range| move || dispatch(Squares(rows.slice(range))))
        .collect();
    run(jobs).concat()
}

/// `x^2`
struct Square;

impl Each<1> for Square {
    #[inline(always)]
    fn term<I: Isa, F: Real>([x]: [F; 1]) -> (F, F) {
        (x * x, x + x)
    }
}

struct Squares<'a, E>(Rows<'a, E>);

impl<E: Element> Kernel for Squares<'_, E> {
    type Output = Vec<E::Acc>;

    #[inline(always)]
    fn run<I: Isa>(self) -> Vec<E::Acc> {
        let square = |x: &[E::Acc]| E::Acc::of(reduce::sum_of_pairs(x, x, |x, y| x * y));
        let mut scratch = self.0.scratch();
        (0..self.0.rows())
            .map(|i| square(self.0.in_turn(i, &mut scratch)))
            .collect()
    }
}

struct Finish<'a, 'b, F> {
    mining: Mining<'a, F>,
    last: Tile<'a, F>,
    /// The states of some anchors.
    seen: &'b mut [Seen<F>],
    /// The first of them.
    first: usize,
}

impl<F: Element<Acc = F> + Real> Kernel for Finish<'_, '_, F> {
    type Output = Vec<Hardest>;

    #[inline(always)]
    fn run<I: Isa>(self) -> Vec<Hardest> {
        let before = self.last.first.0.saturating_sub(self.first);
        if let Some(seen) = self.seen.get_mut(before..) {
            let look = Look {
                mining: self.mining,
                tile: self.last,
                side: Side::Rows,
                seen,
                anchor: self.first + before,
            };
            look.run::<I>();
        }
        let mut out = Vec::with_capacity(self.seen.len());
        let mut room = vec![F::ZERO; self.mining.candidates.cols()];
        for (k, seen) in self.seen.iter().enumerate() {
            out.push(hardest(&self.mining, self.first + k, seen, &mut room));
        }
        out
    }
}

/// The pairs of an anchor that has seen all candidates.
#[inline(always)]
fn hardest<F: Element<Acc = F> + Real>(
    mining: &Mining<'_, F>,
    i: usize,
    seen: &Seen<F>,
    room: &mut [F],
) -> Hardest {
    if !seen.finite {
        return Hardest::NAN;
    }
    let (positives, negatives) = mining.identities.of(i);
    let (index, largest) = best(mining, i, &seen.positive, 1.0, room);
    let positive = Found {
        index,
        square: largest,
        missing: matches!(positives, Who::All),
    };
    let (index, smallest) = best(mining, i, &seen.negative, -1.0, room);
    let negative = Found {
        index,
        square: -smallest,
        missing: matches!(negatives, Who::All),
    };
    Hardest { positive, negative }
}

/// The first of the candidates near the best one with the largest squared distance from anchor `i`, times `sign`, and
/// that value.
#[inline(always)]
fn best<F: Element<Acc = F> + Real>(
    mining: &Mining<'_, F>,
    i: usize,
    near: &Near<F>,
    sign: f64,
    room: &mut [F],
) -> (usize, f64) {
    let anchor = mining.anchors.row(i, &mut []);
    let mut found = (0, f64::NEG_INFINITY);
    for index in near.indices() {
        let candidate = mining.candidates.row(index, room);
        let value = sign * clamped(squared_distance(anchor, candidate));
        if value > found.1 {
            found = (index, value);
        }
    }
    found
}

/// Below the clamp all distances are equal, and equal to a value that gets no gradient.
fn clamped(square: f64) -> f64 {
    if square < CLAMP { 0.0 } else { square }
}

#[cfg(test)]
mod tests;
