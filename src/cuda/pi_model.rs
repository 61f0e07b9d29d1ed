//! Launch of `pi_model.cu`.

use super::args::{self, Gathering, Matrix, Numbers, Partials, Scalar};
use super::device::Stream;
use super::plan::{ROWS, over_rows};
use crate::error::Result;
use crate::torch::Dtype;
use crate::torch::autograd::StoredGrad;
use crate::torch::input::Input;
use std::ffi::c_void;
use tch::{Kind, Tensor};

#[repr(C)]
struct Args {
    first: Matrix,
    second: Matrix,
    rows: i64,
    cols: i32,
    mask: Numbers,
    number: f32,
    factor: f32,
    mean: f64,
    grad_first: *mut c_void,
    grad_second: *mut c_void,
    grad_mask: *mut c_void,
    out: Scalar,
    each: i32,
    gathering: Gathering,
}

// SAFETY: the fields of `PiModel` in pi_model.cu.
unsafe impl args::Args for Args {}

/// What becomes of the distances.
pub struct Weights<'a> {
    /// What they are multiplied by, if any: a tensor that [`super::serves`] serves and that broadcasts to the rows.
    pub mask: Option<&'a Input<'a>>,
    /// What they are multiplied by without a mask.
    pub number: f64,
    /// Whether they are returned one by one.
    pub each: bool,
    /// What their sum, or each gradient, is multiplied by.
    pub mean: f64,
    /// The scale of the gradients stored for the two predictions.
    pub scale: f64,
}

/// The loss in `out`, and the gradients that are wanted: for `first`, `second` and the mask.
pub fn pi_model(
    first: &Input<'_>,
    second: &Input<'_>,
    weights: &Weights<'_>,
    dtype: Dtype,
    out: Dtype,
) -> Result<(Tensor, Vec<Option<StoredGrad>>)> {
    let (rows, cols) = first.matrix()?;
    let stream = Stream::current(first.device())?;
    let launch = over_rows(
        &stream,
        ("pi_model", "pi_model"),
        &ROWS,
        dtype,
        (rows, cols),
    )?;
    let (to_first, to_second) = (
        stream.gradient(first, dtype)?,
        stream.gradient(second, dtype)?,
    );
    // In float32 whatever the mask's dtype, to which autograd converts it: how large the distances are,
    // and so what scale float16 would need, is not known here.
    let to_mask = match weights.mask {
        Some(mask) if mask.wants_grad() => Some(stream.empty(mask.shape(), Kind::Float)?),
        _ => None,
    };
    let shape = if weights.each {
        &first.shape()[..1]
    } else {
        &[]
    };
    let result = stream.empty(shape, out.kind())?;
    let partials = (!weights.each)
        .then(|| Partials::new(&stream, launch.grid, 1))
        .transpose()?;
    let args = Args {
        first: Matrix::of(first)?,
        second: Matrix::of(second)?,
        rows: rows as i64,
        cols: cols as i32,
        mask: weights.mask.map_or(Ok(Numbers::NONE), Numbers::broadcast)?,
        number: weights.number as f32,
        factor: (weights.mean * weights.scale) as f32,
        mean: weights.mean,
        grad_first: args::pointer(to_first.as_ref()),
        grad_second: args::pointer(to_second.as_ref()),
        grad_mask: args::pointer(to_mask.as_ref()),
        out: Scalar::of(&result, out),
        each: i32::from(weights.each),
        gathering: partials.as_ref().map_or(Gathering::NONE, Partials::args),
    };
    // SAFETY: both inputs are matrices of this shape and dtype on this device, gradients are as large as
    // what they belong to (the mask's, where wanted, has one number a row), the mask broadcasts to the
    // rows, the result has one place or one for each row; all tensors are alive.
    unsafe { stream.launch(launch, &args)? };
    Ok((
        result,
        vec![
            stream.stored(to_first, weights.scale),
            stream.stored(to_second, weights.scale),
            stream.stored(to_mask, 1.0),
        ],
    ))
}
