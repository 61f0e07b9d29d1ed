//! Rows read column by column, so that each has a lane of its own.

use super::super::element::Element;
use super::super::isa::{Isa, Kernel, dispatch};
use super::super::lanes::{LANES, Tile};
use super::Rows;
use std::ops::Range;

impl<E: Element> Rows<'_, E> {
    /// Writes the columns of the rows of `range`, of which there are 1 to [`LANES`], in the computing type.
    /// Lanes without a row repeat the last one.
    ///
    /// # Panics
    /// If the range leaves the matrix, or the tile has a different number of columns: a mistake in a kernel.
    #[inline(always)]
    pub fn side_by_side(&self, range: Range<usize>, out: &mut Tile<E::Acc>) {
        let count = range.len();
        assert!(
            (1..=LANES).contains(&count) && range.end <= self.height && out.len() == self.cols,
            "row range"
        );
        let rows = self.slice(range);
        if count == LANES {
            rows.columns_into(out, |k| k, rows.grouped(LANES));
        } else {
            rows.columns_into(out, |k| k.min(count - 1), None);
        }
    }

    /// The same for any rows, of which there are 1 to [`LANES`].
    ///
    /// # Panics
    /// As above.
    #[inline(always)]
    pub fn picked_side_by_side(&self, picked: &[usize], out: &mut Tile<E::Acc>) {
        let last = picked.len().wrapping_sub(1);
        assert!(
            last < LANES && picked.iter().all(|&i| i < self.height) && out.len() == self.cols,
            "picked rows"
        );
        self.columns_into(out, |k| picked[k.min(last)], None);
    }

    /// Writes every column, in lane `k` the element of row `row(k)`, which must exist. `whole` is those rows as a
    /// single one, if they are contiguous.
    #[inline(always)]
    fn columns_into(
        &self,
        out: &mut Tile<E::Acc>,
        row: impl Fn(usize) -> usize,
        whole: Option<Self>,
    ) {
        if self.col_stride == 1 && out.takes_rows() {
            if E::EXACT {
                out.take_rows(|k| E::exact(self.adjacent_row(row(k))).unwrap_or_default());
            } else {
                let mut rows = out.converted();
                // All at once where possible: short rows would not fill vectors.
                match whole {
                    Some(whole) => whole.copy_row(0, &mut rows),
                    None => self.convert_rows(row, &mut rows),
                }
                out.take_converted(rows);
            }
        } else {
            dispatch(Gather {
                rows: *self,
                row,
                out,
            });
        }
    }

    /// Writes rows contiguously, row `row(k)` in place `k`.
    #[inline(always)]
    fn convert_rows(&self, row: impl Fn(usize) -> usize, out: &mut [E::Acc]) {
        for (k, out) in out.chunks_exact_mut(self.cols).enumerate() {
            self.copy_row(row(k), out);
        }
    }
}

/// The columns of rows that are not contiguous, or too short to be transposed. Compiled separately from the kernels,
/// which would otherwise lose registers to it.
struct Gather<'a, 'b, E: Element, R> {
    rows: Rows<'a, E>,
    row: R,
    out: &'b mut Tile<E::Acc>,
}

impl<E: Element, R: Fn(usize) -> usize> Kernel for Gather<'_, '_, E, R> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Self { rows, row, out } = self;
        if rows.row_stride == 1 {
            // With a constant stride of 1, a column is read in one piece.
            rows.gather(out, |k| row(k) as isize);
        } else {
            rows.gather(out, |k| row(k) as isize * rows.row_stride);
        }
    }
}

impl<E: Element> Rows<'_, E> {
    /// Writes every column, in lane `k` the element `offset(k)` away from that of the first row.
    #[inline(always)]
    fn gather(&self, out: &mut Tile<E::Acc>, offset: impl Fn(usize) -> isize) {
        for (c, lanes) in out.iter_mut().enumerate() {
            let column = self.data.wrapping_offset(c as isize * self.col_stride);
            for (k, lane) in lanes.iter_mut().enumerate() {
                // SAFETY: the caller gives offsets of rows of this matrix, and has checked that there is a
                // place for `cols` columns: the constructor's contract covers the element.
                *lane = unsafe { *column.wrapping_offset(offset(k)) }.load();
            }
        }
    }
}
