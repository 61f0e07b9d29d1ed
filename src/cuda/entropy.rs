//! Launch of `entropy.cu`.

use super::args::{self, Gathering, Matrix, Partials, Scalar};
use super::device::Stream;
use super::plan::{ROWS, over_rows};
use crate::error::Result;
use crate::kernels::mcc::ENTROPY_EPSILON;
use crate::torch::Dtype;
use crate::torch::autograd::StoredGrad;
use crate::torch::input::Input;
use std::ffi::c_void;
use tch::Tensor;

#[repr(C)]
struct Args {
    p: Matrix,
    rows: i64,
    cols: i32,
    epsilon: f32,
    weight: f32,
    grad: *mut c_void,
    out: Scalar,
    mean: i32,
    gathering: Gathering,
}

// SAFETY: the fields of `Entropy` in entropy.cu.
unsafe impl args::Args for Args {}

/// The entropy in `out` of each row of `p`, or their mean, and where `p` wants one the gradient of each
/// times `weight`, stored times `scale`.
pub fn entropy(
    p: &Input<'_>,
    mean: bool,
    (weight, scale): (f64, f64),
    dtype: Dtype,
    out: Dtype,
) -> Result<(Tensor, Option<StoredGrad>)> {
    let (rows, cols) = p.matrix()?;
    let stream = Stream::current(p.device())?;
    let launch = over_rows(&stream, ("entropy", "entropy"), &ROWS, dtype, (rows, cols))?;
    let grad = stream.gradient(p, dtype)?;
    let shape = if mean { &[][..] } else { &p.shape()[..1] };
    let result = stream.empty(shape, out.kind())?;
    let partials = mean
        .then(|| Partials::new(&stream, launch.grid, 1))
        .transpose()?;
    let args = Args {
        p: Matrix::of(p)?,
        rows: rows as i64,
        cols: cols as i32,
        epsilon: ENTROPY_EPSILON as f32,
        weight: (weight * scale) as f32,
        grad: args::pointer(grad.as_ref()),
        out: Scalar::of(&result, out),
        mean: i32::from(mean),
        gathering: partials.as_ref().map_or(Gathering::NONE, Partials::args),
    };
    // SAFETY: `p` is a matrix of this shape and dtype on this device, the gradient is as large, the result
    // has one place or one for each row; all tensors are alive.
    unsafe { stream.launch(launch, &args)? };
    Ok((result, stream.stored(grad, scale)))
}
