//! The two classification losses on tensors.

use crate::cuda;
use crate::error::{Error, Result};
use crate::kernels::element::Element;
use crate::kernels::reid_loss::cross_entropy::{Targets, cross_entropy as kernel};
use crate::ops::{Place, finite, in_host_memory, inside, loss_dtype, place, stored, threads};
use crate::torch::autograd::{Room, StoredGrad, attach};
use crate::torch::input::Input;
use crate::torch::saved::Saved;
use crate::torch::{Stored, by_dtype, scalar};
use std::ffi::CStr;
use tch::{Kind, Tensor};

const SOFT: &str = "CrossEntropyLoss";
const SMOOTH: &str = "CrossEntropyLossWithLabelSmooth";
const LABEL: &CStr = c"SoftCrossEntropyBackward";

/// The cross entropy of the logits `y` with the softmax of the logits `labels`, both (N, C, ...).
pub fn cross_entropy(y: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let (input, targets) = (
        Input::new(SOFT, "y", y)?,
        Input::new(SOFT, "labels", labels)?,
    );
    let dtype = input.floating()?;
    let target_dtype = targets.floating()?;
    input.classes()?;
    targets.like(&input)?;
    let kind = loss_dtype(&input, dtype.promote(target_dtype)).kind();
    let (loss, grad) = match place(&[&input, &targets]) {
        Place::Cuda => {
            cuda::cross_entropy::soft(&input, &targets, dtype, loss_dtype(&input, dtype))?
        }
        Place::Cpu => by_dtype!(dtype, E => {
            let targets = targets.dense_rows::<E>()?;
            fused::<E>(&input, Targets::Logits(targets))?
        }),
        Place::Operations => soft_operations(&input, labels, kind)?,
        Place::Composite => return soft_composite(y, labels, kind),
    };
    attach(LABEL, &loss, &[y], [grad], || {
        let held = Saved::of(labels, "CrossEntropyLoss's labels")?;
        Ok(move |t: &[Tensor]| soft_composite(&t[0], held.get()?, kind))
    })?;
    Ok(loss)
}

/// By the CPU kernel.
fn fused<E>(input: &Input<'_>, targets: Targets<'_, E>) -> Result<(Tensor, Option<StoredGrad>)>
where
    E: Element + Stored,
{
    let logits = input.dense_rows::<E>()?;
    let mut grad = Room::<E>::of(input)?;
    let loss = kernel(logits, targets, grad.slice(), threads(2 * input.numel()));
    let out = scalar(loss.value, loss_dtype(input, input.floating()?))?;
    Ok((out, grad.stored(loss.scale)))
}

/// The soft cross entropy in libtorch operations.
struct Soft {
    q: Tensor,
    log_p: Tensor,
    loss: Tensor,
}

impl Soft {
    fn of(y: &Tensor, labels: &Tensor, kind: Kind) -> Result<Self> {
        let inside = inside(kind);
        let q = labels.f_detach()?.f_softmax(1, inside)?;
        let log_p = y.f_log_softmax(1, inside)?;
        let each = log_p.f_mul(&q)?.f_sum_dim_intlist(1, false, inside)?;
        let loss = each.f_mean(inside)?.f_neg()?.f_to_kind(kind)?;
        Ok(Self { q, log_p, loss })
    }
}

fn soft_composite(y: &Tensor, labels: &Tensor, kind: Kind) -> Result<Tensor> {
    Ok(Soft::of(y, labels, kind)?.loss)
}

fn soft_operations(
    input: &Input<'_>,
    labels: &Tensor,
    kind: Kind,
) -> Result<(Tensor, Option<StoredGrad>)> {
    let Soft { q, log_p, loss } = Soft::of(&input.tensor.f_detach()?, labels, kind)?;
    if !input.wants_grad() {
        return Ok((loss, None));
    }
    let weight = input.shape()[1] as f64 / input.numel() as f64;
    let grad = log_p.f_exp()?.f_sub(&q)?.f_mul_scalar(weight)?;
    Ok((loss, Some(stored(&grad)?)))
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
    let (input, given) = (
        Input::new(SMOOTH, "y", y)?,
        Input::new(SMOOTH, "labels", labels)?,
    );
    check_smoothing(num_classes, epsilon)?;
    let dtype = input.floating()?;
    let (rows, cols) = input.matrix()?;
    given.integer()?;
    let labels = &given.to_int64()?;
    let indices = Input::new(SMOOTH, "labels", labels)?;
    indices.same_device(&input)?;
    if *indices.shape() != [rows as i64] {
        return Err(indices.wrong(&format!(
            "have shape ({rows},), one label for each row of y"
        )));
    }
    let place = place(&[&input]);
    // A device's kernel checks by itself, in host memory too where it is emulated.
    let known = (place != Place::Cuda && in_host_memory(&indices))
        .then(|| checked(&indices, cols))
        .transpose()?;
    // tllib does not compare num_classes with y: it only divides the smoothing mass.
    let (hit, rest) = (1.0 - epsilon, epsilon / num_classes as f64);
    let kind = loss_dtype(&input, dtype).kind();
    let (loss, grad) = match (place, known) {
        (Place::Cuda, _) if cuda::reaches(&indices) => {
            let out = loss_dtype(&input, dtype);
            cuda::cross_entropy::smooth(&input, &indices, (hit, rest), dtype, out)?
        }
        (Place::Operations, _) if indices.plain() => {
            smooth_operations(&input, labels, (hit, rest), kind)?
        }
        (Place::Cpu, Some(labels)) => {
            let (loss, grad) = by_dtype!(dtype, E => {
                fused::<E>(&input, Targets::Smooth { labels: &labels, hit, rest })?
            });
            attach(LABEL, &loss, &[y], [grad], || {
                Ok(move |t: &[Tensor]| {
                    smooth_composite(&t[0], &Tensor::f_from_slice(&labels)?, hit, rest, kind)
                })
            })?;
            return Ok(loss);
        }
        _ => return smooth_composite(y, labels, hit, rest, kind),
    };
    attach(LABEL, &loss, &[y], [grad], || {
        let held = Saved::of(labels, "CrossEntropyLossWithLabelSmooth's labels")?;
        Ok(move |t: &[Tensor]| smooth_composite(&t[0], held.get()?, hit, rest, kind))
    })?;
    Ok(loss)
}

/// The values of `labels`; `IndexError` unless all are columns.
fn checked(labels: &Input<'_>, cols: usize) -> Result<Vec<i64>> {
    let values = labels.integers()?;
    let wrong = |label: i64| label < 0 || label >= cols as i64;
    match values.iter().enumerate().find(|&(_, &label)| wrong(label)) {
        None => Ok(values),
        Some((i, label)) => Err(Error::Index(format!(
            "{SMOOTH}: labels must be at least 0 and below {cols}, the columns of y, got {label} at position {i}"
        ))),
    }
}

fn smooth_composite(
    y: &Tensor,
    labels: &Tensor,
    hit: f64,
    rest: f64,
    kind: Kind,
) -> Result<Tensor> {
    smooth_of_log(&y.f_log_softmax(1, inside(kind))?, labels, hit, rest, kind)
}

fn smooth_of_log(
    log_p: &Tensor,
    labels: &Tensor,
    hit: f64,
    rest: f64,
    kind: Kind,
) -> Result<Tensor> {
    let inside = inside(kind);
    let index = labels.f_unsqueeze(1)?;
    let own = log_p.f_gather(1, &index, false)?.f_squeeze_dim(1)?;
    // Two infinite terms must not cancel, nor an infinite logarithm of the label meet another target than its own.
    let (others, hit) = if hit > 0.0 && rest > 0.0 {
        (log_p.shallow_clone(), hit)
    } else {
        (log_p.f_scatter_value(1, &index, 0.0)?, hit + rest)
    };
    let others = others.f_sum_dim_intlist(1, false, inside)?;
    let each = own.f_mul_scalar(hit)?.f_add(&others.f_mul_scalar(rest)?)?;
    Ok(each.f_mean(inside)?.f_neg()?.f_to_kind(kind)?)
}

fn smooth_operations(
    input: &Input<'_>,
    labels: &Tensor,
    (hit, rest): (f64, f64),
    kind: Kind,
) -> Result<(Tensor, Option<StoredGrad>)> {
    let inside = inside(kind);
    let log_p = input.tensor.f_detach()?.f_log_softmax(1, inside)?;
    let loss = smooth_of_log(&log_p, labels, hit, rest, kind)?;
    if !input.wants_grad() {
        return Ok((loss, None));
    }
    let each = -1.0 / input.shape()[0] as f64;
    let of_log = log_p.f_full_like(rest * each)?.f_scatter_value(
        1,
        &labels.f_unsqueeze(1)?,
        (hit + rest) * each,
    )?;
    let grad = Tensor::f_internal_log_softmax_backward_data(&of_log, &log_p, 1, inside)?;
    Ok((loss, Some(stored(&grad)?)))
}
