//! A block of a product, computed by one thread: tile by tile, in an order in which what is read again is still in a
//! cache.

use super::super::super::element::Element;
use super::super::super::isa::{Isa, Kernel};
use super::super::super::real::Real;
use super::super::super::rows::{CACHE_LINE, Rows, prefetch};
use std::array::from_fn;

/// Rows and columns of the result that [`Dot::dots`] computes together.
pub const HIGH: usize = 4;
/// See [`HIGH`].
pub const WIDE: usize = 6;
/// Rows of the result that [`Tiles::combine`] computes together, and registers in a row of them.
pub const ROWS: usize = 8;
/// See [`ROWS`].
pub const STRIP: usize = 3;

/// Bytes of a row that the dot products of a block are computed over at a time, about: the rows of a tile stay in the
/// first cache, those of a block in the second.
const PIECE: usize = 1 << 12;
/// Rows of `y` whose multiples are added at a time: a strip of them stays in the first cache.
const DEPTH: usize = 192;

/// Dot products as AVX-512 computes them at a time.
pub trait Dot: Sized {
    /// The type of the sums.
    type Sum: Element<Acc = Self::Sum> + Real;

    /// Whether the processor has the instructions, if it has AVX-512.
    fn there() -> bool;

    /// `sum_c x_rc y_sc` over `count` columns. Meanwhile `ahead`, which may be any address, and what follows is
    /// prefetched.
    ///
    /// # Safety
    /// The processor has AVX-512 as [`Level::Avx512`](super::super::super::isa::Level) says and what [`Dot::there`]
    /// asks for, and behind each address of `x` and `y` there are `count` elements.
    unsafe fn dots(
        x: [*const Self; HIGH],
        y: [*const Self; WIDE],
        count: usize,
        ahead: *const Self,
    ) -> [[Self::Sum; WIDE]; HIGH];
}

/// Sums of multiples, of types that are computed as they are stored.
pub trait Tiles: Dot<Sum = Self> {
    /// Elements of a register.
    const LANES: usize;

    /// `out_rc = sum_k factors_kr strip_kc`, or with `add` `out_rc +=`, for `high` rows, `stride` apart, and `wide`
    /// columns. A row of `strip` is [`STRIP`] registers wide, of which the first `REGISTERS` are used.
    ///
    /// # Safety
    /// The processor has AVX-512 F, and the elements of `out` are there and nobody else's.
    unsafe fn combine<const REGISTERS: usize>(
        factors: &[[Self; ROWS]],
        strip: &[Self],
        out: (*mut Self, usize),
        size: (usize, usize),
        add: bool,
    );
}

/// Where a block is written.
pub struct Place<F> {
    pub start: *mut F,
    pub stride: usize,
}

impl<F> Clone for Place<F> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<F> Copy for Place<F> {}

// SAFETY: an address alone; who reads or writes there answers for it.
unsafe impl<F: Send> Send for Place<F> {}

impl<F> Place<F> {
    pub fn at(self, row: usize, column: usize) -> Self {
        Self {
            start: self.start.wrapping_add(row * self.stride + column),
            ..self
        }
    }
}

/// A block of a product.
pub struct Block<'a, E: Dot> {
    pub x: Rows<'a, E>,
    pub y: Rows<'a, E>,
    pub out: Place<E::Sum>,
    pub add: bool,
}

pub struct Dots<'a, E: Dot>(pub Block<'a, E>);

impl<E: Element + Dot> Kernel for Dots<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Block { x, y, out, add } = self.0;
        let (y, depth) = (y.transposed(), x.cols());
        let piece = piece::<E>(depth);
        let mut x_lines = Lines::new(&x, (x.rows(), piece), y.rows().div_ceil(WIDE));
        let mut y_lines = Lines::new(&y, (WIDE, piece), x.rows().div_ceil(HIGH));
        for start in (0..depth).step_by(piece) {
            let here = start..depth.min(start + piece);
            let x = at_lines(&mut x_lines, x.columns(here.clone()));
            for left in (0..y.rows()).step_by(WIDE) {
                // Each row is in another page than the last one, so that the processor would not foresee it.
                let ahead: [_; WIDE] = if left + WIDE < y.rows() {
                    starts(&y, left + WIDE, start)
                } else {
                    starts(&y, 0, here.end)
                };
                let wide = WIDE.min(y.rows() - left);
                let some = y.slice(left..left + wide).columns(here.clone());
                let of_y = starts(&at_lines(&mut y_lines, some), 0, 0);
                for (tile, top) in (0..x.rows()).step_by(HIGH).enumerate() {
                    let (of_x, ahead) = (starts(&x, top, 0), ahead[tile.min(WIDE - 1)]);
                    // SAFETY: there are so many columns, contiguous in both; `fits` looked at the instruction set.
                    let sums = unsafe { E::dots(of_x, of_y, here.len(), ahead) };
                    let high = HIGH.min(x.rows() - top);
                    for (r, sums) in sums.iter().enumerate().take(high) {
                        let to = out.at(top + r, left).start;
                        // SAFETY: the row and its columns are in the block, which nobody else accesses.
                        let to = unsafe { std::slice::from_raw_parts_mut(to, wide) };
                        for (to, &sum) in to.iter_mut().zip(sums) {
                            *to = if add || start > 0 { *to + sum } else { sum };
                        }
                    }
                }
            }
        }
    }
}

/// Columns of all pieces but the last, which is not longer: as equal as may be, in whole cache lines.
fn piece<E>(depth: usize) -> usize {
    let most = PIECE / size_of::<E>();
    // One that is an eighth longer is faster than one more.
    let count = depth.saturating_sub(most / 8).div_ceil(most).max(1);
    depth
        .div_ceil(count)
        .next_multiple_of(CACHE_LINE / size_of::<E>())
}

/// How many tiles must read a row for a copy to be faster than reading registers across two cache lines.
const READERS: usize = 5;

/// Room for rows that begin at cache lines.
struct Lines<E> {
    room: Vec<E>,
    /// The first element at a cache line.
    first: usize,
    /// Elements of a row.
    width: usize,
}

impl<E: Element> Lines<E> {
    /// For so many rows of `of`, and columns in whole cache lines, that so many tiles read. `None` if a copy gains
    /// nothing.
    fn new(of: &Rows<'_, E>, (rows, width): (usize, usize), tiles: usize) -> Option<Self> {
        if tiles < READERS || of.at_cache_lines() {
            return None;
        }
        let zero = E::store(E::Acc::ZERO);
        let room = vec![zero; rows * width + CACHE_LINE / size_of::<E>()];
        let first = room.as_ptr().align_offset(CACHE_LINE);
        Some(Self { room, first, width })
    }

    /// A copy of contiguous rows that there is room for.
    #[inline(always)]
    fn copy(&mut self, from: &Rows<'_, E>) -> Rows<'_, E> {
        let room = &mut self.room[self.first..][..from.rows() * self.width];
        for (i, to) in room.chunks_exact_mut(self.width).enumerate() {
            to[..from.cols()].copy_from_slice(from.adjacent_row(i));
        }
        Rows::padded(room, self.width, from.cols())
    }
}

/// The copy of a piece, or the piece itself where there is no room for one.
#[inline(always)]
fn at_lines<'a, E: Element>(lines: &'a mut Option<Lines<E>>, piece: Rows<'a, E>) -> Rows<'a, E> {
    match lines {
        Some(lines) => lines.copy(&piece),
        None => piece,
    }
}

/// The addresses of column `column` in the rows from `first`. The last row stands in for missing ones, whose sums are
/// discarded.
#[inline(always)]
fn starts<F: Element, const N: usize>(
    of: &Rows<'_, F>,
    first: usize,
    column: usize,
) -> [*const F; N] {
    from_fn(|r| of.address((first + r).min(of.rows() - 1), column))
}

pub struct Combine<'a, F: Dot>(pub Block<'a, F>);

impl<F: Element<Acc = F> + Real + Tiles> Kernel for Combine<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Block { x, y, out, add } = self.0;
        let (rows, cols, depth) = (x.rows(), y.cols(), x.cols());
        let long = STRIP * F::LANES;
        let deep = DEPTH.min(depth);
        let mut factors = vec![[F::ZERO; ROWS]; rows.div_ceil(ROWS) * deep];
        let mut strip = vec![F::ZERO; deep * long];
        for start in (0..depth).step_by(DEPTH) {
            let here = start..depth.min(start + DEPTH);
            let add = add || start > 0;
            for (k, factors) in factors.chunks_exact_mut(deep).enumerate() {
                gather(&x.columns(here.clone()), k * ROWS, factors);
            }
            for left in (0..cols).step_by(long) {
                let wide = long.min(cols - left);
                let from = y.slice(here.clone()).columns(left..left + wide);
                copy(&from, &mut strip);
                for (k, factors) in factors.chunks_exact(deep).enumerate() {
                    let top = k * ROWS;
                    let to = out.at(top, left);
                    let (factors, to) = (&factors[..here.len()], (to.start, to.stride));
                    let size = (ROWS.min(rows - top), wide);
                    // SAFETY: the rows and columns are in the block, which nobody else accesses; `fits` looked at
                    // the instruction set.
                    unsafe {
                        match wide.div_ceil(F::LANES) {
                            1 => F::combine::<1>(factors, &strip, to, size, add),
                            2 => F::combine::<2>(factors, &strip, to, size, add),
                            _ => F::combine::<STRIP>(factors, &strip, to, size, add),
                        }
                    }
                }
            }
        }
    }
}

/// Copies rows that are no wider than a strip, and asks for the next strip: few of its cache lines follow each other,
/// so that the processor would not foresee it.
#[inline(always)]
fn copy<F: Element<Acc = F> + Tiles>(from: &Rows<'_, F>, strip: &mut [F]) {
    let long = STRIP * F::LANES;
    if from.strides().1 != 1 {
        let columns = from.transposed();
        for c in 0..columns.rows() {
            let column = columns.row(c, &mut []);
            for (to, &value) in strip[c..].iter_mut().step_by(long).zip(column) {
                *to = value;
            }
        }
        return;
    }
    for (i, to) in strip.chunks_exact_mut(long).enumerate().take(from.rows()) {
        let row = from.row(i, &mut []);
        if row.len() == long {
            // Of constant length, which takes no call.
            to.copy_from_slice(&row[..long]);
            for register in 0..STRIP {
                prefetch(from.address(i, long + register * F::LANES));
            }
        } else {
            to[..row.len()].copy_from_slice(row);
        }
    }
}

/// Some rows of `x`, column by column. The last row stands in for missing ones.
#[inline(always)]
fn gather<F: Element>(x: &Rows<'_, F>, first: usize, out: &mut [[F; ROWS]]) {
    let rows: [_; ROWS] = from_fn(|r| (first + r).min(x.rows() - 1));
    for (c, out) in out.iter_mut().enumerate().take(x.cols()) {
        for (out, &row) in out.iter_mut().zip(&rows) {
            // SAFETY: row and column are in the matrix.
            *out = unsafe { *x.address(row, c) };
        }
    }
}
