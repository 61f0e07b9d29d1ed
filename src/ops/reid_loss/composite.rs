//! The triplet losses in libtorch operations: mining outside the graph, then the 2N pairs in it.

use super::triplet::{Arguments, Objective};
use crate::error::{Error, Result};
use crate::kernels::reid_loss::mining::Hardest;
use crate::kernels::reid_loss::{CLAMP, OFFSET, SMALLEST_NORM};
use crate::ops::counting;
use crate::torch::Without;
use tch::{Kind, Tensor};

/// The same loss in libtorch operations: features in `kind`, a teacher's and the loss in `out`. It, too, computes one
/// product and differentiates 2N pairs.
pub fn composite(call: &Arguments<'_>, kind: Kind, out: Kind) -> Result<Tensor> {
    let (u, v) = sides(
        call.features.1,
        call.memory.map(|(m, _)| m),
        call.normalize,
        kind,
    )?;
    let pairs = Pairs::mined(&u, &v, call, Search::Compiled)?;
    let reference = reference(call, &pairs, out)?;
    of_pairs(&u, &v, &pairs, call.objective, reference.as_ref(), out)
}

/// The teacher's references for the pairs, in `kind`.
pub fn reference(call: &Arguments<'_>, pairs: &Pairs, kind: Kind) -> Result<Option<Tensor>> {
    let (Some(teacher), Objective::Taught) = (call.teacher, call.objective) else {
        return Ok(None);
    };
    let w = Side::of(&teacher.f_detach()?, call.normalize, kind)?.unit;
    let t = Distances::of(&w, &w, &pairs.index)?.difference()?;
    Ok(Some(t.f_sigmoid()?))
}

/// Features, divided by their norms if requested.
pub struct Side {
    /// (N, F)
    pub unit: Tensor,
    /// (N, 1), before it is raised to [`SMALLEST_NORM`].
    pub norm: Option<Tensor>,
}

impl Side {
    /// Of `features`, in `kind`.
    pub fn of(features: &Tensor, normalize: bool, kind: Kind) -> Result<Self> {
        let unit = features.f_to_kind(kind)?;
        if !normalize {
            return Ok(Self { unit, norm: None });
        }
        let norm = unit.f_norm_scalaropt_dim(2.0, 1, true)?;
        Ok(Self {
            unit: unit.f_div(&norm.f_clamp_min(SMALLEST_NORM)?)?,
            norm: Some(norm),
        })
    }
}

/// The features and the memory, normalized if requested.
pub fn sides(
    features: &Tensor,
    memory: Option<&Tensor>,
    normalize: bool,
    kind: Kind,
) -> Result<(Tensor, Tensor)> {
    let side = |x: &Tensor| Side::of(x, normalize, kind).map(|side| side.unit);
    let u = side(features)?;
    let v = memory.map_or_else(|| Ok(u.shallow_clone()), side)?;
    Ok((u, v))
}

/// Distances of each anchor from its positive, then of each from its negative.
pub struct Distances {
    /// `u_i - v_index(i)`, (2, N, F).
    pub between: Tensor,
    /// Their squared lengths, (2, N).
    pub squares: Tensor,
    /// Their lengths, from squares raised to [`CLAMP`].
    pub lengths: Tensor,
}

impl Distances {
    /// Of the pairs that `index` names.
    pub fn of(u: &Tensor, v: &Tensor, index: &Tensor) -> Result<Self> {
        let candidates = v.f_index_select(0, index)?;
        let (rows, dim) = u.size2()?;
        let between = u.f_sub(&candidates.f_view([2, rows, dim])?)?;
        let squares = between
            .f_square()?
            .f_sum_dim_intlist(2, false, u.f_kind()?)?;
        let lengths = squares.f_clamp_min(CLAMP)?.f_sqrt()?;
        Ok(Self {
            between,
            squares,
            lengths,
        })
    }

    /// By how much the positive is farther away than the negative.
    pub fn difference(&self) -> Result<Tensor> {
        let [positive, negative] = &self.lengths.f_unbind(0)?[..] else {
            return Err(Error::Bridge("unbind: two halves expected".to_owned()));
        };
        Ok(positive.f_sub(negative)?)
    }
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
    let distances = Distances::of(u, v, &pairs.index)?;
    let t = distances.difference()?.f_add(&pairs.offset)?;
    of_differences(&t, objective, reference, kind)
}

/// The loss of pairs that are given, as a function of what is differentiated: for second derivatives.
#[derive(Clone, Copy)]
pub struct Again {
    pub objective: Objective,
    pub normalize: bool,
    /// The dtype of the features.
    pub kind: Kind,
    /// The dtype of the loss.
    pub out: Kind,
}

impl Again {
    /// The loss of the features and the memory, if there is one.
    pub fn loss(self, t: &[Tensor], pairs: &Pairs, reference: Option<&Tensor>) -> Result<Tensor> {
        let (u, v) = sides(&t[0], t.get(1), self.normalize, self.kind)?;
        of_pairs(&u, &v, pairs, self.objective, reference, self.out)
    }
}

/// The loss in `kind` of anchors whose distances differ by `t`.
pub fn of_differences(
    t: &Tensor,
    objective: Objective,
    reference: Option<&Tensor>,
    kind: Kind,
) -> Result<Tensor> {
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
            let other = t.f_neg()?.f_log_sigmoid()?.f_mul(&r.f_rsub_scalar(1.0)?)?;
            own.f_add(&other)?.f_neg()?
        }
    };
    Ok(each.f_mean(kind)?)
}

/// How the first largest or smallest element of each row, or the first NaN, is found.
#[derive(Clone, Copy, Debug)]
pub enum Search {
    /// By libtorch's operation.
    Direct,
    /// In operations that `torch.compile` may fuse with those around. The inductor of torch 2.11 returns a wrong
    /// index on the CPU when it fuses argmax with a mask computed from strided labels; the maximum itself it gets
    /// right.
    Compiled,
}

impl Search {
    /// The index of the largest.
    pub fn largest(self, keys: &Tensor) -> Result<Tensor> {
        match self {
            Self::Direct => Ok(keys.f_argmax(1, false)?),
            Self::Compiled => first(keys, &keys.f_amax([1].as_slice(), true)?),
        }
    }

    /// The index of the smallest.
    pub fn smallest(self, keys: &Tensor) -> Result<Tensor> {
        match self {
            Self::Direct => Ok(keys.f_argmin(1, false)?),
            Self::Compiled => first(keys, &keys.f_amin([1].as_slice(), true)?),
        }
    }
}

/// The index of the first element of each row that equals its `value` or is NaN.
fn first(keys: &Tensor, value: &Tensor) -> Result<Tensor> {
    let cols = keys.size()[1];
    let found = keys.f_eq_tensor(value)?.f_logical_or(&keys.f_isnan()?)?;
    let columns = counting(cols, keys)?.f_where_scalarother(&found, cols)?;
    Ok(columns.f_amin([1].as_slice(), false)?)
}

/// The mined pairs.
pub struct Pairs {
    /// Indices of each anchor's hardest positive, then of the hardest negatives, (2 N).
    pub index: Tensor,
    /// What tllib's offsets for missing positives and negatives add to the difference of the distances, (N).
    pub offset: Tensor,
}

impl Pairs {
    /// From the kernel's result.
    pub fn of(hardest: &[Hardest], kind: Kind) -> Result<Self> {
        let positive = hardest.iter().map(|h| h.positive.index as i64);
        let negative = hardest.iter().map(|h| h.negative.index as i64);
        let index: Vec<_> = positive.chain(negative).collect();
        let missing = |h: &Hardest| u8::from(h.positive.missing) + u8::from(h.negative.missing);
        let offset: Vec<_> = hardest
            .iter()
            .map(|h| -OFFSET * f64::from(missing(h)))
            .collect();
        Ok(Self {
            index: Tensor::f_from_slice(&index)?,
            offset: Tensor::f_from_slice(&offset)?.f_to_kind(kind)?,
        })
    }

    /// In libtorch operations, from features `u` and `v` whose identities the call has.
    pub fn mined(u: &Tensor, v: &Tensor, call: &Arguments<'_>, search: Search) -> Result<Self> {
        let (u, v, kind) = (u.f_detach()?, v.f_detach()?, u.f_kind()?);
        let squares = v.f_square()?.f_sum_dim_intlist(1, false, kind)?;
        let keys = {
            let _guard = Without::autocast();
            squares.f_addmm(&u.f_mul_scalar(-2.0)?, &v.f_transpose(0, 1)?)?
        };
        let labels = call.labels.1;
        let candidates = call.memory.map_or(labels, |(_, labels)| labels);
        let same = labels
            .f_unsqueeze(1)?
            .f_eq_tensor(&candidates.f_unsqueeze(0)?)?;
        let other = same.f_logical_not()?;
        // If no candidate qualifies, all do, at tllib's offset. That happens for one of the two at most.
        let has_positive = same.f_any_dim(1, true)?;
        let has_negative = other.f_any_dim(1, true)?;
        let masked = |of: &Tensor, any: &Tensor, value| -> Result<Tensor> {
            Ok(keys.f_masked_fill(&of.f_logical_and(any)?, value)?)
        };
        let positive = search.largest(&masked(&other, &has_positive, f64::NEG_INFINITY)?)?;
        let negative = search.smallest(&masked(&same, &has_negative, f64::INFINITY)?)?;
        let offset = has_positive
            .f_logical_and(&has_negative)?
            .f_squeeze_dim(1)?
            .f_to_kind(kind)?
            .f_sub_scalar(1.0)?
            .f_mul_scalar(OFFSET)?;
        Ok(Self {
            index: Tensor::f_cat(&[positive, negative], 0)?,
            offset,
        })
    }
}
