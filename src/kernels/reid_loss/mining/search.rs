//! The search of anchors among the candidates of a tile, and what they remember of it.

use super::super::super::element::Element;
use super::super::super::isa::{Isa, Kernel};
use super::super::super::real::Real;
use super::super::super::reduce;
use super::{ERROR, Mining, Tile};

/// Maximum number of candidates of one anchor that are compared again, so that features that
/// collapsed to a point do not cost `N^2 F`.
const COMPARED: usize = 16;
const LANES: usize = 16;
/// Keys that are compared at once: as many independent maxima as hide the latency of one.
const CHUNK: usize = 32;
/// Keys of a row that are made and searched together: they stay in the cache.
const KEYS: usize = 2048;

/// Which candidates take part.
#[derive(Clone, Copy)]
pub enum Who {
    Same(u32),
    Other(u32),
    All,
}

/// What an anchor has seen.
#[derive(Clone)]
pub struct Seen<F> {
    /// By key.
    pub positive: Near<F>,
    /// By key with the sign changed.
    pub negative: Near<F>,
    /// Whether all keys were.
    pub finite: bool,
}

impl<F: Real> Seen<F> {
    /// Before the first tile.
    pub const NOTHING: Self = Self {
        positive: Near::NOTHING,
        negative: Near::NOTHING,
        finite: true,
    };
}

/// Candidates whose keys are within the error of the largest one so far: of more than [`COMPARED`] at any time, the
/// first and the largest.
#[derive(Clone)]
pub struct Near<F> {
    largest: F,
    count: usize,
    keys: [F; COMPARED],
    indices: [u32; COMPARED],
}

impl<F: Real> Near<F> {
    /// No candidate.
    pub const NOTHING: Self = Self {
        largest: F::NEG_INFINITY,
        count: 0,
        keys: [F::ZERO; COMPARED],
        indices: [0; COMPARED],
    };

    /// Takes a key into account, and returns the smallest one that matters now.
    #[inline(always)]
    pub fn raise(&mut self, key: F, error: F) -> F {
        if key > self.largest {
            self.largest = key;
            let floor = key - error;
            let mut kept = 0;
            for k in 0..self.count {
                if self.keys[k] >= floor {
                    (self.keys[kept], self.indices[kept]) = (self.keys[k], self.indices[k]);
                    kept += 1;
                }
            }
            self.count = kept;
        }
        self.largest - error
    }

    /// Remembers a candidate, whose key is not above the largest.
    #[inline(always)]
    pub fn push(&mut self, key: F, index: usize) {
        if self.count < COMPARED {
            self.count += 1;
        } else if key < self.largest || self.keys.contains(&key) {
            return;
        }
        let last = self.count - 1;
        (self.keys[last], self.indices[last]) = (key, index as u32);
    }

    /// Those remembered, in order.
    #[inline(always)]
    pub fn indices(&self) -> impl Iterator<Item = usize> {
        self.indices[..self.count]
            .iter()
            .map(|&index| index as usize)
    }
}

/// Where the anchors are in a tile.
#[derive(Clone, Copy)]
pub enum Side {
    /// Its rows, and its columns are the candidates.
    Rows,
    /// Its columns, and its rows are the candidates.
    Columns,
}

/// Some anchors look at their candidates in a tile.
pub struct Look<'a, 'b, F> {
    pub mining: Mining<'a, F>,
    pub tile: Tile<'a, F>,
    pub side: Side,
    /// The states of the anchors.
    pub seen: &'b mut [Seen<F>],
    /// The first of them.
    pub anchor: usize,
}

impl<F: Element<Acc = F> + Real> Kernel for Look<'_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        match self.side {
            Side::Rows => self.along_rows::<I>(),
            Side::Columns => self.along_columns::<I>(),
        }
    }
}

impl<F: Element<Acc = F> + Real> Look<'_, '_, F> {
    #[inline(always)]
    fn along_rows<I: Isa>(self) {
        let Tile {
            products, first, ..
        } = self.tile;
        let mut keys = vec![F::ZERO; KEYS.min(products.cols())];
        for (k, seen) in self.seen.iter_mut().enumerate() {
            let anchor = self.anchor + k;
            let mut search = Search::new(&self.mining, anchor, seen);
            let row = products.row(anchor - first.0, &mut []);
            for (c, row) in row.chunks(KEYS).enumerate() {
                let from = first.1 + c * KEYS;
                let keys = &mut keys[..row.len()];
                let squares = &self.mining.squares[from..];
                for ((key, &g), &square) in keys.iter_mut().zip(row).zip(squares) {
                    *key = key_of::<I, F>(g, square);
                }
                search.search(keys, from);
            }
        }
    }

    #[inline(always)]
    fn along_columns<I: Isa>(self) {
        let Tile {
            products, first, ..
        } = self.tile;
        let count = products.rows();
        let squares = &self.mining.squares[first.0..first.0 + count];
        let mut keys = vec![F::ZERO; LANES * count];
        for (c, seen) in self.seen.chunks_mut(LANES).enumerate() {
            let anchor = self.anchor + c * LANES;
            let left = anchor - first.1;
            let columns = products.columns(left..left + seen.len());
            for (i, &square) in squares.iter().enumerate() {
                for (l, &g) in columns.row(i, &mut []).iter().enumerate() {
                    keys[l * count + i] = key_of::<I, F>(g, square);
                }
            }
            for (l, (seen, keys)) in seen
                .iter_mut()
                .zip(keys.chunks_exact_mut(count))
                .enumerate()
            {
                Search::new(&self.mining, anchor + l, seen).search(keys, first.0);
            }
        }
    }
}

/// `|v|^2 - 2 u.v`
#[inline(always)]
fn key_of<I: Isa, F: Real>(product: F, square: F) -> F {
    product.mul_add::<I>(-(F::ONE + F::ONE), square)
}

/// The search of one anchor among some of the candidates.
struct Search<'a, F> {
    /// The candidates' identities.
    ids: &'a [u32],
    positives: Who,
    negatives: Who,
    error: F,
    seen: &'a mut Seen<F>,
}

impl<'a, F: Element<Acc = F> + Real> Search<'a, F> {
    #[inline(always)]
    fn new(mining: &Mining<'a, F>, anchor: usize, seen: &'a mut Seen<F>) -> Self {
        let norm = mining.anchor_squares[anchor].to_f64() + mining.largest_square.to_f64();
        let (positives, negatives) = mining.identities.of(anchor);
        Self {
            ids: &mining.identities.candidates,
            positives,
            negatives,
            error: F::of(ERROR * F::EPSILON * norm),
            seen,
        }
    }

    /// Looks at the candidates from `first` on, and spoils their keys.
    #[inline(always)]
    fn search(&mut self, keys: &mut [F], first: usize) {
        // 0 if all are finite, else NaN.
        let zero = reduce::sum_of(keys, |key| key * F::ZERO);
        self.seen.finite &= zero.finite();
        if !self.seen.finite {
            return;
        }
        let ids = &self.ids[first..first + keys.len()];
        collect_largest(
            keys,
            ids,
            self.positives,
            self.error,
            first,
            &mut self.seen.positive,
        );
        for key in &mut *keys {
            *key = -*key;
        }
        collect_largest(
            keys,
            ids,
            self.negatives,
            self.error,
            first,
            &mut self.seen.negative,
        );
    }
}

/// Takes the candidates of `keys`, of which the first is `first`, into account: those with the largest keys are
/// remembered.
#[inline(always)]
fn collect_largest<F: Real>(
    keys: &[F],
    ids: &[u32],
    who: Who,
    error: F,
    first: usize,
    near: &mut Near<F>,
) {
    let (id, same) = match who {
        Who::Same(id) => (id, true),
        Who::Other(id) => (id, false),
        // No identity has this number.
        Who::All => (u32::MAX, false),
    };
    let takes_part = |other: u32| (other == id) == same;
    // LLVM keeps the maxima in registers, and vectorizes, only if it knows the length of every chunk.
    let (key_chunks, key_rest) = keys.as_chunks::<CHUNK>();
    let (id_chunks, id_rest) = ids.as_chunks::<CHUNK>();
    // The last chunk may overlap the one before: a maximum may be taken twice.
    let (mut few_keys, mut few_ids) = ([F::NEG_INFINITY; CHUNK], [id; CHUNK]);
    let last = (keys.last_chunk(), ids.last_chunk());
    let (last_keys, last_ids) = if let (Some(keys), Some(ids)) = last {
        (keys, ids)
    } else {
        few_keys[..keys.len()].copy_from_slice(keys);
        few_ids[..ids.len()].copy_from_slice(ids);
        (&few_keys, &few_ids)
    };
    let mut lanes = [F::NEG_INFINITY; CHUNK];
    let mut raise = |keys: &[F; CHUNK], ids: &[u32; CHUNK]| {
        for l in 0..CHUNK {
            let key = if takes_part(ids[l]) {
                keys[l]
            } else {
                F::NEG_INFINITY
            };
            lanes[l] = key.larger(lanes[l]);
        }
    };
    for (keys, ids) in key_chunks.iter().zip(id_chunks) {
        raise(keys, ids);
    }
    if !key_rest.is_empty() {
        raise(last_keys, last_ids);
    }
    let largest = reduce::max(&lanes);
    let floor = near.raise(largest, error);
    if largest < floor {
        return;
    }
    let any = |keys: &[F; CHUNK], ids: &[u32; CHUNK]| {
        let mut any = false;
        for l in 0..CHUNK {
            #[allow(
                clippy::needless_bitwise_bool,
                reason = "a branch would keep it from vectorising"
            )]
            {
                any |= takes_part(ids[l]) & (keys[l] >= floor);
            }
        }
        any
    };
    let mut push = |keys: &[F], ids: &[u32], first: usize| {
        for (l, (&key, &id)) in keys.iter().zip(ids).enumerate() {
            if takes_part(id) && key >= floor {
                near.push(key, first + l);
            }
        }
    };
    for (c, (keys, ids)) in key_chunks.iter().zip(id_chunks).enumerate() {
        if any(keys, ids) {
            push(keys, ids, first + c * CHUNK);
        }
    }
    if !key_rest.is_empty() && any(last_keys, last_ids) {
        push(key_rest, id_rest, first + key_chunks.len() * CHUNK);
    }
}
