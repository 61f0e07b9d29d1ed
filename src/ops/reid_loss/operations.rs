//! The triplet losses in libtorch operations, with the gradient in closed form: that of 2N pairs.

use super::check::Inputs;
use super::composite::{Distances, Pairs, Search, Side, of_differences, reference};
use super::triplet::{Arguments, LABEL, Objective};
use crate::error::Result;
use crate::kernels::reid_loss::{CLAMP, SMALLEST_NORM};
use crate::ops::stored;
use crate::torch::autograd::{Constant, StoredGrad, attach};
use tch::{Kind, Tensor};

/// The loss, attached to its graph: features in `kind`, a teacher's and the loss in `out`.
pub fn triplet(call: &Arguments<'_>, inputs: &Inputs<'_>, kind: Kind, out: Kind) -> Result<Tensor> {
    let side = |x: &Tensor| Side::of(&x.f_detach()?, call.normalize, kind);
    let u = side(call.features.1)?;
    let memory = call.memory.map(|(memory, _)| side(memory)).transpose()?;
    let v = memory.as_ref().unwrap_or(&u);
    let pairs = Pairs::mined(&u.unit, &v.unit, call, Search::Direct)?;
    let reference = reference(call, &pairs, out)?;
    let distances = Distances::of(&u.unit, &v.unit, &pairs.index)?;
    let t = distances.difference()?.f_add(&pairs.offset)?;
    let loss = of_differences(&t, call.objective, reference.as_ref(), out)?;

    let wanted = [
        inputs.features.wants_grad(),
        inputs.memory.as_ref().is_some_and(|(m, _)| m.wants_grad()),
    ];
    if !wanted.contains(&true) {
        return Ok(loss);
    }
    let slope = slope(&t, call.objective, reference.as_ref())?.f_to_kind(kind)?;
    let pulls = pulls(&distances, &slope)?;
    let grads = match &memory {
        None => vec![Some(u.stored(&at_candidates(
            at_anchors(&pulls)?,
            &pairs,
            &pulls,
        )?)?)],
        Some(v) => {
            let of_u = wanted[0].then(|| u.stored(&at_anchors(&pulls)?));
            let nothing = || v.unit.f_zeros_like();
            let of_v = wanted[1].then(|| v.stored(&at_candidates(nothing()?, &pairs, &pulls)?));
            vec![of_u.transpose()?, of_v.transpose()?]
        }
    };
    attach(LABEL, &loss, &call.differentiable(), grads, || {
        let again = call.again(kind, out);
        let (index, offset) = (Constant(pairs.index), Constant(pairs.offset));
        let reference = reference.map(Constant);
        Ok(move |t: &[Tensor]| {
            let pairs = Pairs {
                index: index.get().shallow_clone(),
                offset: offset.get().shallow_clone(),
            };
            again.loss(t, &pairs, reference.as_ref().map(Constant::get))
        })
    })?;
    Ok(loss)
}

/// The derivative of each anchor's loss with respect to `t`.
fn slope(t: &Tensor, objective: Objective, reference: Option<&Tensor>) -> Result<Tensor> {
    Ok(match (objective, reference) {
        // 1 at 0, as with torch's clamp_min.
        (Objective::Hinge(margin), _) => t.f_add_scalar(margin)?.f_ge(0.0)?,
        (Objective::Margin(margin), _) => t.f_sigmoid()?.f_sub_scalar(margin)?,
        (Objective::Taught, Some(reference)) => t.f_sigmoid()?.f_sub(reference)?,
        (Objective::Taught, None) => t.f_zeros_like()?,
    })
}

/// The gradients with respect to the pairs' candidates, (2, N, F); those with respect to the anchors are their
/// negatives. 0 where the squared distance was clamped.
fn pulls(distances: &Distances, slope: &Tensor) -> Result<Tensor> {
    let weight = slope.f_mul_scalar(1.0 / slope.size1()? as f64)?;
    let factor = Tensor::f_stack(&[weight.f_neg()?, weight], 0)?
        .f_div(&distances.lengths)?
        .f_masked_fill(&distances.squares.f_lt(CLAMP)?, 0.0)?;
    Ok(distances.between.f_mul(&factor.f_unsqueeze(2)?)?)
}

/// The gradient with respect to the anchors.
fn at_anchors(pulls: &Tensor) -> Result<Tensor> {
    Ok(pulls
        .f_sum_dim_intlist(0, false, pulls.f_kind()?)?
        .f_neg()?)
}

/// `grad` plus the pulls, added to the rows of the candidates.
fn at_candidates(mut grad: Tensor, pairs: &Pairs, pulls: &Tensor) -> Result<Tensor> {
    Ok(grad.f_index_add_(0, &pairs.index, &pulls.f_flatten(0, 1)?)?)
}

impl Side {
    /// Turns the gradient with respect to [`Side::unit`] into that with respect to the features.
    fn stored(&self, grad: &Tensor) -> Result<StoredGrad> {
        let Some(norm) = &self.norm else {
            return stored(grad);
        };
        let along = grad
            .f_mul(&self.unit)?
            .f_sum_dim_intlist(1, true, grad.f_kind()?)?
            .f_masked_fill(&norm.f_lt(SMALLEST_NORM)?, 0.0)?;
        let across = grad.f_sub(&self.unit.f_mul(&along)?)?;
        stored(&across.f_div(&norm.f_clamp_min(SMALLEST_NORM)?)?)
    }
}
