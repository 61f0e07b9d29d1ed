//! Rows read column by column, so that each has a lane of its own.

use super::super::element::Element;
use super::super::lanes::{LANES, Lanes};
use super::Rows;
use std::array::from_fn;
use std::ops::Range;

impl<E: Element> Rows<'_, E> {
    /// Writes the columns of the rows of `range`, of which there are 1 to [`LANES`], in the computing type.
    /// Lanes without a row repeat the last one.
    ///
    /// # Panics
    /// If the range leaves the matrix, or `out` has not a place for every column: a mistake in a kernel.
    #[inline(always)]
    pub fn side_by_side(&self, range: Range<usize>, out: &mut [Lanes<E::Acc>]) {
        let count = range.len();
        assert!(
            (1..=LANES).contains(&count) && range.end <= self.height && out.len() == self.cols,
            "row range"
        );
        let first = self.slice(range);
        if count < LANES {
            first.columns_into(out, |k| k.min(count - 1) as isize * self.row_stride);
        } else if self.row_stride == 1 {
            first.columns_into(out, |k| k as isize);
        } else {
            first.columns_into(out, |k| k as isize * self.row_stride);
        }
    }

    /// The same of any rows, of which there are 1 to [`LANES`].
    ///
    /// # Panics
    /// As above.
    #[inline(always)]
    pub fn picked_side_by_side(&self, picked: &[usize], out: &mut [Lanes<E::Acc>]) {
        let count = picked.len();
        assert!(
            (1..=LANES).contains(&count)
                && picked.iter().all(|&i| i < self.height)
                && out.len() == self.cols,
            "picked rows"
        );
        let offsets: Lanes<isize> =
            from_fn(|k| picked[k.min(count - 1)] as isize * self.row_stride);
        self.columns_into(out, |k| offsets[k]);
    }

    /// Writes every column, in lane `k` the element `offset(k)` away from that of the first row.
    #[inline(always)]
    fn columns_into(&self, out: &mut [Lanes<E::Acc>], offset: impl Fn(usize) -> isize) {
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

/// Writes columns back as the rows of `range`, of which there are 1 to [`LANES`]; those of `out` lie one
/// behind the other.
///
/// # Panics
/// If the range leaves `out`: a mistake in a kernel.
#[inline(always)]
pub fn put_back<T: Copy>(columns: &[Lanes<T>], out: &mut [T], range: Range<usize>) {
    let (cols, rows) = (columns.len(), range.len());
    let out = &mut out[range.start * cols..range.end * cols];
    for (c, lanes) in columns.iter().enumerate() {
        let column = &mut out[c..];
        if rows == LANES {
            for (k, &lane) in lanes.iter().enumerate() {
                // SAFETY: `k * cols + c < LANES * cols`, the length of `out`.
                unsafe { *column.get_unchecked_mut(k * cols) = lane };
            }
        } else {
            for (out, &lane) in column.iter_mut().step_by(cols).zip(lanes) {
                *out = lane;
            }
        }
    }
}
