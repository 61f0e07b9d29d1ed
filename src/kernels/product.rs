//! Matrix products. Kernels say which; their caller chooses who multiplies: all threads, in a library or in `blocked`,
//! which is fast for large matrices, or this thread ([`Alone`]), which need not wait for others.

mod alone;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
pub mod blocked;

use super::real::Real;
pub use alone::Alone;
use std::hint::black_box;

/// An implementation of matrix products. Matrices are contiguous rows of equal length.
pub trait Multiply<F> {
    /// What may go wrong.
    type Error;

    /// `out_ij += sum_c x_ic y_jc` of rows of `width`; with `upper` only `j >= i` need be correct.
    fn dots(
        &self,
        x: &[F],
        y: &[F],
        width: usize,
        upper: bool,
        out: &mut [F],
    ) -> Result<(), Self::Error>;

    /// `out_ic = sum_j f_ij x_jc`, or with `add` `out_ic +=`; `width` is the number of columns.
    fn combine(
        &self,
        f: &[F],
        x: &[F],
        width: usize,
        add: bool,
        out: &mut [F],
    ) -> Result<(), Self::Error>;

    /// `out_cd += sum_i x_ic x_id` of rows of `width`. After the last call, [`Multiply::finish`] completes it.
    fn outer(&self, x: &[F], width: usize, out: &mut [F]) -> Result<(), Self::Error>;

    /// Writes what [`Multiply::outer`] left out.
    fn finish(&self, width: usize, out: &mut [F]);
}

/// Zeros to add products to, which are in memory. Those of `vec![0; n]` may be pages that the system makes when they
/// are written; a product that is added reads them first, and then each takes two faults, of which the second
/// interrupts the other processors.
pub fn zeros<F: Real>(count: usize) -> Vec<F> {
    let mut zeros = Vec::with_capacity(count);
    // Not seen to be 0, or the allocator would be asked for zeros again.
    zeros.resize(count, black_box(F::ZERO));
    zeros
}
