//! Launches of `self_ensemble.cu`: forward one for a small batch and two otherwise, backward one.

use super::args::{self, Gathering, Matrix, Numbers, Partials, Scalar};
use super::device::{Launch, Stream};
use super::plan::over_columns;
use super::serves;
use crate::error::Result;
use crate::torch::Dtype;
use crate::torch::input::Input;
use std::ffi::c_void;
use tch::{Kind, Tensor};

const STEM: &str = "self_ensemble";
/// Rows for each part of a sum: with fewer, a second launch costs more than it saves.
const ROWS: usize = 512;
/// Threads of a block of the backward pass, and elements for each.
const THREADS: u32 = 256;
const EACH: usize = 4;

#[derive(Clone, Copy)]
#[repr(C)]
struct Args {
    p: Matrix,
    rows: i64,
    cols: i32,
    parts: i32,
    partials: *mut c_void,
    slope: *mut c_void,
    loss: Scalar,
    gathering: Gathering,
}

// SAFETY: the fields of `ClassBalance` in self_ensemble.cu.
unsafe impl args::Args for Args {}

#[repr(C)]
struct Repeat {
    slope: *mut c_void,
    length: i64,
    cols: i32,
    incoming: Numbers,
    grad: *mut c_void,
}

// SAFETY: the fields of `Repeat` in self_ensemble.cu.
unsafe impl args::Args for Repeat {}

/// The loss in `out`, and where `p` wants a gradient the one with respect to any of its rows, in float32.
pub fn class_balance(p: &Input<'_>, dtype: Dtype, out: Dtype) -> Result<(Tensor, Option<Tensor>)> {
    let (rows, cols) = p.matrix()?;
    let stream = Stream::current(p.device())?;
    let mut first = over_columns(&stream, (STEM, "class_balance_sums"), dtype, (rows, cols));
    let most = (rows / ROWS).max(1);
    let resident = stream.threads_at_once() as usize / (first.block as usize * first.grid as usize);
    let parts = most.min(resident.max(1));
    let last = over_columns(&stream, (STEM, "class_balance_means"), dtype, (parts, cols));

    let loss = stream.empty(&[], out.kind())?;
    let slope = p
        .wants_grad()
        .then(|| stream.empty(&[cols as i64], Kind::Float))
        .transpose()?;
    let several = if parts > 1 { parts * cols } else { 0 };
    let sums = stream.empty(&[several as i64], Kind::Double)?;
    let partials = Partials::new(&stream, first.grid, 1)?;
    let args = Args {
        p: Matrix::of(p)?,
        rows: rows as i64,
        cols: cols as i32,
        parts: parts as i32,
        partials: sums.data_ptr(),
        slope: args::pointer(slope.as_ref()),
        loss: Scalar::of(&loss, out),
        gathering: partials.args(),
    };
    first.grid *= parts as u32;
    // SAFETY: the probabilities are a matrix of this shape and dtype on this device, the gradient has a place
    // for each column, the sums have one in each part, and all tensors are alive.
    unsafe {
        stream.launch(first, &args)?;
        if parts > 1 {
            stream.launch(last, &args)?;
        }
    }
    Ok((loss, slope))
}

/// `slope` times `incoming`, as each row of a gradient of this shape. `None` where no kernel serves them.
pub fn repeat(
    slope: &Tensor,
    incoming: &Input<'_>,
    shape: &[i64],
    dtype: Dtype,
) -> Result<Option<Tensor>> {
    let held = Input::new("backward", "gradient", slope)?;
    if !serves(&[&held, incoming]) || !incoming.shape().is_empty() {
        return Ok(None);
    }
    let stream = Stream::current(held.device())?;
    let grad = stream.empty(shape, dtype.kind())?;
    let length = shape.iter().product::<i64>() as usize;
    let args = Repeat {
        slope: held.data(),
        length: length as i64,
        cols: held.numel() as i32,
        incoming: Numbers::broadcast(incoming)?,
        grad: grad.data_ptr(),
    };
    let launch = Launch::of(STEM, dtype, ("class_balance_grad", ""), THREADS);
    let launch = stream.sized(launch, length.div_ceil(THREADS as usize * EACH))?;
    // SAFETY: `slope` has a number for each column of `grad`, which is contiguous; `incoming` is one number
    // on the same device; all are alive.
    unsafe { stream.launch(launch, &args)? };
    Ok(Some(grad))
}
