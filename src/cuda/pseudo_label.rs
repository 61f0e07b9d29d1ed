//! Launch of `pseudo_label.cu`.

use super::args::{self, Gathering, Matrix, Partials, Scalar};
use super::device::Stream;
use super::plan::{ROWS, over_rows};
use super::{rounded, stored_scale};
use crate::error::Result;
use crate::torch::Dtype;
use crate::torch::autograd::StoredGrad;
use crate::torch::input::Input;
use std::ffi::c_void;
use tch::{Kind, Tensor};

#[repr(C)]
struct Args {
    logits: Matrix,
    targets: Matrix,
    rows: i64,
    cols: i32,
    threshold: f32,
    weight: f32,
    grad: *mut c_void,
    chosen: *mut c_void,
    mask: *mut c_void,
    labels: *mut c_void,
    loss: Scalar,
    gathering: Gathering,
}

// SAFETY: the fields of `PseudoLabel` in pseudo_label.cu.
unsafe impl args::Args for Args {}

/// What the launch writes.
pub struct Outputs {
    /// In float32, of no dimensions.
    pub loss: Tensor,
    /// One float32 a row.
    pub mask: Tensor,
    /// One int64 a row.
    pub labels: Tensor,
    /// Where the logits want one.
    pub grad: Option<StoredGrad>,
}

/// The loss of `logits` with pseudo labels from `targets`.
pub fn pseudo_label(
    logits: &Input<'_>,
    targets: &Input<'_>,
    dtype: Dtype,
    threshold: f64,
) -> Result<Outputs> {
    let (rows, cols) = logits.matrix()?;
    let stream = Stream::current(logits.device())?;
    let launch = over_rows(
        &stream,
        ("pseudo_label", "pseudo_label"),
        &ROWS,
        dtype,
        (rows, cols),
    )?;
    let weight = 1.0 / rows as f64;
    let scale = stored_scale(dtype, weight);
    let grad = stream.gradient(logits, dtype)?;
    let chosen = stream.chosen(grad.as_ref(), rows)?;
    let loss = stream.empty(&[], Kind::Float)?;
    let mask = stream.empty(&[rows as i64], Kind::Float)?;
    let labels = stream.empty(&[rows as i64], Kind::Int64)?;
    let partials = Partials::new(&stream, launch.grid, 1)?;
    let args = Args {
        logits: Matrix::of(logits)?,
        targets: Matrix::of(targets)?,
        rows: rows as i64,
        cols: cols as i32,
        threshold: rounded(dtype, threshold),
        weight: (weight * scale) as f32,
        grad: args::pointer(grad.as_ref()),
        chosen: args::pointer(chosen.as_ref()),
        mask: mask.data_ptr(),
        labels: labels.data_ptr(),
        loss: Scalar::of(&loss, Dtype::F32),
        gathering: partials.args(),
    };
    // SAFETY: both inputs are matrices of this shape and dtype on this device, the gradient is as large,
    // mask, labels and `chosen` have a place for each row, and all tensors are alive.
    unsafe { stream.launch(launch, &args)? };
    Ok(Outputs {
        loss,
        mask,
        labels,
        grad: stream
            .stored(grad, scale)
            .map(|stored| StoredGrad { chosen, ..stored }),
    })
}
