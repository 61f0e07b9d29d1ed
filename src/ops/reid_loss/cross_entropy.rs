//! The two classification losses on tensors.

use super::finite;
use crate::error::{Error, Result};
use crate::kernels::element::Element;
use crate::kernels::reid_loss::cross_entropy::{Targets, cross_entropy as kernel};
use crate::kernels::rows::Rows;
use crate::ops::loss_dtype;
use crate::ops::threads;
use crate::torch::autograd::{Composite, StoredGrad, attach};
use crate::torch::input::Input;
use crate::torch::{Dtype, Owned, Stored, by_dtype, scalar, version};
use tch::{Kind, Tensor};

const SOFT: &str = "CrossEntropyLoss";
const SMOOTH: &str = "CrossEntropyLossWithLabelSmooth";

/// The cross entropy of the logits `y` with the softmax of the logits `labels`, both (N, C, ...).
pub fn cross_entropy(y: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let (input, targets) = (
        Input::new(SOFT, "y", y)?,
        Input::new(SOFT, "labels", labels)?,
    );
    let dtype = input.floating()?;
    let target_dtype = targets.floating()?;
    if input.shape().len() < 2 || input.shape()[1] == 0 {
        return Err(input.wrong("have shape (minibatch, C) with C > 0"));
    }
    targets.same_device(&input)?;
    if targets.shape() != input.shape() {
        return Err(targets.wrong(&format!("have the shape of y, {:?}", input.shape())));
    }
    let wider = if target_dtype == Dtype::F64 {
        Dtype::F64
    } else {
        dtype
    };
    let out = if dtype == target_dtype {
        dtype
    } else {
        wider.at_least_f32()
    };
    let kind = loss_dtype(&input, out).kind();
    if !input.on_cpu() || !targets.on_cpu() || dtype != target_dtype || input.shape().len() != 2 {
        return soft_composite(y, labels, kind);
    }
    let held = Held(labels.f_detach()?, version(labels));
    let formula = Box::new(move |t: &[Tensor]| soft_composite(&t[0], held.get()?, kind));
    by_dtype!(dtype, E => {
        let targets = targets.rows::<E>().ok_or_else(|| targets.wrong("be a dense matrix"))?;
        fused::<E>(&input, Targets::Logits(targets), formula)
    })
}

/// The targets, which the composite needs again, and the version that the loss saw.
struct Held(Tensor, i64);

// SAFETY: at::Tensor's reference count is atomic, and nothing writes this tensor's metadata.
unsafe impl Sync for Held {}

impl Held {
    fn get(&self) -> Result<&Tensor> {
        if version(&self.0) == self.1 {
            return Ok(&self.0);
        }
        Err(Error::Bridge(format!(
            "{SOFT}: labels were modified in place, and the graph needs them as they were"
        )))
    }
}

fn fused<E>(input: &Input<'_>, targets: Targets<'_, E>, formula: Composite) -> Result<Tensor>
where
    E: Element + Stored,
{
    let logits: Rows<'_, E> = input
        .rows()
        .ok_or_else(|| input.wrong("be a dense matrix"))?;
    let mut grad = input
        .wants_grad()
        .then(|| Owned::<E>::new(input.shape()))
        .transpose()?;
    let slice = grad.as_mut().map(Owned::slice);
    let loss = kernel(logits, targets, slice, threads(2 * input.numel()));
    let out = scalar(loss.value, loss_dtype(input, input.floating()?))?;
    if let Some(grad) = grad {
        let grad = StoredGrad::new(grad.into_tensor(), loss.scale);
        attach(
            c"SoftCrossEntropyBackward",
            &out,
            &[input.tensor],
            vec![Some(grad)],
            formula,
        )?;
    }
    Ok(out)
}

/// What both compute in, where the result is of `kind`.
fn inside(kind: Kind) -> Kind {
    if kind == Kind::Double {
        kind
    } else {
        Kind::Float
    }
}

fn soft_composite(y: &Tensor, labels: &Tensor, kind: Kind) -> Result<Tensor> {
    let inside = inside(kind);
    let q = labels.f_detach()?.f_softmax(1, inside)?;
    let each = y
        .f_log_softmax(1, inside)?
        .f_mul(&q)?
        .f_sum_dim_intlist(1, false, inside)?;
    Ok(each.f_mean(inside)?.f_neg()?.f_to_kind(kind)?)
}

/// Raises unless the class accepts these arguments.
pub fn check_smoothing(num_classes: i64, epsilon: f64) -> Result<()> {
    if num_classes < 1 {
        return Err(Error::Value(format!(
            "{SMOOTH}: num_classes must be at least 1, got {num_classes}"
        )));
    }
    finite(SMOOTH, "epsilon", epsilon)
}

/// The cross entropy of the logits `y` (N, C) with smoothed `labels` (N).
pub fn label_smooth(y: &Tensor, labels: &Tensor, num_classes: i64, epsilon: f64) -> Result<Tensor> {
    let (input, indices) = (
        Input::new(SMOOTH, "y", y)?,
        Input::new(SMOOTH, "labels", labels)?,
    );
    check_smoothing(num_classes, epsilon)?;
    let dtype = input.floating()?;
    let (rows, cols) = input.matrix()?;
    indices.int64()?;
    indices.same_device(&input)?;
    if *indices.shape() != [rows as i64] {
        return Err(indices.wrong(&format!(
            "have shape ({rows},), one label for each row of y"
        )));
    }
    // tllib does not compare num_classes with y: it only divides the smoothing mass.
    let (hit, rest) = (1.0 - epsilon, epsilon / num_classes as f64);
    let kind = loss_dtype(&input, dtype).kind();
    if !input.on_cpu() || !indices.on_cpu() {
        return smooth_composite(y, labels, hit, rest, kind);
    }
    let values = Vec::<i64>::try_from(labels.f_contiguous()?)?;
    if let Some((i, label)) = values
        .iter()
        .enumerate()
        .find(|&(_, &l)| l < 0 || l >= cols as i64)
    {
        return Err(Error::Index(format!(
            "{SMOOTH}: labels must be at least 0 and below {cols}, the columns of y, got {label} at position {i}"
        )));
    }
    let held = values.clone();
    let formula = Box::new(move |t: &[Tensor]| {
        smooth_composite(&t[0], &Tensor::f_from_slice(&held)?, hit, rest, kind)
    });
    by_dtype!(dtype, E => fused::<E>(&input, Targets::Smooth { labels: &values, hit, rest }, formula))
}

fn smooth_composite(
    y: &Tensor,
    labels: &Tensor,
    hit: f64,
    rest: f64,
    kind: Kind,
) -> Result<Tensor> {
    let inside = inside(kind);
    let log_p = y.f_log_softmax(1, inside)?;
    let own = log_p
        .f_gather(1, &labels.f_unsqueeze(1)?, false)?
        .f_squeeze_dim(1)?;
    let all = log_p.f_sum_dim_intlist(1, false, inside)?;
    let each = own.f_mul_scalar(hit)?.f_add(&all.f_mul_scalar(rest)?)?;
    Ok(each.f_mean(inside)?.f_neg()?.f_to_kind(kind)?)
}
