//! Minimum class confusion on tensors. The mathematics is in [`crate::kernels::mcc`].

use super::{positive, threads};
use crate::error::Result;
use crate::kernels::mcc::{ENTROPY_EPSILON, mcc as kernel};
use crate::torch::autograd::{StoredGrad, attach};
use crate::torch::input::Input;
use crate::torch::{Dtype, Owned, by_dtype, scalar};
use tch::{Kind, Tensor};

const CLASS: &str = "MinimumClassConfusionLoss";

/// `ValueError` for a temperature that is not above 0.
pub fn check_temperature(temperature: f64) -> Result<()> {
    positive(CLASS, "temperature", temperature)
}

/// The loss of `logits` (minibatch, C), differentiable.
pub fn mcc(logits: &Tensor, temperature: f64) -> Result<Tensor> {
    let input = Input::new(CLASS, "logits", logits)?;
    check_temperature(temperature)?;
    let dtype = input.floating()?;
    input.matrix()?;
    if !input.on_cpu() {
        return composite(logits, temperature, out_dtype(&input, dtype).kind());
    }
    let wants_grad = input.wants_grad();
    let (loss, grad) = fused(&input, dtype, temperature, wants_grad)?;
    if wants_grad {
        let kind = loss.f_kind()?;
        let formula = Box::new(move |t: &[Tensor]| composite(&t[0], temperature, kind));
        attach(c"MccBackward", &loss, &[logits], vec![grad], formula)?;
    }
    Ok(loss)
}

/// tllib's formula gives the dtype of the logits, and float32 where autocast runs its sums.
pub(super) fn out_dtype(input: &Input<'_>, dtype: Dtype) -> Dtype {
    if input.autocast() { dtype.at_least_f32() } else { dtype }
}

fn fused(
    input: &Input<'_>,
    dtype: Dtype,
    temperature: f64,
    wants_grad: bool,
) -> Result<(Tensor, Option<StoredGrad>)> {
    by_dtype!(dtype, E => {
        let rows = input.rows::<E>().ok_or_else(|| input.wrong("be a dense matrix"))?;
        let mut grad = wants_grad.then(|| Owned::<E>::new(input.shape())).transpose()?;
        let slice = grad.as_mut().map(Owned::slice);
        let loss = kernel(rows, temperature, slice, threads(input.numel()));
        let grad = grad.map(|g| StoredGrad { tensor: g.into_tensor(), scale: loss.scale });
        Ok((scalar(loss.value, out_dtype(input, dtype))?, grad))
    })
}

/// The same loss in libtorch operations, `O(B C)` too.
fn composite(logits: &Tensor, temperature: f64, kind: Kind) -> Result<Tensor> {
    let inside = if kind == Kind::Double { Kind::Double } else { Kind::Float };
    let p = logits.f_to_kind(inside)?.f_div_scalar(temperature)?.f_softmax(1, inside)?;
    let held = p.f_detach()?;
    let plogp = held.f_add_scalar(ENTROPY_EPSILON)?.f_log()?.f_mul(&held)?;
    let weight = plogp.f_sum_dim_intlist(1, true, inside)?.f_exp()?.f_add_scalar(1.0)?;
    let wp = p.f_mul(&weight)?;
    let s = wp.f_sum_dim_intlist(0, false, inside)?;
    let d = wp.f_mul(&p)?.f_sum_dim_intlist(0, false, inside)?;
    // A class that no row predicts: 0/0, whose limit is 0. A divisor of 1 keeps NaN out of the
    // gradient as well.
    let absent = s.f_eq(0.0)?;
    let trace = d.f_div(&s.f_masked_fill(&absent, 1.0)?)?.f_mean(inside)?;
    let loss = trace.f_neg()?.f_add_scalar(1.0)?;
    let empty = logits.size().first() == Some(&0);
    let loss = if empty { loss.f_mul_scalar(f64::NAN)? } else { loss };
    Ok(loss.f_to_kind(kind)?)
}
