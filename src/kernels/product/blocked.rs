//! Products on several threads with AVX-512, for processors on which libtorch's library has code for half of their
//! registers only: MKL's, on any that is not Intel's.
//!
//! The result is cut into blocks, each of which one thread computes. If both factors are contiguous along the sum,
//! `out_ij = sum_k x_ik y_kj` is a number of dot products, and what is read needs no other order (`Dots`). If the
//! rows of `y` are contiguous, or these products are short, it is a sum of multiples of the rows of `y`, a strip of
//! columns at a time (`Combine`).

use super::super::element::Element;
use super::super::isa::{Isa, Kernel, Level, dispatch, intel, level};
use super::super::parallel::{run_on, threads_for};
use super::super::real::Real;
use super::super::rows::{Rows, prefetch};
use std::array::from_fn;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::ops::Range;

/// Rows and columns of the result that [`Tiles::dots`] computes together.
pub const HIGH: usize = 4;
/// See [`HIGH`].
pub const WIDE: usize = 6;
/// Rows of the result that [`Tiles::combine`] computes together, and registers in a row of them.
pub const ROWS: usize = 8;
/// See [`ROWS`].
pub const STRIP: usize = 3;

/// Bytes of a row that the dot products of a block are computed over at a time: the rows of a tile stay in the first
/// cache, those of a block in the second.
const PIECE: usize = 1 << 12;
/// Rows of `y` whose multiples are added at a time: a strip of them stays in the first cache.
const DEPTH: usize = 192;
/// Rows of a block, at most.
const BLOCK: usize = 128;
/// Columns of a block are a multiple of this: of the widths of both kinds of tiles.
const COLUMNS: usize = 48;
/// Rows and columns of a block of a symmetric product: what is left out is more with smaller ones.
const SQUARE: Range<usize> = 48..144;
/// Blocks for each thread, so that all are done at nearly the same time.
const BLOCKS: usize = 4;
/// Multiplications in the time in which an element of the result is written.
const WRITE: usize = 16;
/// Multiplications that make another thread worthwhile.
const GRAIN: usize = 1 << 20;

/// Dot products as AVX-512 computes them at a time.
pub trait Dot: Sized {
    /// The type of the sums.
    type Sum: Element<Acc = Self::Sum> + Real;

    /// Whether the processor has the instructions, if it has AVX-512.
    fn there() -> bool;

    /// `sum_c x_rc y_sc` over `count` columns.
    ///
    /// # Safety
    /// The processor has AVX-512 as [`Level::Avx512`] says and what [`Dot::there`] asks for, and behind each address there
    /// are `count` elements.
    unsafe fn dots(
        x: [*const Self; HIGH],
        y: [*const Self; WIDE],
        count: usize,
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

/// Where a block is written.
struct Place<F> {
    start: *mut F,
    stride: usize,
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
    fn at(self, row: usize, column: usize) -> Self {
        Self {
            start: self.start.wrapping_add(row * self.stride + column),
            ..self
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

/// Whether these products are faster than those of libtorch's library.
pub fn faster() -> bool {
    level() == Level::Avx512 && !intel()
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
            self.run(limit, |block| dispatch(Combine(block)));
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
            self.run(limit, |block| dispatch(Dots(block)));
        }
        suitable
    }

    /// Calls `compute` with every block, on at most `limit` threads.
    fn run(&mut self, limit: usize, compute: impl Fn(Block<'_, E>) + Sync) {
        let (rows, cols) = self.out.shape;
        let each = self.x.cols().saturating_add(WRITE);
        let work = rows.saturating_mul(cols).saturating_mul(each);
        let threads = threads_for(work, GRAIN, limit);
        let compute = &compute;
        let jobs: Vec<_> = blocks((rows, cols), self.upper, threads)
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
/// sums of multiples need none; but for these the columns of `y` are copied, which must serve many rows. (Of bfloat16 both
/// factors would have to be converted first.)
fn short<E: Dot>((rows, cols): (usize, usize)) -> usize {
    let most = 160 * size_of::<E>() / size_of::<E::Sum>();
    (2 * rows.min(cols)).min(most)
}

/// The rows and columns of each block; with `upper` without those below the diagonal.
fn blocks(
    (rows, cols): (usize, usize),
    upper: bool,
    threads: NonZeroUsize,
) -> Vec<(Range<usize>, Range<usize>)> {
    let (high, wide) = if upper {
        let side = (rows / 8).next_multiple_of(COLUMNS);
        let side = side.clamp(SQUARE.start, SQUARE.end);
        (side, side)
    } else {
        let down = rows.div_ceil(BLOCK);
        let high = rows.div_ceil(down).next_multiple_of(ROWS);
        let across = match threads.get() {
            1 => 1,
            threads => (BLOCKS * threads).div_ceil(down),
        };
        (high, cols.div_ceil(across).next_multiple_of(COLUMNS))
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

/// A block of a product.
struct Block<'a, E: Dot> {
    x: Rows<'a, E>,
    y: Rows<'a, E>,
    out: Place<E::Sum>,
    add: bool,
}

struct Dots<'a, E: Dot>(Block<'a, E>);

impl<E: Element + Dot> Kernel for Dots<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Block { x, y, out, add } = self.0;
        let (y, depth, piece) = (y.transposed(), x.cols(), PIECE / size_of::<E>());
        for start in (0..depth).step_by(piece) {
            let count = piece.min(depth - start);
            for left in (0..y.rows()).step_by(WIDE) {
                let of_y = starts::<E, WIDE>(&y, left, start);
                for top in (0..x.rows()).step_by(HIGH) {
                    let of_x = starts::<E, HIGH>(&x, top, start);
                    // SAFETY: there are `count` columns from `start`, contiguous in both; `fits` looked at the
                    // instruction set.
                    let sums = unsafe { E::dots(of_x, of_y, count) };
                    let wide = WIDE.min(y.rows() - left);
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

struct Combine<'a, F: Dot>(Block<'a, F>);

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

#[cfg(test)]
mod tests {
    use super::super::super::element::Bf16;
    use super::*;

    fn numbers<F: Real>(count: usize, step: usize) -> Vec<F> {
        (0..count)
            .map(|k| F::of((k * step % 11) as f64 - 5.0))
            .collect()
    }

    /// Whole numbers, so that sums in any order are exact.
    fn matches_loops<F: Element<Acc = F> + Real + Tiles>(
        (n, k, m): (usize, usize, usize),
        threads: usize,
    ) {
        let (x, y) = (numbers::<F>(n * (k + 2), 7), numbers::<F>(k * m, 3));
        let expected = |i: usize, j: usize| -> f64 {
            let term = |c: usize| x[i * (k + 2) + c].to_f64() * y[c * m + j].to_f64();
            (0..k).map(term).sum()
        };
        let turned = |x: &[F], rows: usize, cols: usize| -> Vec<F> {
            (0..rows * cols)
                .map(|at| x[at % rows * cols + at / rows])
                .collect()
        };
        let (x_turned, y_turned) = (turned(&x, n, k + 2), turned(&y, k, m));
        let x_turned = Rows::contiguous(&x_turned, k + 2, n).unwrap().transposed();
        let y_turned = Rows::contiguous(&y_turned, m, k).unwrap().transposed();
        let x = Rows::contiguous(&x, n, k + 2).unwrap();
        let rows = Rows::contiguous(&y, k, m).unwrap();
        for (x, y) in [(x, y_turned), (x, rows), (x_turned, rows)] {
            for (add, upper) in [(false, false), (true, false), (true, true)] {
                let stride = m + 3;
                let mut out = vec![F::of(0.5); n * stride];
                // SAFETY: the matrix is in `out`, which nobody else has.
                let target = unsafe { Target::new(out.as_mut_ptr(), (n, m), stride) };
                let product = Product {
                    x: x.columns(0..k),
                    y,
                    out: target,
                    add,
                    upper,
                };
                if !product.compute(threads) {
                    let fits = n >= HIGH && m >= WIDE && k > 0;
                    assert!(level() < Level::Avx512 || !fits);
                    assert!(out.iter().all(|out| out.to_f64() == 0.5));
                    continue;
                }
                for (at, out) in out.iter().enumerate() {
                    let (i, j) = (at / stride, at % stride);
                    if j >= m {
                        assert_eq!(out.to_f64(), 0.5);
                    } else if j >= i || !upper {
                        let before = if add { 0.5 } else { 0.0 };
                        assert_eq!(out.to_f64(), before + expected(i, j), "{i} {j}");
                    }
                }
            }
        }
    }

    #[test]
    fn products_match_loops_in_every_size() {
        for sizes in [
            (4, 1, 6),
            (5, 17, 7),
            (8, 16, 48),
            (13, 200, 50),
            (3, 5, 9),
            (9, 5, 5),
            (8, 0, 8),
            (33, 1100, 97),
            (150, 30, 150),
            (300, 3, 100),
        ] {
            for threads in [1, 3] {
                matches_loops::<f32>(sizes, threads);
                matches_loops::<f64>(sizes, threads);
            }
        }
    }

    /// Numbers that bfloat16 has, and sums that float32 has.
    #[test]
    fn dot_products_of_bfloat16() {
        for (n, k, m) in [
            (4, 7, 6),
            (5, 32, 9),
            (13, 100, 50),
            (9, 2100, 8),
            (150, 333, 150),
        ] {
            let numbers = |count, step| -> Vec<Bf16> {
                let all = numbers::<f32>(count, step);
                all.into_iter().map(Bf16::store).collect()
            };
            let (x, y) = (numbers(n * (k + 2), 7), numbers(m * k, 3));
            for (threads, upper) in [(1, false), (3, false), (2, n == m)] {
                let mut out = vec![0.5f32; n * m];
                // SAFETY: the matrix is `out`, which nobody else has.
                let target = unsafe { Target::new(out.as_mut_ptr(), (n, m), m) };
                let product = Product {
                    x: Rows::contiguous(&x, n, k + 2).unwrap().columns(0..k),
                    y: Rows::contiguous(&y, m, k).unwrap().transposed(),
                    out: target,
                    add: true,
                    upper,
                };
                if !product.compute_dots(threads) {
                    let fits =
                        Bf16::there() && level() == Level::Avx512 && k >= short::<Bf16>((n, m));
                    assert!(!fits && out.iter().all(|&out| out == 0.5));
                    continue;
                }
                for (at, &out) in out.iter().enumerate() {
                    let (i, j) = (at / m, at % m);
                    let term = |c: usize| x[i * (k + 2) + c].load() * y[j * k + c].load();
                    let expected = 0.5 + (0..k).map(term).sum::<f32>();
                    assert!(out == expected || (upper && j < i), "{i} {j}");
                }
            }
        }
    }

    #[test]
    fn blocks_cover_each_place_once() {
        for (rows, cols) in [(1, 1), (32, 6400), (129, 47), (256, 256), (1000, 1000)] {
            for (upper, threads) in [(false, 1), (false, 3), (true, 2)] {
                let mut seen = vec![0; rows * cols];
                for (down, across) in
                    blocks((rows, cols), upper, NonZeroUsize::new(threads).unwrap())
                {
                    for i in down {
                        for j in across.clone() {
                            seen[i * cols + j] += 1;
                        }
                    }
                }
                for (at, &seen) in seen.iter().enumerate() {
                    let needed = !upper || at % cols >= at / cols;
                    assert!(seen == 1 || (seen == 0 && !needed), "{at}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_in_its_row_and_column() {
        let (mut x, y) = (vec![1.0f32; 9 * 20], vec![1.0f32; 20 * 50]);
        x[8 * 20 + 19] = f32::INFINITY;
        let mut out = vec![0.0; 9 * 50];
        // SAFETY: the matrix is in `out`, which nobody else has.
        let target = unsafe { Target::new(out.as_mut_ptr(), (9, 50), 50) };
        let product = Product {
            x: Rows::contiguous(&x, 9, 20).unwrap(),
            y: Rows::contiguous(&y, 20, 50).unwrap(),
            out: target,
            add: false,
            upper: false,
        };
        if product.compute(1) {
            assert!(out[..8 * 50].iter().all(|&out| out == 20.0));
            assert!(out[8 * 50..].iter().all(|&out| out == f32::INFINITY));
        }
    }
}
