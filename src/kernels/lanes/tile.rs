//! The columns of [`LANES`] rows.

use super::super::element::Element;
use super::super::quad::{self, Quad, STEP};
use super::super::real::Real;
use super::super::rows::{CACHE_LINE, store_row};
use super::{LANES, Lanes};
use std::ops::{Deref, DerefMut, Range};

/// Storage for the columns of a tile of rows, each aligned to a cache line: an access that crosses two lines takes
/// twice as long.
pub struct Tile<F> {
    room: Vec<F>,
    first: usize,
    cols: usize,
    /// The contiguous rows, where they have to be converted.
    rows: Vec<F>,
}

impl<F: Real> Tile<F> {
    /// Columns of zeros.
    pub fn new(cols: usize) -> Self {
        let room = vec![F::ZERO; (cols + 1) * LANES];
        let first = room.as_ptr().align_offset(CACHE_LINE).min(LANES);
        Self {
            room,
            first,
            cols,
            rows: Vec::new(),
        }
    }

    /// Fills the tile with the columns of these rows. `rows(k)` has a number for every column, of which there are
    /// enough for [`Tile::takes_rows`].
    ///
    /// # Panics
    /// If there are fewer columns, or a row has a different length: a mistake in a kernel.
    #[inline(always)]
    pub fn take_rows<'a>(&mut self, rows: impl Fn(usize) -> &'a [F])
    where
        F: 'a,
    {
        let cols = self.cols;
        assert!(self.takes_rows(), "columns");
        let mut each = [&[] as &[F]; LANES];
        for (k, each) in each.iter_mut().enumerate() {
            *each = rows(k);
            assert_eq!(each.len(), cols, "columns");
        }
        let columns = &mut **self;
        for c in starts(cols) {
            for k in (0..LANES).step_by(STEP) {
                // SAFETY: each row has `cols` numbers, as just seen, and `c + STEP <= cols`.
                let quad = |k: usize| unsafe { &*each[k].as_ptr().add(c).cast::<Quad<F>>() };
                let block = F::transposed([quad(k), quad(k + 1), quad(k + 2), quad(k + 3)]);
                for (column, quad) in columns[c..c + STEP].iter_mut().zip(block) {
                    column[k..k + STEP].copy_from_slice(&quad);
                }
            }
        }
    }

    /// A buffer for [`LANES`] contiguous rows, which is returned to the tile by [`Tile::take_converted`].
    #[inline(always)]
    pub fn converted(&mut self) -> Vec<F> {
        let mut rows = std::mem::take(&mut self.rows);
        rows.resize(LANES * self.cols, F::ZERO);
        rows
    }

    /// Fills the tile with the columns of the rows in the buffer from [`Tile::converted`].
    #[inline(always)]
    pub fn take_converted(&mut self, rows: Vec<F>) {
        let cols = self.cols;
        self.take_rows(|k| &rows[k * cols..(k + 1) * cols]);
        self.rows = rows;
    }

    /// Whether there are columns enough to transpose several at a time.
    #[inline(always)]
    pub fn takes_rows(&self) -> bool {
        self.cols >= STEP
    }

    /// Writes the columns back as the rows of `range`, of which there are 1 to [`LANES`]; the rows of `out` are
    /// contiguous.
    ///
    /// # Panics
    /// If the range leaves `out`: a mistake in a kernel.
    #[inline(always)]
    pub fn put_back<E: Element<Acc = F>>(&mut self, out: &mut [E], range: Range<usize>) {
        let out = &mut out[range.start * self.cols..range.end * self.cols];
        if let Some(out) = E::exact_mut(out) {
            self.write_rows(out);
            return;
        }
        let mut rows = self.converted();
        self.write_rows(&mut rows[..out.len()]);
        store_row(&rows, F::ONE, out);
        self.rows = rows;
    }

    /// Writes as many rows as `out` has room for.
    ///
    /// # Panics
    /// If those are more than [`LANES`]: a mistake in a kernel.
    #[inline(always)]
    pub fn write_rows(&self, out: &mut [F]) {
        let cols = self.cols;
        let height = out.len() / cols.max(1);
        assert!(height <= LANES, "rows");
        let mut written = 0;
        if self.takes_rows() {
            written = height / STEP * STEP;
            for k in (0..written).step_by(STEP) {
                self.write_quads(k, &mut out[k * cols..(k + STEP) * cols]);
            }
        } else if height == LANES {
            self.write_narrow_rows(out);
            return;
        }
        for k in written..height {
            let row = &mut out[k * cols..(k + 1) * cols];
            for (x, lanes) in row.iter_mut().zip(self.iter()) {
                *x = lanes[k];
            }
        }
    }

    /// Writes [`STEP`] rows from lane `k` on; there must be at least as many columns.
    #[inline(always)]
    fn write_quads(&self, k: usize, rows: &mut [F]) {
        for c in starts(self.cols) {
            let block = quad::columns(self.as_flattened(), c * LANES + k, LANES);
            for (j, quad) in block.iter().enumerate() {
                rows[j * self.cols + c..][..STEP].copy_from_slice(quad);
            }
        }
    }

    /// Writes [`LANES`] rows of fewer than [`STEP`] columns.
    #[inline(always)]
    fn write_narrow_rows(&self, out: &mut [F]) {
        let cols = self.cols;
        assert_eq!(out.len(), LANES * cols, "rows");
        for (c, lanes) in self.iter().enumerate() {
            for (k, &lane) in lanes.iter().enumerate() {
                // SAFETY: `k * cols + c < LANES * cols`, the length of `out`, as just seen.
                unsafe { *out.get_unchecked_mut(k * cols + c) = lane };
            }
        }
    }
}

/// The starts of groups of [`STEP`] columns that together cover all `cols >= STEP` columns: the last group may overlap
/// the one before.
#[inline(always)]
fn starts(cols: usize) -> impl Iterator<Item = usize> {
    (0..cols).step_by(STEP).map(move |c| c.min(cols - STEP))
}

impl<F> Deref for Tile<F> {
    type Target = [Lanes<F>];

    #[inline(always)]
    fn deref(&self) -> &[Lanes<F>] {
        self.room[self.first..][..self.cols * LANES].as_chunks().0
    }
}

impl<F> DerefMut for Tile<F> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [Lanes<F>] {
        self.room[self.first..][..self.cols * LANES]
            .as_chunks_mut()
            .0
    }
}
