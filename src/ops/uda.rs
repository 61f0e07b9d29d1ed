//! Strong-weak consistency on tensors. The mathematics is in [`crate::kernels::uda`].

use super::{Place, not_nan, place, positive, stored, threads, widened_on_devices};
use crate::cuda;
use crate::error::Result;
use crate::kernels::uda::uda as kernel;
use crate::torch::autograd::{Room, StoredGrad, attach};
use crate::torch::input::Input;
use crate::torch::{Dtype, by_dtype, scalar};
use tch::{Kind, Tensor};

/// The class, for messages.
pub const CLASS: &str = "StrongWeakConsistencyLoss";

/// `ValueError` for a threshold that is NaN or a temperature that is not above 0.
pub fn check_uda(threshold: f64, temperature: f64) -> Result<()> {
    not_nan(CLASS, "threshold", threshold)?;
    positive(CLASS, "temperature", temperature)
}

/// The loss of the logits `y_strong` against those of `y`, both (minibatch, C, ...), differentiable with
/// respect to `y_strong`.
pub fn uda(y_strong: &Tensor, y: &Tensor, threshold: f64, temperature: f64) -> Result<Tensor> {
    let (strong, weak) = (
        Input::new(CLASS, "y_strong", y_strong)?,
        Input::new(CLASS, "y", y)?,
    );
    check_uda(threshold, temperature)?;
    let (dtype, weak_dtype) = (strong.floating()?, weak.floating()?);
    strong.classes()?;
    weak.like(&strong)?;
    // The mask is float32, and so promotes half types, in tllib too.
    let out = dtype.promote(weak_dtype).at_least_f32();
    let call = Call {
        threshold,
        temperature,
        selecting: widened_on_devices(&weak, weak_dtype).kind(),
        kind: out.kind(),
    };
    let (loss, grad) = match place(&[&strong, &weak]) {
        Place::Cuda => cuda::uda::uda(&strong, &weak, dtype, threshold, temperature)?,
        Place::Cpu => fused(&strong, &weak, dtype, threshold, temperature)?,
        Place::Operations => operations(&strong, &weak, call)?,
        Place::Composite => return Ok(Formula::of(y_strong, y, call)?.loss),
    };
    if grad.is_some() {
        // As an input of the node, y is checked for in-place writes; detached, it gets no gradient.
        let inputs = [y_strong, &y.f_detach()?];
        attach(c"UdaBackward", &loss, &inputs, [grad, None], || {
            Ok(move |t: &[Tensor]| Ok(Formula::of(&t[0], &t[1], call)?.loss))
        })?;
    }
    Ok(loss)
}

fn fused(
    strong: &Input<'_>,
    weak: &Input<'_>,
    dtype: Dtype,
    threshold: f64,
    temperature: f64,
) -> Result<(Tensor, Option<StoredGrad>)> {
    by_dtype!(dtype, E => {
        let z = strong.dense_rows::<E>()?;
        let y = weak.dense_rows::<E>()?;
        let mut grad = Room::<E>::of(strong)?;
        let loss = kernel(z, y, threshold, temperature, grad.slice(), threads(2 * strong.numel()));
        Ok((scalar(loss.value, dtype.at_least_f32())?, grad.stored(loss.scale)))
    })
}

/// What a call has besides tensors.
#[derive(Clone, Copy)]
struct Call {
    threshold: f64,
    temperature: f64,
    /// The dtype of the probabilities that decide what is selected. The autocast region may end before backward runs.
    selecting: Kind,
    /// The dtype of everything else.
    kind: Kind,
}

/// The same in libtorch operations.
struct Formula {
    q: Tensor,
    log_p: Tensor,
    /// 1 over the number of selected rows for each of them, 0 for other rows.
    weight: Tensor,
    loss: Tensor,
}

impl Formula {
    fn of(y_strong: &Tensor, y: &Tensor, call: Call) -> Result<Self> {
        let (y, kind) = (y.f_detach()?, call.kind);
        let own = y.f_softmax(1, call.selecting)?;
        let mask = own
            .f_amax([1].as_slice(), false)?
            .f_gt(call.threshold)?
            .f_to_kind(kind)?;
        let q = if call.selecting == kind {
            own
        } else {
            y.f_softmax(1, kind)?
        };
        let log_p = y_strong
            .f_to_kind(kind)?
            .f_div_scalar(call.temperature)?
            .f_log_softmax(1, kind)?;
        let weight = mask.f_div(&mask.f_sum(kind)?.f_clamp_min(1.0)?)?;
        let terms = q.f_xlogy(&q)?.f_sub(&q.f_mul(&log_p)?)?;
        let each = terms.f_sum_dim_intlist(1, false, kind)?;
        let loss = each.f_mul(&weight)?.f_sum(kind)?;
        Ok(Self {
            q,
            log_p,
            weight,
            loss,
        })
    }
}

fn operations(
    strong: &Input<'_>,
    weak: &Input<'_>,
    call: Call,
) -> Result<(Tensor, Option<StoredGrad>)> {
    let formula = Formula::of(&strong.tensor.f_detach()?, weak.tensor, call)?;
    if !strong.wants_grad() {
        return Ok((formula.loss, None));
    }
    let weight = formula
        .weight
        .f_mul_scalar(1.0 / call.temperature)?
        .f_unsqueeze(1)?;
    let grad = formula.log_p.f_exp()?.f_sub(&formula.q)?.f_mul(&weight)?;
    Ok((formula.loss, Some(stored(&grad)?)))
}
