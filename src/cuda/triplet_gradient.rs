//! Launch of `triplet_gradient.cu`.

use super::args;
use super::device::{Launch, Stream};
use super::stored_scale;
use super::triplet::{Features, Pairs};
use crate::error::Result;
use crate::kernels::reid_loss::triplet::Role;
use crate::torch::Dtype;
use crate::torch::autograd::StoredGrad;
use crate::torch::input::Input;
use std::ffi::c_void;
use tch::Kind;

const THREADS: u32 = 256;

#[repr(C)]
struct Pull {
    own: *const c_void,
    candidates: *const c_void,
    anchors: *const c_void,
    norms: *const c_void,
    rows: i64,
    pairs: i64,
    dim: i32,
    found: *const c_void,
    weights: *const c_void,
    factor: f32,
    divisor: *mut c_void,
    grad: *mut c_void,
}

// SAFETY: the fields of `Pull` in triplet_gradient.cu.
unsafe impl args::Args for Pull {}

/// The gradient with respect to `input`, the features of the side with `role`; `None` where it wants none.
/// `u` are the anchors and `v` the candidates; no element exceeds `bound`, norms aside.
pub fn pull(
    stream: &Stream,
    (input, role): (&Input<'_>, Role),
    (u, v): (&Features, &Features),
    pairs: &Pairs,
    dtype: Dtype,
    bound: f64,
) -> Result<Option<StoredGrad>> {
    let Some(grad) = stream.gradient(input, dtype)? else {
        return Ok(None);
    };
    let (rows, dim) = input.matrix()?;
    let (side, other) = if role == Role::Candidates {
        (v, u)
    } else {
        (u, v)
    };
    let pointer = |serves: bool, features: &Features| {
        args::pointer(serves.then_some(&features.tensor)).cast_const()
    };
    let scale = stored_scale(dtype, bound);
    // Only float16 needs it, for its narrow range: small norms make large gradients.
    let divisor = (dtype == Dtype::F16 && side.norms.is_some())
        .then(|| stream.empty(&[], Kind::Float))
        .transpose()?;
    let args = Pull {
        own: side.tensor.data_ptr(),
        candidates: pointer(role != Role::Candidates, other),
        anchors: pointer(role != Role::Anchors, other),
        norms: args::pointer(side.norms.as_ref()),
        rows: rows as i64,
        pairs: pairs.count() as i64,
        dim: dim as i32,
        found: pairs.found(),
        weights: pairs.weights(),
        factor: scale as f32,
        divisor: args::pointer(divisor.as_ref()),
        grad: grad.data_ptr(),
    };
    let launch = Launch::of("triplet_gradient", dtype, ("pull", ""), THREADS);
    let launch = stream.sized(launch, rows)?;
    // SAFETY: the features and the gradient have these rows and columns, `found` and `weights` two entries for
    // each anchor, with candidates in range; all are on this device and alive.
    unsafe { stream.launch(launch, &args)? };
    let stored = stream.stored(Some(grad), scale);
    Ok(stored.map(|stored| StoredGrad { divisor, ..stored }))
}
