//! Launch of `scale.cu`: the backward pass of every loss.

use super::args::{self, Numbers};
use super::device::{Launch, Stream};
use super::serves;
use crate::error::Result;
use crate::torch::autograd::StoredGrad;
use crate::torch::input::Input;
use std::ffi::c_void;
use tch::Tensor;

/// Bytes for each thread: with fewer, blocks cost more than their work.
const EACH: usize = 16;
const THREADS: u32 = 256;

#[repr(C)]
struct Args {
    grad: *const c_void,
    out: *mut c_void,
    length: i64,
    of_row: i64,
    incoming: Numbers,
    factor: f32,
    divisor: *const c_void,
    chosen: *const c_void,
}

// SAFETY: the fields of `Scale` in scale.cu.
unsafe impl args::Args for Args {}

/// `grad * incoming / (scale * divisor)`; with `own`, the memory of `grad` may be reused for it. `None`
/// where no kernel serves the two, or `incoming` is neither one number nor one for each row.
pub fn scale(grad: &StoredGrad, incoming: &Input<'_>, own: bool) -> Result<Option<Tensor>> {
    let stored = Input::new("backward", "gradient", &grad.tensor)?;
    if !serves(&[&stored, incoming]) {
        return Ok(None);
    }
    let Some(dtype) = stored.dtype() else {
        return Ok(None);
    };
    let length = stored.numel();
    let rows = stored.shape().first().copied().unwrap_or(1);
    if !matches!(incoming.shape(), [] | [_]) || incoming.shape().iter().any(|&n| n != rows) {
        return Ok(None);
    }
    let stream = Stream::current(stored.device())?;
    // A graph of this pass alone may be replayed more than once, and must not change its input.
    let out = if own && grad.capture == stream.capture() {
        grad.tensor.shallow_clone()
    } else {
        stream.empty(stored.shape(), dtype.kind())?
    };
    if length == 0 {
        return Ok(Some(out));
    }
    let args = Args {
        grad: stored.data(),
        out: out.data_ptr(),
        length: length as i64,
        of_row: length as i64 / rows,
        incoming: Numbers::broadcast(incoming)?,
        factor: (1.0 / grad.scale) as f32,
        divisor: args::pointer(grad.divisor.as_ref()),
        chosen: args::pointer(grad.chosen.as_ref()),
    };
    let work = (length * dtype.kind().elt_size_in_bytes()).div_ceil(THREADS as usize * EACH);
    let launch = stream.sized(Launch::of("scale", dtype, ("scale", ""), THREADS), work)?;
    // SAFETY: `grad` is contiguous, `out` as large and on the same device as `incoming`, which is one number or has
    // one for each row, as `chosen` has; all are alive.
    unsafe { stream.launch(launch, &args)? };
    Ok(Some(out))
}
