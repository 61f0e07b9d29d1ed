//! Launches of `cross_entropy.cu`.

use super::args::{self, Args, Gathering, Labels, Matrix, Partials, Scalar};
use super::device::Stream;
use super::plan::{ROWS, over_rows};
use super::stored_scale;
use crate::error::Result;
use crate::torch::Dtype;
use crate::torch::autograd::StoredGrad;
use crate::torch::input::Input;
use std::ffi::c_void;
use tch::Tensor;

/// What both kernels take.
#[derive(Clone, Copy)]
#[repr(C)]
struct Rows {
    logits: Matrix,
    count: i64,
    cols: i32,
    weight: f32,
    grad: *mut c_void,
    loss: Scalar,
    gathering: Gathering,
}

#[repr(C)]
struct Soft {
    rows: Rows,
    targets: Matrix,
}

// SAFETY: the fields of `Soft` in cross_entropy.cu.
unsafe impl Args for Soft {}

#[repr(C)]
struct Smooth {
    rows: Rows,
    labels: Labels,
    hit: f32,
    rest: f32,
    mass: f32,
}

// SAFETY: the fields of `Smooth` in cross_entropy.cu.
unsafe impl Args for Smooth {}

/// The loss in `out`, and the gradient where the logits want one.
type Outputs = (Tensor, Option<StoredGrad>);

/// The cross entropy of `logits` with the softmax of `targets`.
pub fn soft(logits: &Input<'_>, targets: &Input<'_>, dtype: Dtype, out: Dtype) -> Result<Outputs> {
    let targets = Matrix::of(targets)?;
    let args = |rows| Soft { rows, targets };
    // SAFETY: both inputs are matrices of this shape and dtype on this device.
    unsafe { launch("soft", logits, 1.0, (dtype, out), args) }
}

/// The cross entropy of `logits` with smoothed `labels`, one int64 for each row on the same device:
/// `hit` for the label and `rest` for every class. A label that is no column makes its row NaN.
pub fn smooth(
    logits: &Input<'_>,
    labels: &Input<'_>,
    (hit, rest): (f64, f64),
    dtype: Dtype,
    out: Dtype,
) -> Result<Outputs> {
    let cols = logits.matrix()?.1 as f64;
    let labels = Labels::of(labels)?;
    let args = |rows| Smooth {
        rows,
        labels,
        hit: hit as f32,
        rest: rest as f32,
        mass: (hit + rest * cols) as f32,
    };
    let bound = hit.abs() + rest.abs() * cols;
    // SAFETY: `logits` is a matrix of this dtype on this device, and `labels` has as many rows.
    unsafe { launch("smooth", logits, bound, (dtype, out), args) }
}

/// Launches `kernel` with the arguments that `args` makes from the rows; `bound` bounds a row's gradient.
///
/// # Safety
/// `logits` is a matrix of the dtype on this device, and what `args` adds is valid for the kernel.
unsafe fn launch<A: Args>(
    kernel: &'static str,
    logits: &Input<'_>,
    bound: f64,
    (dtype, out): (Dtype, Dtype),
    args: impl FnOnce(Rows) -> A,
) -> Result<Outputs> {
    let (rows, cols) = logits.matrix()?;
    let stream = Stream::current(logits.device())?;
    let over = over_rows(
        &stream,
        ("cross_entropy", kernel),
        &ROWS,
        dtype,
        (rows, cols),
    )?;
    let weight = 1.0 / rows as f64;
    let scale = stored_scale(dtype, weight * bound);
    let grad = stream.gradient(logits, dtype)?;
    let loss = stream.empty(&[], out.kind())?;
    let partials = Partials::new(&stream, over.grid, 1)?;
    let args = args(Rows {
        logits: Matrix::of(logits)?,
        count: rows as i64,
        cols: cols as i32,
        weight: (weight * scale) as f32,
        grad: args::pointer(grad.as_ref()),
        loss: Scalar::of(&loss, out),
        gathering: partials.args(),
    });
    // SAFETY: per contract; the gradient is as large as the logits, and all tensors are alive.
    unsafe { stream.launch(over, &args)? };
    Ok((loss, stream.stored(grad, scale)))
}
