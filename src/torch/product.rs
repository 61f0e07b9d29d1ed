//! Matrix products computed by libtorch.

use super::Stored;
use crate::error::{Error, Result};
use crate::kernels::product::Multiply;
use tch::{Device, Tensor};

/// libtorch and its threads.
pub struct Libtorch;

impl<F: Stored> Multiply<F> for Libtorch {
    type Error = Error;

    fn dots(&self, x: &[F], y: &[F], width: usize, _upper: bool, out: &mut [F]) -> Result<()> {
        let across = y.len() / width.max(1);
        with(out, across, |out| {
            let _ = out.f_addmm_(&view(x, width)?, &view(y, width)?.f_tr()?)?;
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
        with(out, width, |out| {
            let x = view(x, width)?;
            let _ = out.f_addmm_(&x.f_tr()?, &x)?;
            Ok(())
        })
    }
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
