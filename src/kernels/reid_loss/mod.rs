//! The losses of person re-identification.
//!
//! [`mining`] finds the hardest positive and negative of every row of features ([`matrix`]: of a
//! given matrix of distances, which [`distances`] computes), [`triplet`] turns these pairs into a loss
//! and a gradient, [`cross_entropy`] has the two classification losses.

pub mod cross_entropy;
pub mod distances;
pub mod matrix;
pub mod mining;
pub mod triplet;

use super::real::Real;
use super::reduce;

/// Squared distances below this are raised to it, and get no gradient.
pub const CLAMP: f64 = 1e-12;
/// A distance up to here was raised: the root of [`CLAMP`] in any type, however it is rounded.
pub const RAISED: f64 = 1.000_001e-6;
/// What tllib adds to a distance to exclude it from mining, and what remains where all are excluded.
pub const OFFSET: f64 = 1e7;
/// Norms below this are raised to it before a division by them.
pub const SMALLEST_NORM: f64 = 1e-12;

/// `|x - y|^2`, from the differences: exact where `|x|^2 + |y|^2 - 2 x.y` cancels.
#[inline(always)]
fn squared_distance<F: Real>(x: &[F], y: &[F]) -> f64 {
    reduce::sum_of_pairs(x, y, |x, y| {
        let difference = x - y;
        difference * difference
    })
}

/// The distance whose square is `square`. NaN stays NaN.
pub fn distance(square: f64) -> f64 {
    if square < CLAMP {
        CLAMP.sqrt()
    } else {
        square.sqrt()
    }
}
