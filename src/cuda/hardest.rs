//! Launch of `hardest.cu`.

use super::args::{self, Matrix};
use super::device::{Launch, Stream};
use crate::error::Result;
use crate::torch::Dtype;
use crate::torch::input::Input;
use tch::{Kind, Tensor};

const THREADS: u32 = 256;

#[repr(C)]
struct Args {
    distances: Matrix,
    identity: Matrix,
    rows: i64,
    cols: i32,
    positive: *mut std::ffi::c_void,
    negative: *mut std::ffi::c_void,
}

// SAFETY: the fields of `Hardest` in hardest.cu.
unsafe impl args::Args for Args {}

/// The indices of the hardest positive and negative of each row, of two matrices of one shape and dtype.
pub fn hardest(
    distances: &Input<'_>,
    identity: &Input<'_>,
    dtype: Dtype,
) -> Result<(Tensor, Tensor)> {
    let (rows, cols) = distances.matrix()?;
    let stream = Stream::current(distances.device())?;
    let found = || stream.empty(&[rows as i64], Kind::Int64);
    let (positive, negative) = (found()?, found()?);
    let args = Args {
        distances: Matrix::of(distances)?,
        identity: Matrix::of(identity)?,
        rows: rows as i64,
        cols: cols as i32,
        positive: positive.data_ptr(),
        negative: negative.data_ptr(),
    };
    let launch = Launch::of("hardest", dtype, ("hardest", ""), THREADS);
    let launch = stream.sized(launch, rows)?;
    // SAFETY: both are matrices of this shape and dtype on this device, there is one index of each kind for
    // every row, and all tensors are alive.
    unsafe { stream.launch(launch, &args)? };
    Ok((positive, negative))
}
