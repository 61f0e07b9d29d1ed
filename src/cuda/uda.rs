//! Launch of `uda.cu`.

use super::args::{self, Gathering, Matrix, Partials, Scalar};
use super::device::Stream;
use super::plan::{ROWS, over_rows};
use super::{inverse, rounded, stored_scale};
use crate::error::Result;
use crate::torch::Dtype;
use crate::torch::autograd::StoredGrad;
use crate::torch::input::Input;
use std::ffi::c_void;
use tch::{Kind, Tensor};

#[repr(C)]
struct Args {
    strong: Matrix,
    weak: Matrix,
    rows: i64,
    cols: i32,
    threshold: f32,
    inverse_t: f32,
    factor: f32,
    grad: *mut c_void,
    chosen: *mut c_void,
    loss: Scalar,
    selected: *mut c_void,
    gathering: Gathering,
}

// SAFETY: the fields of `Uda` in uda.cu.
unsafe impl args::Args for Args {}

/// The loss in float32, and the gradient where `strong` wants one.
pub fn uda(
    strong: &Input<'_>,
    weak: &Input<'_>,
    dtype: Dtype,
    threshold: f64,
    temperature: f64,
) -> Result<(Tensor, Option<StoredGrad>)> {
    let (rows, cols) = strong.matrix()?;
    let stream = Stream::current(strong.device())?;
    let launch = over_rows(&stream, ("uda", "uda"), &ROWS, dtype, (rows, cols))?;
    let scale = stored_scale(dtype, 1.0 / temperature);
    let grad = stream.gradient(strong, dtype)?;
    let chosen = stream.chosen(grad.as_ref(), rows)?;
    let loss = stream.empty(&[], Kind::Float)?;
    let selected = stream.empty(&[], Kind::Float)?;
    let partials = Partials::new(&stream, launch.grid, 2)?;
    let args = Args {
        strong: Matrix::of(strong)?,
        weak: Matrix::of(weak)?,
        rows: rows as i64,
        cols: cols as i32,
        threshold: rounded(dtype, threshold),
        inverse_t: inverse(temperature),
        factor: (scale / temperature) as f32,
        grad: args::pointer(grad.as_ref()),
        chosen: args::pointer(chosen.as_ref()),
        loss: Scalar::of(&loss, Dtype::F32),
        selected: selected.data_ptr(),
        gathering: partials.args(),
    };
    // SAFETY: both inputs are matrices of this shape and dtype on this device, the gradient is as large,
    // `chosen` has a place for each row, and all tensors are alive.
    unsafe { stream.launch(launch, &args)? };
    let grad = stream.stored(grad, scale).map(|stored| StoredGrad {
        divisor: Some(selected),
        chosen,
        ..stored
    });
    Ok((loss, grad))
}
