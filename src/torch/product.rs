//! Matrix products computed by libtorch. Of a symmetric one only panels on and above the diagonal are computed.

use super::{Stored, max_threads};
use crate::error::{Error, Result};
use crate::kernels::mirror::mirror;
use crate::kernels::parallel::threads_for;
use crate::kernels::product::Multiply;
use crate::kernels::real::Real;
use tch::{Device, Tensor};

/// Multiplications that make it worthwhile for a thread to take part in a product.
const PANEL_GRAIN: usize = 1 << 21;
/// Rows of a panel, at least and at most: with fewer a product is slow, with more less of it is left out.
const HEIGHTS: (usize, usize) = (64, 256);

/// The height of the panels of `x x^T`, each of which begins at its block of the diagonal, for `x` of this shape.
/// Half of the products is left out as the panels get low, and all threads shall have enough to do in each.
pub fn panel_height(rows: usize, cols: usize) -> usize {
    let mut height = (rows / 8 / 32 * 32).clamp(HEIGHTS.0, HEIGHTS.1);
    // The average panel is (rows + height) / 2 wide.
    while height < rows && height * (rows + height) / 2 * cols < PANEL_GRAIN * max_threads() {
        height *= 2;
    }
    height.min(rows).max(1)
}

/// Elements that one thread copies in the time that makes another thread worthwhile.
const COPY_GRAIN: usize = 1 << 16;

/// libtorch and its threads.
pub struct Libtorch;

impl<F: Stored + Real> Multiply<F> for Libtorch {
    type Error = Error;

    fn dots(&self, x: &[F], y: &[F], width: usize, upper: bool, out: &mut [F]) -> Result<()> {
        let across = y.len() / width.max(1);
        let (x, y) = (view(x, width)?, view(y, width)?.f_tr()?);
        with(out, across, |out| {
            if upper {
                return add_upper(&x, &y, out);
            }
            let _ = out.f_addmm_(&x, &y)?;
            Ok(())
        })
    }

    fn combine(&self, f: &[F], x: &[F], width: usize, add: bool, out: &mut [F]) -> Result<()> {
        with(out, width, |out| {
            let (f, x) = (view(f, x.len() / width.max(1))?, view(x, width)?);
            // In-place and out= forms are not subject to autocast.
            let _ = if add {
                out.f_addmm_(&f, &x)?
            } else {
                f.f_mm_out(out, &x)?
            };
            Ok(())
        })
    }

    fn outer(&self, x: &[F], width: usize, out: &mut [F]) -> Result<()> {
        let x = view(x, width)?;
        with(out, width, |out| add_upper(&x.f_tr()?, &x, out))
    }

    fn finish(&self, width: usize, out: &mut [F]) {
        let threads = threads_for(out.len() / 2, COPY_GRAIN, max_threads());
        mirror(out, width, threads);
    }
}

/// Adds what is on and above the diagonal of `x y`, a square matrix; below it some or all may be added as well.
fn add_upper(x: &Tensor, y: &Tensor, out: &Tensor) -> Result<()> {
    upper_panels(x, y, out, |x, y, panel| {
        let _ = panel.f_addmm_(x, y)?;
        Ok(())
    })
}

/// Calls `write` for every panel of `x y`, a square matrix, with its factors and its place in `out`: on and above the
/// diagonal all is covered.
pub fn upper_panels(
    x: &Tensor,
    y: &Tensor,
    out: &Tensor,
    mut write: impl FnMut(&Tensor, &Tensor, &mut Tensor) -> Result<()>,
) -> Result<()> {
    let (rows, cols) = x.size2()?;
    let height = panel_height(rows as usize, cols as usize) as i64;
    if height >= rows {
        return write(x, y, &mut out.shallow_clone());
    }
    for top in (0..rows).step_by(height as usize) {
        let (high, wide) = (height.min(rows - top), rows - top);
        let (x, y) = (x.f_narrow(0, top, high)?, y.f_narrow(1, top, wide)?);
        let mut panel = out.f_narrow(0, top, high)?.f_narrow(1, top, wide)?;
        write(&x, &y, &mut panel)?;
    }
    Ok(())
}

/// A tensor over the same memory, which must only be read and not outlive it.
fn view<F: Stored>(rows: &[F], cols: usize) -> Result<Tensor> {
    let size = [(rows.len() / cols.max(1)) as i64, cols as i64];
    let data = rows.as_ptr().cast::<u8>();
    // SAFETY: the slice has at least as many elements of this type; the callers keep the tensor within its
    // borrow and do not write it.
    Ok(unsafe { Tensor::f_from_blob(data, &size, &[size[1], 1], F::KIND, Device::Cpu)? })
}

/// Calls `write` with a tensor over the same memory.
fn with<F: Stored>(
    out: &mut [F],
    cols: usize,
    write: impl FnOnce(&mut Tensor) -> Result<()>,
) -> Result<()> {
    let size = [(out.len() / cols.max(1)) as i64, cols as i64];
    let data = out.as_mut_ptr().cast::<u8>();
    // SAFETY: the slice has at least as many elements of this type, is borrowed for this alone, and outlives
    // the tensor.
    let mut out = unsafe { Tensor::f_from_blob(data, &size, &[size[1], 1], F::KIND, Device::Cpu)? };
    write(&mut out)
}
