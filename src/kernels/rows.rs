//! A matrix in memory that somebody else owns: any strides, any element type.

use super::element::Element;
use super::isa::{Isa, Kernel, dispatch};
use super::real::Real;
use std::marker::PhantomData;
mod in_turn;
mod side_by_side;
mod spread;

pub use in_turn::Scratch;
pub use spread::Spread;

/// Bytes that a processor's caches load together.
pub const CACHE_LINE: usize = 64;
/// Elements that are put side by side before they are converted.
const APART: usize = 64;

/// A read-only matrix of `rows` x `cols` elements with arbitrary strides (in elements).
#[derive(Clone, Copy)]
pub struct Rows<'a, E> {
    data: *const E,
    height: usize,
    cols: usize,
    row_stride: isize,
    col_stride: isize,
    owner: PhantomData<&'a [E]>,
}

// SAFETY: it is a shared borrow of plain numbers, like `&[E]`.
unsafe impl<E: Element> Send for Rows<'_, E> {}
// SAFETY: as above.
unsafe impl<E: Element> Sync for Rows<'_, E> {}

impl<'a, E: Element> Rows<'a, E> {
    /// A contiguous matrix. `None` where the slice does not have `rows * cols` elements.
    pub fn contiguous(data: &'a [E], rows: usize, cols: usize) -> Option<Self> {
        (rows.checked_mul(cols) == Some(data.len())).then_some(Self {
            data: data.as_ptr(),
            height: rows,
            cols,
            row_stride: cols as isize,
            col_stride: 1,
            owner: PhantomData,
        })
    }

    /// The first `cols` columns of each whole row of `data`, whose rows are `width` long.
    ///
    /// # Panics
    /// If there are more columns: a mistake in a kernel.
    pub fn padded(data: &'a [E], width: usize, cols: usize) -> Self {
        assert!(cols <= width && width > 0, "columns");
        Self {
            data: data.as_ptr(),
            height: data.len() / width,
            cols,
            row_stride: width as isize,
            col_stride: 1,
            owner: PhantomData,
        }
    }

    /// A matrix with strides.
    ///
    /// # Safety
    /// For all `i < rows`, `j < cols` the address `data + i * strides.0 + j * strides.1` must be
    /// inside one live allocation, aligned, initialized, and not written during `'a`.
    pub unsafe fn strided(data: *const E, shape: (usize, usize), strides: (isize, isize)) -> Self {
        Self {
            data,
            height: shape.0,
            cols: shape.1,
            row_stride: strides.0,
            // torch considers a matrix of one column contiguous whatever this stride, and so do
            // kernels that require contiguous rows.
            col_stride: if shape.1 > 1 { strides.1 } else { 1 },
            owner: PhantomData,
        }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.height
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The rows of `range`, which lies within them.
    ///
    /// # Panics
    /// If the range leaves the matrix: a mistake in a kernel.
    #[must_use]
    pub fn slice(&self, range: std::ops::Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.height,
            "row range"
        );
        let data = self
            .data
            .wrapping_offset(range.start as isize * self.row_stride);
        Self {
            data,
            height: range.len(),
            ..*self
        }
    }

    /// The columns of `range`, which lies within them.
    ///
    /// # Panics
    /// If the range leaves the matrix: a mistake in a kernel.
    #[must_use]
    pub fn columns(&self, range: std::ops::Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.cols,
            "column range"
        );
        let data = self
            .data
            .wrapping_offset(range.start as isize * self.col_stride);
        Self {
            data,
            cols: range.len(),
            ..*self
        }
    }

    /// Each group of `count` rows as one long row, without the remainder. `None` unless the rows
    /// follow each other in memory.
    pub fn grouped(&self, count: usize) -> Option<Self> {
        let (rows, cols) = (self.height / count.max(1), self.cols * count);
        self.adjacent().then_some(Self {
            height: rows,
            cols,
            row_stride: cols as isize,
            ..*self
        })
    }

    /// The columns as rows.
    #[must_use]
    pub fn transposed(&self) -> Self {
        Self {
            height: self.cols,
            cols: self.height,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..*self
        }
    }

    /// Whether the elements of a column, and not those of a row, follow each other in memory.
    pub fn column_major(&self) -> bool {
        self.row_stride == 1 && self.col_stride != 1
    }

    /// Whether every row begins at a cache line.
    pub fn at_cache_lines(&self) -> bool {
        let bytes = self.row_stride.unsigned_abs() * size_of::<E>();
        self.data.addr().is_multiple_of(CACHE_LINE) && bytes.is_multiple_of(CACHE_LINE)
    }

    /// The distances from one row to the next, and from one column to the next.
    pub fn strides(&self) -> (isize, isize) {
        (self.row_stride, self.col_stride)
    }

    /// The address of an element, or where it would be.
    #[inline(always)]
    pub fn address(&self, row: usize, column: usize) -> *const E {
        self.start_of(row)
            .wrapping_offset(column as isize * self.col_stride)
    }

    /// An element in the computing type.
    ///
    /// # Panics
    /// If there is no such element: a mistake in a kernel.
    #[inline(always)]
    pub fn element(&self, row: usize, column: usize) -> E::Acc {
        assert!(row < self.height && column < self.cols, "position");
        // SAFETY: the constructor's contract covers the element.
        unsafe { *self.address(row, column) }.load()
    }

    /// Whether both are the same memory, read the same way.
    pub fn same(&self, other: &Self) -> bool {
        std::ptr::eq(self.data, other.data)
            && (self.height, self.cols) == (other.height, other.cols)
            && (self.row_stride, self.col_stride) == (other.row_stride, other.col_stride)
    }

    /// All elements, row after row, where they follow each other in memory.
    pub fn whole(&self) -> Option<&'a [E]> {
        let len = self.height * self.cols;
        if len == 0 {
            return Some(&[]);
        }
        // The row stride of a single row is meaningless.
        let one_piece = self.adjacent() || (self.height == 1 && self.col_stride == 1);
        // SAFETY: the constructor's contract covers every element, and they are adjacent.
        one_piece.then(|| unsafe { std::slice::from_raw_parts(self.data, len) })
    }

    /// Whether the rows follow each other in memory.
    #[inline(always)]
    fn adjacent(&self) -> bool {
        self.col_stride == 1 && self.row_stride == self.cols as isize
    }

    /// The address of row `i`, or where it would be.
    #[inline(always)]
    fn start_of(&self, i: usize) -> *const E {
        self.data.wrapping_offset(i as isize * self.row_stride)
    }

    /// Row `i` in the computing type, in any order of rows: the memory itself where that is possible, else
    /// a copy in `room`, which then has a place for every column.
    ///
    /// # Panics
    /// If there is no row `i`: a mistake in a kernel.
    #[inline(always)]
    pub fn row<'s>(&'s self, i: usize, room: &'s mut [E::Acc]) -> &'s [E::Acc] {
        if self.col_stride == 1
            && let Some(direct) = E::exact(self.adjacent_row(i))
        {
            return direct;
        }
        self.copy_row(i, room);
        &room[..self.cols]
    }

    /// Writes row `i` into `out`.
    #[inline(always)]
    fn copy_row(&self, i: usize, out: &mut [E::Acc]) {
        let out = &mut out[..self.cols];
        if self.col_stride == 1 {
            for (o, &value) in out.iter_mut().zip(self.adjacent_row(i)) {
                *o = value.load();
            }
            return;
        }
        assert!(i < self.height, "row index");
        let start = self.start_of(i);
        if E::EXACT {
            for (j, o) in out.iter_mut().enumerate() {
                // SAFETY: the row has as many columns as `out`: the constructor's contract covers it.
                *o = unsafe { *start.wrapping_offset(j as isize * self.col_stride) }.load();
            }
            return;
        }
        for (k, out) in out.chunks_mut(APART).enumerate() {
            let start = start.wrapping_offset((k * APART) as isize * self.col_stride);
            // SAFETY: as above; no chunk is empty.
            let mut side_by_side = [unsafe { *start }; APART];
            for (j, value) in side_by_side.iter_mut().enumerate().take(out.len()) {
                // SAFETY: as above.
                *value = unsafe { *start.wrapping_offset(j as isize * self.col_stride) };
            }
            for (o, value) in out.iter_mut().zip(side_by_side) {
                *o = value.load();
            }
        }
    }

    /// The memory of row `i`, whose elements are adjacent.
    ///
    /// # Panics
    /// If they are not, or there is no row `i`: a mistake in a kernel.
    #[inline(always)]
    pub fn adjacent_row(&self, i: usize) -> &[E] {
        assert!(i < self.height && self.col_stride == 1, "row index");
        // SAFETY: the constructor's contract covers every element of row `i < rows`, and at stride 1
        // they are adjacent.
        unsafe { std::slice::from_raw_parts(self.start_of(i), self.cols) }
    }
}

/// Prefetches the cache line of `address`, which may be any address.
#[inline(always)]
pub fn prefetch<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch accesses nothing that the program could see, and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// The same into the second cache, where the first is full of what is needed before.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub fn prefetch_far<T>(address: *const T) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: as above.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) };
}

/// Stores `values`, times `scale`, into `out`.
#[inline(always)]
pub fn store_row<E: Element>(values: &[E::Acc], scale: E::Acc, out: &mut [E]) {
    for (o, &v) in out.iter_mut().zip(values) {
        *o = E::store(v * scale);
    }
}

/// Rounds `values` into `out`.
pub fn round<E: Element>(values: &[f64], out: &mut [E]) {
    dispatch(Round { values, out });
}

struct Round<'a, 'b, E> {
    values: &'a [f64],
    out: &'b mut [E],
}

impl<E: Element> Kernel for Round<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        for (o, &value) in self.out.iter_mut().zip(self.values) {
            *o = E::store(E::Acc::of(value));
        }
    }
}

#[cfg(test)]
mod tests;
