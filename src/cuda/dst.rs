//! Launch of `dst.cu`.

use super::args::{self, Gathering, Matrix, Partials, Scalar};
use super::device::Stream;
use super::plan::{ROWS, over_rows};
use super::stored_scale;
use crate::error::Result;
use crate::kernels::dst::OFFSET;
use crate::torch::Dtype;
use crate::torch::autograd::StoredGrad;
use crate::torch::input::Input;
use std::ffi::c_void;
use tch::{Kind, Tensor};

#[repr(C)]
struct Heads {
    adversarial: Matrix,
    main: Matrix,
    rows: i64,
    cols: i32,
    weight: f32,
    grad: *mut c_void,
    labels: *mut c_void,
}

#[repr(C)]
struct Args {
    labeled: Heads,
    unlabeled: Heads,
    eta: f64,
    offset: f32,
    loss: Scalar,
    gathering: Gathering,
}

// SAFETY: the fields of `Dst` in dst.cu.
unsafe impl args::Args for Args {}

/// What comes with the loss, for the labeled or the unlabeled rows, where their gradient is wanted.
pub struct Part {
    /// The predictions of the main head.
    pub labels: Tensor,
    /// With respect to the logits of the adversarial head.
    pub grad: Option<StoredGrad>,
}

/// The loss in `out` of the (adversarial, main) logits of the `labeled` and of the `unlabeled` rows.
pub fn dst(
    labeled: (&Input<'_>, &Input<'_>),
    unlabeled: (&Input<'_>, &Input<'_>),
    eta_prime: f64,
    dtype: Dtype,
    out: Dtype,
) -> Result<(Tensor, [Part; 2])> {
    let stream = Stream::current(labeled.0.device())?;
    let ((rows_l, cols_l), (rows_u, cols_u)) = (labeled.0.matrix()?, unlabeled.0.matrix()?);
    let shape = (rows_l + rows_u, cols_l.max(cols_u));
    let launch = over_rows(&stream, ("dst", "dst"), &ROWS, dtype, shape)?;
    // Second derivatives of one part need the predictions of both.
    let wanted = labeled.0.wants_grad() || unlabeled.0.wants_grad();
    let (heads_l, part_l) = heads(&stream, labeled, eta_prime, dtype, wanted)?;
    let (heads_u, part_u) = heads(&stream, unlabeled, 1.0, dtype, wanted)?;
    let loss = stream.empty(&[], out.kind())?;
    let partials = Partials::new(&stream, launch.grid, 2)?;
    let args = Args {
        labeled: heads_l,
        unlabeled: heads_u,
        eta: eta_prime,
        offset: OFFSET as f32,
        loss: Scalar::of(&loss, out),
        gathering: partials.args(),
    };
    // SAFETY: the inputs are matrices of this dtype on this device, both of a part of one shape; a
    // gradient is as large, labels have a place for each row; all tensors are alive.
    unsafe { stream.launch(launch, &args)? };
    Ok((loss, [part_l, part_u]))
}

/// The arguments of one part, and the tensors that they point to.
fn heads(
    stream: &Stream,
    (adversarial, main): (&Input<'_>, &Input<'_>),
    weight: f64,
    dtype: Dtype,
    wanted: bool,
) -> Result<(Heads, Part)> {
    let (rows, cols) = adversarial.matrix()?;
    let weight = weight / rows as f64;
    // |p_a / u| (1 - p_a) < 1.
    let scale = stored_scale(dtype, weight.abs());
    let grad = stream.gradient(adversarial, dtype)?;
    let places = if wanted { rows as i64 } else { 0 };
    let labels = stream.empty(&[places], Kind::Int64)?;
    let heads = Heads {
        adversarial: Matrix::of(adversarial)?,
        main: Matrix::of(main)?,
        rows: rows as i64,
        cols: cols as i32,
        weight: (weight * scale) as f32,
        grad: args::pointer(grad.as_ref()),
        labels: args::pointer(wanted.then_some(&labels)),
    };
    let grad = stream.stored(grad, scale);
    Ok((heads, Part { labels, grad }))
}
