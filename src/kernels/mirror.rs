//! Symmetric matrices of which one triangle is computed and copied into the other.

use super::parallel::run;
use super::quad::{Quad, STEP};
use super::real::Real;
use std::num::NonZeroUsize;
use std::ops::Range;

/// Rows and columns of a matrix that are transposed together: those of a cache line.
const TILE: usize = 16;

/// A triangle of a square matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Triangle {
    /// Row `i` of `n` has `n - i` elements.
    Upper,
    /// Row `i` has `i` elements.
    Lower,
}

impl Triangle {
    /// Splits the `n` rows into parts of nearly equal area, at most one for each thread.
    pub fn split(self, n: usize, threads: NonZeroUsize) -> Vec<Range<usize>> {
        let parts = threads.get().min(n.max(1));
        let boundary = |k: usize| {
            let area = k as f64 / parts as f64;
            let share = match self {
                Self::Upper => 1.0 - (1.0 - area).sqrt(),
                Self::Lower => area.sqrt(),
            };
            (n as f64 * share).round() as usize
        };
        (0..parts).map(|k| boundary(k)..boundary(k + 1)).collect()
    }
}

/// Copies what is above the diagonal of a matrix of `n` rows and columns below it.
///
/// # Panics
/// If the matrix has another size: a mistake in a kernel.
pub fn mirror<F: Real>(matrix: &mut [F], n: usize, threads: NonZeroUsize) {
    assert_eq!(matrix.len(), n * n, "a square matrix");
    let square = Square {
        start: matrix.as_mut_ptr(),
        n,
    };
    let jobs: Vec<_> = Triangle::Lower
        .split(n, threads)
        .into_iter()
        .map(|rows| {
            // SAFETY: the matrix is borrowed for this function, the rows are in it, and no two jobs share one.
            move || unsafe { square.mirror(rows) }
        })
        .collect();
    run(jobs);
}

/// A matrix whose rows several threads write.
#[derive(Clone, Copy)]
struct Square<F> {
    start: *mut F,
    n: usize,
}

// SAFETY: an address alone; who reads or writes there answers for it.
unsafe impl<F: Send + Sync> Send for Square<F> {}

impl<F: Real> Square<F> {
    /// # Safety
    /// `start` is valid for `n * n` elements, `rows` are among the `n`, and nobody else accesses these rows below the
    /// diagonal, nor writes above it, until this returns.
    unsafe fn mirror(self, rows: Range<usize>) {
        for top in rows.clone().step_by(TILE) {
            let bottom = rows.end.min(top + TILE);
            let mut left = 0;
            // Tiles that the diagonal does not cross.
            while bottom == top + TILE && left + TILE <= top {
                // SAFETY: per contract; all columns of the tile are before its first row.
                unsafe { self.whole(top, left) };
                left += TILE;
            }
            for j in left..bottom {
                for i in top.max(j + 1)..bottom {
                    // SAFETY: `j < i < n`, and row `i` below the diagonal is this call's; above it nobody writes.
                    unsafe { *self.at(i, j) = *self.at(j, i) };
                }
            }
        }
    }

    /// Fills the tile at this row and column.
    ///
    /// # Safety
    /// As [`Square::mirror`] for the rows of the tile, which exist, and whose columns are all before `top`.
    unsafe fn whole(self, top: usize, left: usize) {
        for i in (top..top + TILE).step_by(STEP) {
            for j in (left..left + TILE).step_by(STEP) {
                // SAFETY: `STEP` elements of row `j + k`, which are above the diagonal: `j + k < i`. Nobody writes
                // them.
                let quad = |k: usize| unsafe { &*self.at(j + k, i).cast::<Quad<F>>() };
                let rows = F::transposed([quad(0), quad(1), quad(2), quad(3)]);
                for (k, row) in rows.into_iter().enumerate() {
                    // SAFETY: as many of row `i + k` below the diagonal, which are this call's.
                    unsafe { *self.at(i + k, j).cast::<Quad<F>>() = row };
                }
            }
        }
    }

    /// The address of an element.
    fn at(self, row: usize, column: usize) -> *mut F {
        self.start.wrapping_add(row * self.n + column)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn triangles_are_split_into_equal_parts() {
        for n in [0usize, 1, 7, 100, 1000] {
            for threads in 1..6 {
                for (triangle, area) in [
                    (Triangle::Upper, (|n, i| n - i) as fn(usize, usize) -> usize),
                    (Triangle::Lower, |_, i| i),
                ] {
                    let ranges = triangle.split(n, NonZeroUsize::new(threads).unwrap());
                    assert_eq!((ranges[0].start, ranges[ranges.len() - 1].end), (0, n));
                    assert!(ranges.windows(2).all(|w| w[0].end == w[1].start));
                    let areas = ranges.iter().cloned();
                    let areas = areas.map(|rows| rows.map(|i| area(n, i)).sum::<usize>());
                    let fair = n * n / 2 / ranges.len();
                    assert!(
                        areas.into_iter().all(|a| a.abs_diff(fair) <= 2 * n),
                        "{ranges:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_upper_triangle_is_copied() {
        for n in [0usize, 1, 15, 16, 17, 50, 131] {
            for threads in [1, 2, 5] {
                let at = |k: usize| (k / n * 100 + k % n) as f64;
                let mut matrix: Vec<f64> = (0..n * n).map(at).collect();
                mirror(&mut matrix, n, NonZeroUsize::new(threads).unwrap());
                for (k, &value) in matrix.iter().enumerate() {
                    let (i, j) = (k / n, k % n);
                    assert_eq!(value, (i.min(j) * 100 + i.max(j)) as f64);
                }
            }
        }
    }
}
