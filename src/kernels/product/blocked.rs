//! Products on several threads with AVX-512. They serve processors on which libtorch's library has code for half of
//! their registers only: MKL's, on any that is not Intel's. On Intel's they serve small results and few long rows,
//! for which MKL's code is slow.
//!
//! The result is cut into blocks, each of which one thread computes. If both factors are contiguous along the sum,
//! `out_ij = sum_k x_ik y_kj` is a number of dot products, and what is read needs no other order (`Dots`). If the
//! rows of `y` are contiguous, or these products are short, it is a sum of multiples of the rows of `y`, a strip of
//! columns at a time (`Combine`).

mod block;

use super::super::element::Element;
use super::super::isa::{Level, dispatch, intel, level};
use super::super::parallel::{run_on, threads_for};
use super::super::real::Real;
use super::super::rows::Rows;
use block::{Block, Combine, Dots, Place};
pub use block::{Dot, HIGH, ROWS, STRIP, Tiles, WIDE};
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::ops::Range;

/// Rows of a block, at most.
const BLOCK: usize = 128;
/// How the blocks of a product are cut.
#[derive(Clone, Copy)]
struct Cut {
    /// Their columns are a multiple of this.
    unit: usize,
    /// Whether low blocks are as fast as high ones: what all rows of a block share is not copied, or only where it does
    /// not begin at cache lines.
    low: bool,
}

/// Of dot products: the unit is a multiple of the width and the height of their tiles.
const DOTS: Cut = Cut {
    unit: 24,
    low: true,
};
/// Of sums of multiples: the unit is a multiple of the width of their strips.
const STRIPS: Cut = Cut {
    unit: 48,
    low: false,
};
/// Rows and columns of a block of a symmetric product, at most: with smaller ones more is left out.
const SQUARE: usize = 144;
/// Blocks for each thread, so that all are done at nearly the same time.
const BLOCKS: usize = 4;
/// Multiplications in the time in which an element of the result is written.
const WRITE: usize = 16;
/// Multiplications that make another thread worthwhile.
const GRAIN: usize = 1 << 20;
/// Numbers in a result whose dot products Intel's own library takes longer for, on its processors: 128 x 128.
const SMALL: usize = 1 << 14;
/// The same of few rows and any columns, if the dot products are long: the library packs all of `y` for them.
const FEW: usize = 64;
/// Bytes of a long row.
const LONG: usize = 1 << 11;

/// A matrix that is written: contiguous rows, `stride` apart.
pub struct Target<'a, F> {
    place: Place<F>,
    shape: (usize, usize),
    owner: PhantomData<&'a mut [F]>,
}

impl<F> Target<'_, F> {
    /// A matrix of this shape.
    ///
    /// # Safety
    /// The elements `start + i * stride + j` are inside one live allocation, aligned, and nobody else's during `'a`.
    pub unsafe fn new(start: *mut F, shape: (usize, usize), stride: usize) -> Self {
        Self {
            place: Place { start, stride },
            shape,
            owner: PhantomData,
        }
    }
}

/// `out = x y`.
pub struct Product<'a, E: Dot> {
    /// (n, k)
    pub x: Rows<'a, E>,
    /// (k, m)
    pub y: Rows<'a, E>,
    /// (n, m)
    pub out: Target<'a, E::Sum>,
    /// Whether it is added to what is there.
    pub add: bool,
    /// Whether only what is on and above the diagonal need be correct.
    pub upper: bool,
}

/// Which of these products are faster than those of libtorch's library.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Faster {
    /// All.
    All,
    /// Those that are [`Product::small`].
    Small,
    /// None.
    None,
}

/// Which are on this processor.
pub fn faster() -> Faster {
    match level() {
        Level::Avx512 if intel() => Faster::Small,
        Level::Avx512 => Faster::All,
        _ => Faster::None,
    }
}

impl<F: Element<Acc = F> + Real + Tiles> Product<'_, F> {
    /// Computes it on at most `limit` threads. False, and nothing is done, where the processor has no AVX-512, for
    /// products that have no room for a tile, and where neither rows nor columns of `y` are contiguous.
    ///
    /// # Panics
    /// If the shapes do not match: a mistake in a kernel.
    pub fn compute(mut self, limit: usize) -> bool {
        self.fits() && (self.dots(limit) || self.combine(limit))
    }

    /// As sums of multiples; false, and nothing is done, unless rows or columns of `y` are contiguous.
    fn combine(&mut self, limit: usize) -> bool {
        let (down, across) = self.y.strides();
        let suitable = down == 1 || across == 1;
        if suitable {
            self.run(limit, STRIPS, |block| dispatch(Combine(block)));
        }
        suitable
    }
}

impl<E: Element + Dot> Product<'_, E> {
    /// The same by dot products alone. False, and nothing is done, also where these are too short to be fast.
    ///
    /// # Panics
    /// If the shapes do not match: a mistake in a kernel.
    pub fn compute_dots(mut self, limit: usize) -> bool {
        self.fits() && self.dots(limit)
    }

    /// Whether the result is so small, or has so few rows, that [`Product::compute_dots`] is faster on an Intel
    /// processor as well. A symmetric one may be four times as large, for half of it is left out, and one of short rows
    /// that do not begin at cache lines only a quarter.
    pub fn small(&self) -> bool {
        let (rows, cols) = self.out.shape;
        let parts = if self.upper { 4 } else { 1 };
        let long = self.x.cols().saturating_mul(size_of::<E>()) >= LONG;
        let most = if long || (self.x.at_cache_lines() && self.y.transposed().at_cache_lines()) {
            SMALL
        } else {
            SMALL / 4
        };
        (long && rows <= FEW) || rows.saturating_mul(cols) / parts <= most
    }

    /// Whether there is room for a tile and the processor can compute it.
    fn fits(&self) -> bool {
        let Self { x, y, out, .. } = self;
        let (rows, cols) = out.shape;
        assert!(
            (x.rows(), x.cols(), y.cols()) == (rows, y.rows(), cols),
            "shapes of a product"
        );
        let room = rows >= HIGH && cols >= WIDE && x.cols() > 0;
        room && level() == Level::Avx512 && E::there()
    }

    /// As dot products; false, and nothing is done, unless both factors are contiguous along these, and they are long.
    fn dots(&mut self, limit: usize) -> bool {
        let along = self.x.strides().1 == 1 && self.y.strides().0 == 1;
        let suitable = along && self.x.cols() >= short::<E>(self.out.shape);
        if suitable {
            self.run(limit, DOTS, |block| dispatch(Dots(block)));
        }
        suitable
    }

    /// Calls `compute` with every block, on at most `limit` threads.
    fn run(&mut self, limit: usize, cut: Cut, compute: impl Fn(Block<'_, E>) + Sync) {
        let (rows, cols) = self.out.shape;
        let each = self.x.cols().saturating_add(WRITE);
        let work = rows.saturating_mul(cols).saturating_mul(each);
        let threads = threads_for(work, GRAIN, limit);
        let compute = &compute;
        let jobs: Vec<_> = blocks((rows, cols), self.upper, cut, threads)
            .into_iter()
            .map(|(down, across)| {
                let block = Block {
                    out: self.out.place.at(down.start, across.start),
                    x: self.x.slice(down),
                    y: self.y.columns(across),
                    add: self.add,
                };
                move || compute(block)
            })
            .collect();
        run_on(threads, jobs);
    }
}

/// How many elements a dot product has, at least. Across the lanes of a register, a sum takes many instructions, and
/// sums of multiples need none; but for these the columns of `y` are copied, which must serve many rows. (Of bfloat16
/// both factors would have to be converted first.)
fn short<E: Dot>((rows, cols): (usize, usize)) -> usize {
    let most = 160 * size_of::<E>() / size_of::<E::Sum>();
    (2 * rows.min(cols)).min(most)
}

/// The rows and columns of each block; with `upper` without those below the diagonal.
fn blocks(
    (rows, cols): (usize, usize),
    upper: bool,
    Cut { unit, low }: Cut,
    threads: NonZeroUsize,
) -> Vec<(Range<usize>, Range<usize>)> {
    let (high, wide) = if upper {
        let side = (rows / 8).next_multiple_of(unit).clamp(unit, SQUARE);
        (side, side)
    } else {
        let count = match threads.get() {
            1 => 1,
            threads => BLOCKS * threads,
        };
        let down = rows.div_ceil(BLOCK);
        let wide = cols.div_ceil(count.div_ceil(down)).next_multiple_of(unit);
        let down = if low {
            down.max(count.div_ceil(cols.div_ceil(wide)))
        } else {
            down
        };
        (rows.div_ceil(down).next_multiple_of(ROWS), wide)
    };
    let pieces = |count: usize, size: usize| {
        (0..count)
            .step_by(size)
            .map(move |start| start..count.min(start + size))
    };
    pieces(rows, high)
        .flat_map(|down| pieces(cols, wide).map(move |across| (down.clone(), across)))
        .filter(|(down, across)| !upper || across.end > down.start)
        .collect()
}

#[cfg(test)]
mod tests;
