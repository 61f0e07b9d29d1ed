//! How the products of all rows with each other are computed once: `x_i . x_j` is `x_j . x_i`.

use crate::torch::max_threads;

/// Multiplications that make it worthwhile for a thread to take part in a product.
const GRAIN: usize = 1 << 21;
/// Rows of a panel, at least and at most: with fewer a product is slow, with more less of it is left out.
const HEIGHTS: (usize, usize) = (64, 256);

/// The height of the panels of `x x^T`, each of which begins at its block of the diagonal, for `x` of this shape.
/// Half of the products is left out as the panels get low, and all threads shall have enough to do in each.
pub fn height(rows: usize, cols: usize) -> usize {
    let mut height = (rows / 8 / 32 * 32).clamp(HEIGHTS.0, HEIGHTS.1);
    // The average panel is (rows + height) / 2 wide.
    while height < rows && height * (rows + height) / 2 * cols < GRAIN * max_threads() {
        height *= 2;
    }
    height.min(rows).max(1)
}
