//! Rows read one after the other: narrow ones are converted, or gathered from strides, several at a time.
//!
//! Columns that lie one behind the other are gathered row by row all the same: transposed in squares of 16,
//! sixteen rows at a time, they took up to twice as long.

use super::super::element::Element;
use super::super::isa::{Isa, Kernel, dispatch};
use super::super::real::Real;
use super::{Rows, prefetch};
use std::ops::Range;

/// Bytes of the next rows that a sweep asks for while it computes these. Rows that are longer keep the
/// processor's own prefetcher busy, which stops at each page and starts slowly.
const AHEAD: usize = 4096;
const CACHE_LINE: usize = 64;
/// Elements that are converted at a time where rows are narrow.
const GROUP: usize = 4096;

/// Room for converted rows of one matrix, and which ones it holds.
pub struct Scratch<F> {
    values: Vec<F>,
    held: Range<usize>,
}

impl<E: Element> Rows<'_, E> {
    /// Room for what [`Rows::in_turn`] converts.
    pub fn scratch(&self) -> Scratch<E::Acc> {
        self.room(1)
    }

    /// How many rows make a group of some thousand elements, at least one, and room for what
    /// [`Rows::block`] converts of so many.
    pub fn groups(&self) -> (usize, Scratch<E::Acc>) {
        let count = self.at_a_time().min(self.height.max(1));
        (count, self.room(count))
    }

    /// Room for what is converted together; none where `count` rows at a time never are.
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

    /// Whether `count` rows lie in memory as a sweep wants them.
    #[inline(always)]
    fn in_place(&self, count: usize) -> bool {
        E::exact(&[]).is_some() && self.col_stride == 1 && (count == 1 || self.adjacent())
    }

    /// How many rows are converted together, for the sake of the loop over them.
    fn at_a_time(&self) -> usize {
        (GROUP / self.cols.max(1)).max(1)
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

    /// The rows of `range`, one behind the other, in the computing type: the memory itself where that is
    /// possible, else a copy in `scratch`, which comes from this matrix and has room for so many. What
    /// follows is on its way to the cache when its turn comes.
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

    /// Asks for `count` rows from `i` on, which need not be there.
    #[inline(always)]
    fn ask_for(&self, i: usize, count: usize) {
        let next = self.start_of(i);
        let bytes = (count * self.cols * size_of::<E>()).min(AHEAD);
        for line in (0..bytes).step_by(CACHE_LINE) {
            prefetch(next.wrapping_byte_add(line));
        }
    }
}

/// Writes rows, at least one, one behind the other.
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
        for i in 0..rows.height {
            rows.copy_row(i, &mut out[i * rows.cols..]);
        }
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
