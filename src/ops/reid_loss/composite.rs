//! The triplet losses in libtorch operations: mining outside the graph, then the 2N pairs in it.

use super::triplet::{Arguments, Objective};
use crate::error::Result;
use crate::kernels::reid_loss::mining::Hardest;
use crate::kernels::reid_loss::{CLAMP, OFFSET, SMALLEST_NORM};
use crate::torch::Without;
use tch::{Kind, Tensor};

/// The same loss in libtorch operations: features in `kind`, a teacher's and the loss in `out`. It has one product as
/// well, and differentiates 2N pairs.
pub fn composite(call: &Arguments<'_>, kind: Kind, out: Kind) -> Result<Tensor> {
    let (u, v) = sides(
        call.features.1,
        call.memory.map(|(m, _)| m),
        call.normalize,
        kind,
    )?;
    let labels = call.labels.1;
    let pairs = Pairs::mined(&u, &v, (labels, call.memory.map_or(labels, |(_, l)| l)))?;
    let reference = match (call.teacher, call.objective) {
        (Some(teacher), Objective::Taught) => {
            let (w, _) = sides(&teacher.f_detach()?, None, call.normalize, out)?;
            let positive = distances(&w, &w, &pairs.positive.0)?;
            Some(
                positive
                    .f_sub(&distances(&w, &w, &pairs.negative.0)?)?
                    .f_sigmoid()?,
            )
        }
        _ => None,
    };
    of_pairs(&u, &v, &pairs, call.objective, reference.as_ref(), out)
}

/// The features and the memory, normalised if they are to be.
pub fn sides(
    features: &Tensor,
    memory: Option<&Tensor>,
    normalize: bool,
    kind: Kind,
) -> Result<(Tensor, Tensor)> {
    let side = |x: &Tensor| -> Result<Tensor> {
        let x = x.f_to_kind(kind)?;
        if !normalize {
            return Ok(x);
        }
        Ok(x.f_div(
            &x.f_norm_scalaropt_dim(2.0, 1, true)?
                .f_clamp_min(SMALLEST_NORM)?,
        )?)
    };
    let u = side(features)?;
    let v = memory.map_or_else(|| Ok(u.shallow_clone()), side)?;
    Ok((u, v))
}

/// `|u_i - v_index(i)|`
fn distances(u: &Tensor, v: &Tensor, index: &Tensor) -> Result<Tensor> {
    let difference = u.f_sub(&v.f_index_select(0, index)?)?;
    let square = difference
        .f_square()?
        .f_sum_dim_intlist(1, false, u.f_kind()?)?;
    Ok(square.f_clamp_min(CLAMP)?.f_sqrt()?)
}

/// The loss of the pairs in `kind`, differentiable with respect to `u` and `v`.
pub fn of_pairs(
    u: &Tensor,
    v: &Tensor,
    pairs: &Pairs,
    objective: Objective,
    reference: Option<&Tensor>,
    kind: Kind,
) -> Result<Tensor> {
    let positive = distances(u, v, &pairs.positive.0)?.f_add(&pairs.positive.1)?;
    let negative = distances(u, v, &pairs.negative.0)?.f_add(&pairs.negative.1)?;
    let t = positive.f_sub(&negative)?;
    let each = match objective {
        Objective::Hinge(margin) => t.f_add_scalar(margin)?.f_clamp_min(0.0)?,
        Objective::Margin(margin) => {
            let own = t.f_log_sigmoid()?.f_mul_scalar(-margin)?;
            own.f_sub(&t.f_neg()?.f_log_sigmoid()?.f_mul_scalar(1.0 - margin)?)?
        }
        Objective::Taught => {
            let r =
                reference.map_or_else(|| t.f_detach()?.f_sigmoid(), |r| Ok(r.shallow_clone()))?;
            let own = t.f_log_sigmoid()?.f_mul(&r)?;
            let other = t
                .f_neg()?
                .f_log_sigmoid()?
                .f_mul(&r.f_neg()?.f_add_scalar(1.0)?)?;
            own.f_add(&other)?.f_neg()?
        }
    };
    Ok(each.f_mean(kind)?)
}

/// The mined pairs as tensors: one entry for each anchor.
pub struct Pairs {
    /// The hardest positive and what tllib adds to its distance.
    pub positive: (Tensor, Tensor),
    /// The hardest negative and what tllib adds to its distance.
    pub negative: (Tensor, Tensor),
}

impl Pairs {
    /// From the kernel's result.
    pub fn of(hardest: &[Hardest], kind: Kind) -> Result<Self> {
        let tensors = |index: Vec<i64>, offset: Vec<f64>| -> Result<_> {
            Ok((
                Tensor::f_from_slice(&index)?,
                Tensor::f_from_slice(&offset)?.f_to_kind(kind)?,
            ))
        };
        let offset = |missing: bool| if missing { OFFSET } else { 0.0 };
        let positive = hardest
            .iter()
            .map(|h| (h.positive.index as i64, -offset(h.positive.missing)));
        let negative = hardest
            .iter()
            .map(|h| (h.negative.index as i64, offset(h.negative.missing)));
        let (index, add) = positive.unzip();
        let positive = tensors(index, add)?;
        let (index, add) = negative.unzip();
        Ok(Self {
            positive,
            negative: tensors(index, add)?,
        })
    }

    /// In libtorch operations, from features `u` and `v` whose identities are compared with `eq`.
    pub fn mined(u: &Tensor, v: &Tensor, labels: (&Tensor, &Tensor)) -> Result<Self> {
        let (u, v, kind) = (u.f_detach()?, v.f_detach()?, u.f_kind()?);
        let squares = v.f_square()?.f_sum_dim_intlist(1, false, kind)?;
        let products = {
            let _guard = Without::autocast();
            u.f_matmul(&v.f_transpose(0, 1)?)?
        };
        let keys = squares.f_sub(&products.f_mul_scalar(2.0)?)?;
        let same = labels
            .0
            .f_unsqueeze(1)?
            .f_eq_tensor(&labels.1.f_unsqueeze(0)?)?;
        let other = same.f_logical_not()?;
        // Where nobody qualifies, everybody does, at tllib's offset.
        let no_positive = same.f_any_dim(1, true)?.f_logical_not()?;
        let no_negative = other.f_any_dim(1, true)?.f_logical_not()?;
        let not_positive = other.f_logical_and(&no_positive.f_logical_not()?)?;
        let not_negative = same.f_logical_and(&no_negative.f_logical_not()?)?;
        let positive = keys
            .f_masked_fill(&not_positive, f64::NEG_INFINITY)?
            .f_argmax(1, false)?;
        let negative = keys
            .f_masked_fill(&not_negative, f64::INFINITY)?
            .f_argmin(1, false)?;
        let offset = |missing: &Tensor, by: f64| -> Result<Tensor> {
            Ok(missing
                .f_squeeze_dim(1)?
                .f_to_kind(kind)?
                .f_mul_scalar(by)?)
        };
        Ok(Self {
            positive: (positive, offset(&no_positive, -OFFSET)?),
            negative: (negative, offset(&no_negative, OFFSET)?),
        })
    }
}
