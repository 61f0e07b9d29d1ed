//! Rows read one after the other: narrow ones are converted, or gathered from strides, several at a time.
//!
//! Where columns are contiguous, whole cache lines are transposed if the lines of a row would be evicted before the
//! next row needs them. Batch sizes are usually powers of two, and so is then the stride between columns: such lines
//! map to few cache sets.

use super::super::element::Element;
use super::super::isa::{Isa, Kernel, dispatch};
use super::super::lanes::{LANES, Lanes};
use super::super::real::Real;
use super::{CACHE_LINE, Rows, prefetch};
use std::array::from_fn;
use std::ops::Range;

/// Bytes of the next rows that a sweep prefetches while it computes these. Beyond that, long rows are left to
/// the hardware prefetcher, which stops at each page and starts slowly.
const AHEAD: usize = 2048;
/// Elements that are converted at a time where rows are narrow.
const GROUP: usize = 4096;
/// The L1 cache: its minimum number of sets, and of lines per set.
const SETS: usize = 64;
const WAYS: usize = 8;
/// Columns that are transposed at a time: their lines stay cached even if all map to one set.
const AT_ONCE: usize = WAYS;

/// Room for converted rows of one matrix, and which ones it holds.
pub struct Scratch<F> {
    values: Vec<F>,
    held: Range<usize>,
}

impl<E: Element> Rows<'_, E> {
    /// Rows of `WIDEST / n` elements are taken `n` at a time by [`Rows::several`].
    pub const WIDEST: usize = GROUP;

    /// Room for what [`Rows::in_turn`] converts.
    pub fn scratch(&self) -> Scratch<E::Acc> {
        self.room(1)
    }

    /// How many rows make a group of some thousand elements, at least one, and room for what
    /// [`Rows::block`] converts of such a group.
    pub fn groups(&self) -> (usize, Scratch<E::Acc>) {
        let count = self.at_a_time().min(self.height.max(1));
        (count, self.room(count))
    }

    /// Room for the rows that are converted together; none if `count` rows at a time can be read in place.
    fn room(&self, count: usize) -> Scratch<E::Acc> {
        let converted = if self.in_place(count) {
            0
        } else {
            self.at_a_time().min(self.height)
        };
        Scratch {
            values: vec![E::Acc::ZERO; converted * self.cols],
            held: 0..0,
        }
    }

    /// Whether `count` rows at a time can be read in place.
    #[inline(always)]
    pub fn in_place(&self, count: usize) -> bool {
        E::EXACT && self.col_stride == 1 && (count == 1 || self.adjacent())
    }

    /// How many rows are converted together, to amortize the loop over them and to read each cache line once.
    fn at_a_time(&self) -> usize {
        let least = if self.transposes() { LANES } else { 1 };
        (GROUP / self.cols.max(1)).max(least)
    }

    /// Whether contiguous columns are read by the cache line, and not by the row.
    fn transposes(&self) -> bool {
        let apart = self.col_stride.unsigned_abs() * size_of::<E>() / CACHE_LINE;
        // The largest power of two that divides it: only every `step`-th set is used.
        let step = (apart & apart.wrapping_neg()).clamp(1, SETS);
        // Half precision is converted in vectors where it is contiguous.
        let converted = !E::EXACT && self.cols >= AT_ONCE;
        self.column_major() && (converted || self.cols > SETS / step * WAYS)
    }

    /// Row `i` in the computing type, for sweeps that take one row after the other. `scratch` comes from
    /// this matrix.
    ///
    /// # Panics
    /// If there is no row `i`: a mistake in a kernel.
    #[inline(always)]
    pub fn in_turn<'s>(&'s self, i: usize, scratch: &'s mut Scratch<E::Acc>) -> &'s [E::Acc] {
        self.block(i..i + 1, scratch)
    }

    /// The rows of `range`, contiguous, in the computing type: the memory itself where that is possible, else
    /// a copy in `scratch`, which comes from this matrix and has room for so many. The rows that follow are
    /// prefetched where they are adjacent.
    ///
    /// # Panics
    /// If the range leaves the matrix or the room: a mistake in a kernel.
    #[inline(always)]
    pub fn block<'s>(
        &'s self,
        range: Range<usize>,
        scratch: &'s mut Scratch<E::Acc>,
    ) -> &'s [E::Acc] {
        assert!(
            range.start <= range.end && range.end <= self.height,
            "row range"
        );
        if self.in_place(range.len()) {
            self.ask_for(range.end, range.len());
            let start = self.start_of(range.start);
            // SAFETY: the constructor's contract covers every element of these rows, which are adjacent.
            let rows = unsafe { std::slice::from_raw_parts(start, range.len() * self.cols) };
            if let Some(direct) = E::exact(rows) {
                return direct;
            }
        }
        if range.start < scratch.held.start || range.end > scratch.held.end {
            let end = self.height.min(range.start + self.at_a_time());
            scratch.held = range.start..end;
            dispatch(Convert {
                rows: self.slice(range.start..end),
                out: &mut scratch.values,
            });
        }
        let first = range.start - scratch.held.start;
        &scratch.values[first * self.cols..(first + range.len()) * self.cols]
    }

    /// `N` rows from `i` on, for sweeps that take so many at a time. `scratch` comes from this matrix, whose rows have
    /// at most `WIDEST / N` elements.
    ///
    /// # Panics
    /// If there are not so many rows, or they are too long: a mistake in a kernel.
    #[inline(always)]
    pub fn several<'s, const N: usize>(
        &'s self,
        i: usize,
        scratch: &'s mut Scratch<E::Acc>,
    ) -> [&'s [E::Acc]; N] {
        assert!(i + N <= self.height, "row range");
        if self.in_place(1) {
            return from_fn(|k| {
                self.ask_for(i + N + k, 1);
                E::exact(self.adjacent_row(i + k)).unwrap_or_default()
            });
        }
        let rows = self.block(i..i + N, scratch);
        from_fn(|k| &rows[k * self.cols..(k + 1) * self.cols])
    }

    /// Prefetches `count` rows from `i` on, which need not exist.
    #[inline(always)]
    fn ask_for(&self, i: usize, count: usize) {
        let next = self.start_of(i);
        let bytes = (count * self.cols * size_of::<E>()).min(AHEAD);
        for line in (0..bytes).step_by(CACHE_LINE) {
            prefetch(next.wrapping_byte_add(line));
        }
    }
}

/// Writes rows, at least one, contiguously.
struct Convert<'a, 'b, E: Element> {
    rows: Rows<'a, E>,
    out: &'b mut [E::Acc],
}

impl<E: Element> Kernel for Convert<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Self { rows, out } = self;
        if let Some(all) = rows.grouped(rows.height) {
            all.ask_for(1, 1);
            all.copy_row(0, out);
            return;
        }
        if rows.transposes() && rows.height >= LANES {
            rows.transpose_into(out);
            return;
        }
        for i in 0..rows.height {
            rows.copy_row(i, &mut out[i * rows.cols..]);
        }
    }
}

impl<E: Element> Rows<'_, E> {
    /// Writes all rows contiguously. The columns must be contiguous, and the matrix no smaller than a tile.
    #[inline(always)]
    fn transpose_into(&self, out: &mut [E::Acc]) {
        // The last tiles overlap the ones before.
        for i in (0..self.height).step_by(LANES) {
            let i = i.min(self.height - LANES);
            for j in (0..self.cols).step_by(AT_ONCE) {
                let j = j.min(self.cols - AT_ONCE);
                let tile = self.tile(i, j);
                for k in 0..LANES {
                    let row = &mut out[(i + k) * self.cols + j..][..AT_ONCE];
                    for c in 0..AT_ONCE {
                        row[c] = tile[c][k];
                    }
                }
            }
        }
    }

    /// [`LANES`] rows from `i` on of [`AT_ONCE`] columns from `j` on, column by column.
    #[inline(always)]
    fn tile(&self, i: usize, j: usize) -> [Lanes<E::Acc>; AT_ONCE] {
        assert!(i + LANES <= self.height && j + AT_ONCE <= self.cols && self.row_stride == 1);
        let first = self
            .start_of(i)
            .wrapping_offset(j as isize * self.col_stride);
        let mut tile = [[E::Acc::ZERO; LANES]; AT_ONCE];
        for (c, lanes) in tile.iter_mut().enumerate() {
            let column = first.wrapping_offset(c as isize * self.col_stride);
            for (k, lane) in lanes.iter_mut().enumerate() {
                // SAFETY: row `i + k` and column `j + c` exist: the constructor's contract covers the element.
                *lane = unsafe { *column.wrapping_add(k) }.load();
            }
        }
        tile
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::element::Bf16;
    use super::*;

    #[test]
    fn rows_in_place_need_no_room() {
        let data = [1.0f32; 24];
        let plain = Rows::contiguous(&data, 4, 6).unwrap();
        assert!(plain.scratch().values.is_empty() && plain.groups().1.values.is_empty());
        assert_eq!(plain.groups().0, 4);
        let empty = Rows::<Bf16>::contiguous(&[], 0, 6).unwrap();
        assert!(empty.groups().1.values.is_empty());
    }
}
