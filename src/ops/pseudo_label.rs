//! Pseudo labels on tensors. The mathematics is in [`crate::kernels::pseudo_label`].

use super::{Place, nll_gradient, not_nan, place, threads};
use crate::cuda;
use crate::error::Result;
use crate::kernels::pseudo_label::{Outputs, pseudo_label as kernel};
use crate::torch::autograd::{Room, StoredGrad, attach};
use crate::torch::input::Input;
use crate::torch::saved::Saved;
use crate::torch::{Dtype, Owned, by_dtype, scalar};
use tch::{Kind, Reduction, Tensor};

/// The class, for messages.
pub const CLASS: &str = "ConfidenceBasedSelfTrainingLoss";

/// What the method returns.
pub struct Output {
    /// Scalar, differentiable with respect to the logits.
    pub loss: Tensor,
    /// (minibatch, ...), float32: 1 where the row is selected.
    pub mask: Tensor,
    /// (minibatch, ...), int64.
    pub labels: Tensor,
}

/// `ValueError` for a threshold that is NaN.
pub fn check_threshold(threshold: f64) -> Result<()> {
    not_nan(CLASS, "threshold", threshold)
}

/// The loss of the logits `y` with pseudo labels from `y_target`, both (minibatch, C, ...).
pub fn pseudo_label(y: &Tensor, y_target: &Tensor, threshold: f64) -> Result<Output> {
    let (input, target) = (
        Input::new(CLASS, "y", y)?,
        Input::new(CLASS, "y_target", y_target)?,
    );
    check_threshold(threshold)?;
    let dtype = input.floating()?;
    target.floating()?;
    input.classes()?;
    target.like(&input)?;
    let (output, grad) = match place(&[&input, &target]) {
        Place::Cuda => launched(&input, &target, dtype, threshold)?,
        Place::Cpu => fused(&input, &target, dtype, threshold)?,
        Place::Operations => operations(&input, y_target, threshold, dtype)?,
        Place::Composite => return composite(y, y_target, threshold, dtype),
    };
    attach(c"PseudoLabelBackward", &output.loss, &[y], [grad], || {
        // The caller gets these tensors too, and may write to them.
        let labels = Saved::of(
            &output.labels,
            "ConfidenceBasedSelfTrainingLoss's pseudo_labels",
        )?;
        let mask = Saved::of(&output.mask, "ConfidenceBasedSelfTrainingLoss's mask")?;
        Ok(move |t: &[Tensor]| of_log(&log_softmax(&t[0], dtype)?, labels.get()?, mask.get()?))
    })?;
    Ok(output)
}

fn launched(
    input: &Input<'_>,
    target: &Input<'_>,
    dtype: Dtype,
    threshold: f64,
) -> Result<(Output, Option<StoredGrad>)> {
    let out = cuda::pseudo_label::pseudo_label(input, target, dtype, threshold)?;
    let output = Output {
        loss: out.loss,
        mask: out.mask,
        labels: out.labels,
    };
    Ok((output, out.grad))
}

fn fused(
    input: &Input<'_>,
    target: &Input<'_>,
    dtype: Dtype,
    threshold: f64,
) -> Result<(Output, Option<StoredGrad>)> {
    by_dtype!(dtype, E => {
        let logits = input.dense_rows::<E>()?;
        let targets = target.dense_rows::<E>()?;
        let batch = [logits.rows() as i64];
        let (mut mask, mut labels) = (Owned::<f32>::new(&batch)?, Owned::<i64>::new(&batch)?);
        let mut grad = Room::<E>::of(input)?;
        let out = Outputs {
            mask: mask.slice(),
            labels: labels.slice(),
            grad: grad.slice(),
        };
        let loss = kernel(logits, targets, threshold, out, threads(2 * input.numel()));
        // The mask is float32, and so promotes a half cross entropy, in tllib too.
        let output = Output {
            loss: scalar(loss.value, dtype.at_least_f32())?,
            mask: mask.into_tensor(),
            labels: labels.into_tensor(),
        };
        Ok((output, grad.stored(loss.scale)))
    })
}

/// Pseudo labels and mask from the logits `target`, in libtorch operations.
fn select(target: &Tensor, threshold: f64) -> Result<(Tensor, Tensor)> {
    let q = target.f_detach()?.f_softmax(1, None::<Kind>)?;
    let (confidence, labels) = q.f_max_dim(1, false)?;
    let mask = confidence.f_gt(threshold)?.f_to_kind(Kind::Float)?;
    Ok((labels, mask))
}

fn log_softmax(y: &Tensor, dtype: Dtype) -> Result<Tensor> {
    Ok(y.f_log_softmax(1, dtype.at_least_f32().kind())?)
}

fn of_log(log_p: &Tensor, labels: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let each = log_p.f_nll_loss_nd(labels, None::<Tensor>, Reduction::None, -100)?;
    Ok(each.f_mul(mask)?.f_mean(log_p.f_kind()?)?)
}

/// The same in libtorch operations.
fn composite(y: &Tensor, y_target: &Tensor, threshold: f64, dtype: Dtype) -> Result<Output> {
    let (labels, mask) = select(y_target, threshold)?;
    let loss = of_log(&log_softmax(y, dtype)?, &labels, &mask)?;
    Ok(Output { loss, mask, labels })
}

fn operations(
    input: &Input<'_>,
    target: &Tensor,
    threshold: f64,
    dtype: Dtype,
) -> Result<(Output, Option<StoredGrad>)> {
    let (labels, mask) = select(target, threshold)?;
    let log_p = log_softmax(&input.tensor.f_detach()?, dtype)?;
    let loss = of_log(&log_p, &labels, &mask)?;
    let grad = if input.wants_grad() {
        let weight = mask.f_to_kind(log_p.f_kind()?)?;
        let weight = weight.f_mul_scalar(1.0 / weight.numel() as f64)?;
        Some(nll_gradient(&log_p, &labels, &weight)?)
    } else {
        None
    };
    Ok((Output { loss, mask, labels }, grad))
}
