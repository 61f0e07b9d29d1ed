//! Minimum class confusion on tensors. The mathematics is in [`crate::kernels::mcc`].

use super::ranks::{Exchanged, gradient, leaf};
use super::{Place, inside, loss_dtype, place, positive, room_for, stored, threads};
use crate::cuda;
use crate::error::{Error, Result};
use crate::kernels::mcc::{ENTROPY_EPSILON, KEPT, finish, mcc as kernel, sweep};
use crate::torch::autograd::{Room, StoredGrad, attach};
use crate::torch::input::Input;
use crate::torch::saved::Saved;
use crate::torch::{Dtype, Without, by_dtype, scalar, vector};
use std::ffi::CStr;
use tch::{Kind, Tensor};

/// The class, for messages.
pub const CLASS: &str = "MinimumClassConfusionLoss";
const LABEL: &CStr = c"MccBackward";

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
    let out = loss_dtype(&input, dtype);
    let (loss, grad) = match place(&[&input]) {
        Place::Cuda => cuda::mcc::mcc(&input, dtype, temperature, out)?,
        Place::Cpu => fused(&input, dtype, temperature)?,
        Place::Operations => operations(&input, temperature, out.kind())?,
        Place::Composite => return composite(logits, temperature, out.kind()),
    };
    attach(LABEL, &loss, &[logits], [grad], || {
        Ok(move |t: &[Tensor]| composite(&t[0], temperature, out.kind()))
    })?;
    Ok(loss)
}

fn fused(
    input: &Input<'_>,
    dtype: Dtype,
    temperature: f64,
) -> Result<(Tensor, Option<StoredGrad>)> {
    by_dtype!(dtype, E => {
        let rows = input.dense_rows::<E>()?;
        room_for::<[u8; KEPT]>(rows.rows())?;
        let mut grad = Room::<E>::of(input)?;
        let loss = kernel(rows, temperature, grad.slice(), threads(input.numel()));
        Ok((scalar(loss.value, loss_dtype(input, dtype))?, grad.stored(loss.scale)))
    })
}

/// A rank's part of a batch, between its two sweeps.
pub struct Part {
    /// `s_c`, then `e_c` of these rows: (2 C,), float64.
    pub sums: Tensor,
    second: Second,
}

type Second = Box<dyn FnOnce(&Exchanged<'_>) -> Result<Tensor> + Send>;

impl Part {
    /// The first sweep over `logits` (minibatch, C).
    pub fn new(logits: &Tensor, temperature: f64) -> Result<Self> {
        let input = Input::new(CLASS, "logits", logits)?;
        check_temperature(temperature)?;
        let dtype = input.floating()?;
        let (_, cols) = input.matrix()?;
        let out = loss_dtype(&input, dtype);
        if !input.on_cpu() {
            return Self::composite(&input, temperature, out.kind());
        }
        by_dtype!(dtype, E => {
            let rows = input.dense_rows::<E>()?;
            room_for::<[u8; KEPT]>(rows.rows())?;
            let mut grad = Room::<E>::of(&input)?;
            let mut swept = sweep(rows, temperature, grad.slice(), threads(input.numel()));
            let sums = vector(&[&swept.sums.s[..], &swept.sums.e].concat(), Dtype::F64)?;
            let (logits, seen) = (logits.shallow_clone(), Saved::of(logits, "the logits of MCC")?);
            let second: Second = Box::new(move |all: &Exchanged<'_>| {
                // The second sweep may read the logits again.
                seen.get()?;
                let values = all.values()?;
                let (s, e) = values.split_at(cols);
                swept.sums.s.copy_from_slice(s);
                swept.sums.e.copy_from_slice(e);
                let input = Input::new(CLASS, "logits", &logits)?;
                let rows = input.dense_rows::<E>()?;
                let loss = finish(swept, rows, temperature, grad.slice());
                let value = scalar(loss.value, out)?;
                all.attach(LABEL, CLASS, &value, &logits, grad.stored(loss.scale))?;
                Ok(value)
            });
            Ok(Self { sums, second })
        })
    }

    fn composite(input: &Input<'_>, temperature: f64, kind: Kind) -> Result<Self> {
        let (leaf, logits) = (leaf(input)?, input.tensor.shallow_clone());
        let rows = Weighted::of(&leaf, temperature, inside(kind))?;
        let own = Tensor::f_cat(&rows.sums()?, 0)?;
        Ok(Self {
            sums: own.f_detach()?.f_to_kind(Kind::Double)?,
            second: Box::new(move |all: &Exchanged<'_>| {
                let [s, e] = &all.through(&own)?.f_chunk(2, 0)?[..] else {
                    return Err(Error::Bridge("chunk: two halves expected".to_owned()));
                };
                // NaN without any row on any rank: no class is present then.
                let rows = s.f_detach()?.f_sum(s.f_kind()?)?;
                let nothing = rows.f_eq(0.0)?;
                let loss = Classes::of(s, e)?
                    .mean()?
                    .f_masked_fill(&nothing, f64::NAN)?;
                let grad = gradient(&loss, &leaf)?;
                let loss = loss.f_detach()?.f_to_kind(kind)?;
                all.attach(LABEL, CLASS, &loss, &logits, grad)?;
                Ok(loss)
            }),
        })
    }

    /// The loss of all rows of all ranks, differentiable with respect to the rows of this one.
    pub fn finish(self, all: &Exchanged<'_>) -> Result<Tensor> {
        all.check(CLASS, self.sums.size1()? as usize)?;
        (self.second)(all)
    }
}

/// The same loss in libtorch operations, `O(B C)` too.
fn composite(logits: &Tensor, temperature: f64, kind: Kind) -> Result<Tensor> {
    let rows = Weighted::of(logits, temperature, inside(kind))?;
    let [s, e] = rows.sums()?;
    finished(&Classes::of(&s, &e)?, logits.size()[0], kind)
}

/// The loss, and its gradient in closed form: `w_i / (C T) (1 - r_c - 2 p_ic) / s_c` with respect to `p`, where `r`
/// is `e / s`, and then through the softmax.
fn operations(
    input: &Input<'_>,
    temperature: f64,
    kind: Kind,
) -> Result<(Tensor, Option<StoredGrad>)> {
    let rows = Weighted::of(&input.tensor.f_detach()?, temperature, inside(kind))?;
    let [s, e] = rows.sums()?;
    let classes = Classes::of(&s, &e)?;
    let loss = finished(&classes, input.shape()[0], kind)?;
    if !input.wants_grad() {
        return Ok((loss, None));
    }
    let each = classes
        .present
        .f_reciprocal()?
        .f_mul_scalar(1.0 / (temperature * input.shape()[1] as f64))?;
    let constant = classes.ratio.f_rsub_scalar(1.0)?.f_mul(&each)?;
    let of_p = constant.f_addcmul(&rows.p, &each.f_mul_scalar(-2.0)?)?;
    // The weights come last: applied earlier, they would round terms that cancel in the softmax.
    let grad = Tensor::f_internal_softmax_backward_data(&of_p, &rows.p, 1, inside(kind))?
        .f_mul(&rows.weight)?;
    Ok((loss, Some(stored(&grad)?)))
}

/// The probabilities of rows, with their entropy weights.
pub(super) struct Weighted {
    /// (minibatch, C)
    pub p: Tensor,
    /// (minibatch, 1), not differentiated.
    pub weight: Tensor,
    /// Their product.
    pub wp: Tensor,
}

impl Weighted {
    /// Of `logits`, in `kind`.
    pub fn of(logits: &Tensor, temperature: f64, kind: Kind) -> Result<Self> {
        let z = logits.f_to_kind(kind)?.f_div_scalar(temperature)?;
        Self::of_probabilities(z.f_softmax(1, kind)?)
    }

    /// Of `p`. A row of zeros weighs nothing.
    pub fn of_probabilities(p: Tensor) -> Result<Self> {
        let kind = p.f_kind()?;
        let held = p.f_detach()?;
        let plogp = held.f_add_scalar(ENTROPY_EPSILON)?.f_log()?.f_mul(&held)?;
        let weight = plogp
            .f_sum_dim_intlist(1, true, kind)?
            .f_exp()?
            .f_add_scalar(1.0)?;
        let wp = p.f_mul(&weight)?;
        Ok(Self { p, weight, wp })
    }

    /// `s_c` and `e_c`.
    fn sums(&self) -> Result<[Tensor; 2]> {
        let kind = self.p.f_kind()?;
        let s = self.wp.f_sum_dim_intlist(0, false, kind)?;
        let not = self.p.f_rsub_scalar(1.0)?;
        let e = self.wp.f_mul(&not)?.f_sum_dim_intlist(0, false, kind)?;
        Ok([s, e])
    }
}

/// Which classes no row predicts, including those whose sum is too small to have a reciprocal.
fn absent(s: &Tensor) -> Result<Tensor> {
    let least = match s.f_kind()? {
        Kind::Double => f64::MIN_POSITIVE,
        _ => f32::MIN_POSITIVE.into(),
    };
    Ok(s.f_lt(least)?)
}

/// What is computed from the sums.
struct Classes {
    /// `s_c`, or 1 for a class that no row predicts.
    present: Tensor,
    /// `e_c / s_c`, or the limit 1 where that is 0/0. The divisor 1 keeps NaN out of the gradient as well.
    ratio: Tensor,
}

impl Classes {
    fn of(s: &Tensor, e: &Tensor) -> Result<Self> {
        let absent = absent(s)?;
        let present = s.f_masked_fill(&absent, 1.0)?;
        let ratio = e.f_div(&present)?.f_masked_fill(&absent, 1.0)?;
        Ok(Self { present, ratio })
    }

    fn mean(&self) -> Result<Tensor> {
        Ok(self.ratio.f_mean(self.ratio.f_kind()?)?)
    }
}

/// The loss of `rows` rows: NaN without any.
fn finished(classes: &Classes, rows: i64, kind: Kind) -> Result<Tensor> {
    let loss = classes.mean()?;
    let loss = if rows == 0 {
        loss.f_mul_scalar(f64::NAN)?
    } else {
        loss
    };
    Ok(loss.f_to_kind(kind)?)
}

/// The confusion matrix of probabilities and weighted probabilities, columns of sum 1; a class that
/// no row predicts has a column of zeros. Also returns what the columns were divided by.
pub(super) fn confusion(p: &Tensor, wp: &Tensor) -> Result<(Tensor, Tensor)> {
    let _full = Without::autocast();
    let s = wp.f_sum_dim_intlist(0, false, p.f_kind()?)?;
    let present = s.f_masked_fill(&absent(&s)?, 1.0)?;
    Ok((wp.f_tr()?.f_mm(p)?.f_div(&present)?, present))
}

/// The normalized class confusion matrix of `logits`, for inspection: C x C, without a gradient.
pub fn confusion_matrix(logits: &Tensor, temperature: f64) -> Result<Tensor> {
    let input = Input::new(CLASS, "logits", logits)?;
    check_temperature(temperature)?;
    let dtype = input.floating()?;
    input.matrix()?;
    let rows = Weighted::of(
        &logits.f_detach()?,
        temperature,
        dtype.at_least_f32().kind(),
    )?;
    Ok(confusion(&rows.p, &rows.wp)?
        .0
        .f_to_kind(loss_dtype(&input, dtype).kind())?)
}
