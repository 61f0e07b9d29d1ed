//! Minimum class confusion on tensors. The mathematics is in [`crate::kernels::mcc`].

use super::ranks::{Exchanged, gradient, leaf};
use super::{Place, loss_dtype, place, positive, threads};
use crate::cuda;
use crate::error::{Error, Result};
use crate::kernels::mcc::{ENTROPY_EPSILON, finish, mcc as kernel, sweep};
use crate::torch::autograd::{StoredGrad, attach};
use crate::torch::input::Input;
use crate::torch::{Dtype, Owned, Without, by_dtype, scalar, vector};
use std::ffi::CStr;
use tch::{Kind, Tensor};

const CLASS: &str = "MinimumClassConfusionLoss";
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
        Place::Composite => return composite(logits, temperature, out.kind()),
    };
    if grad.is_some() {
        let kind = out.kind();
        let formula = Box::new(move |t: &[Tensor]| composite(&t[0], temperature, kind));
        attach(LABEL, &loss, &[logits], vec![grad], formula)?;
    }
    Ok(loss)
}

fn fused(
    input: &Input<'_>,
    dtype: Dtype,
    temperature: f64,
) -> Result<(Tensor, Option<StoredGrad>)> {
    by_dtype!(dtype, E => {
        let rows = input.dense_rows::<E>()?;
        let mut grad = input.wants_grad().then(|| Owned::<E>::new(input.shape())).transpose()?;
        let slice = grad.as_mut().map(Owned::slice);
        let loss = kernel(rows, temperature, slice, threads(input.numel()));
        let grad = grad.map(|g| StoredGrad::new(g.into_tensor(), loss.scale));
        Ok((scalar(loss.value, loss_dtype(input, dtype))?, grad))
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
            let wants_grad = input.wants_grad();
            let mut grad = wants_grad.then(|| Owned::<E>::new(input.shape())).transpose()?;
            let slice = grad.as_mut().map(Owned::slice);
            let mut swept = sweep(rows, temperature, slice, threads(input.numel()));
            let sums = vector(&[&swept.sums.s[..], &swept.sums.e].concat(), Dtype::F64)?;
            let logits = logits.shallow_clone();
            let second: Second = Box::new(move |all: &Exchanged<'_>| {
                let values = all.values()?;
                let (s, e) = values.split_at(cols);
                swept.sums.s.copy_from_slice(s);
                swept.sums.e.copy_from_slice(e);
                let input = Input::new(CLASS, "logits", &logits)?;
                let rows = input.dense_rows::<E>()?;
                let loss = finish(swept, rows, temperature, grad.as_mut().map(Owned::slice));
                let value = scalar(loss.value, out)?;
                let grad = grad.map(|g| StoredGrad::new(g.into_tensor(), loss.scale));
                all.attach(LABEL, CLASS, &value, &logits, grad)?;
                Ok(value)
            });
            Ok(Self { sums, second })
        })
    }

    fn composite(input: &Input<'_>, temperature: f64, kind: Kind) -> Result<Self> {
        let (leaf, logits) = (leaf(input)?, input.tensor.shallow_clone());
        let own = Tensor::f_cat(&sums(&leaf, temperature, kind)?, 0)?;
        Ok(Self {
            sums: own.f_detach()?.f_to_kind(Kind::Double)?,
            second: Box::new(move |all: &Exchanged<'_>| {
                let [s, e] = &all.through(&own)?.f_chunk(2, 0)?[..] else {
                    return Err(Error::Bridge("chunk: two halves expected".to_owned()));
                };
                // No class is present in no row.
                let rows = s.f_detach()?.f_sum(s.f_kind()?)?;
                let nothing = rows.f_eq(0.0)?;
                let loss = of_sums(s, e)?.f_masked_fill(&nothing, f64::NAN)?;
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
    let [s, e] = sums(logits, temperature, kind)?;
    let loss = of_sums(&s, &e)?;
    let empty = logits.size().first() == Some(&0);
    let loss = if empty {
        loss.f_mul_scalar(f64::NAN)?
    } else {
        loss
    };
    Ok(loss.f_to_kind(kind)?)
}

/// `s_c` and `e_c`.
fn sums(logits: &Tensor, temperature: f64, kind: Kind) -> Result<[Tensor; 2]> {
    let inside = if kind == Kind::Double {
        Kind::Double
    } else {
        Kind::Float
    };
    let (p, wp) = weighted(logits, temperature, inside)?;
    let s = wp.f_sum_dim_intlist(0, false, inside)?;
    let not = p.f_neg()?.f_add_scalar(1.0)?;
    let e = wp.f_mul(&not)?.f_sum_dim_intlist(0, false, inside)?;
    Ok([s, e])
}

fn of_sums(s: &Tensor, e: &Tensor) -> Result<Tensor> {
    // A class that no row predicts: 0/0, whose limit is 1. A divisor of 1 keeps NaN out of the
    // gradient as well.
    let absent = s.f_eq(0.0)?;
    let of_classes = e.f_div(&s.f_masked_fill(&absent, 1.0)?)?;
    Ok(of_classes
        .f_masked_fill(&absent, 1.0)?
        .f_mean(s.f_kind()?)?)
}

/// The probabilities of `logits`, and the same times their row's entropy weight, which is not
/// differentiated.
pub(super) fn weighted(logits: &Tensor, temperature: f64, kind: Kind) -> Result<(Tensor, Tensor)> {
    let p = logits
        .f_to_kind(kind)?
        .f_div_scalar(temperature)?
        .f_softmax(1, kind)?;
    let held = p.f_detach()?;
    let plogp = held.f_add_scalar(ENTROPY_EPSILON)?.f_log()?.f_mul(&held)?;
    let weight = plogp
        .f_sum_dim_intlist(1, true, kind)?
        .f_exp()?
        .f_add_scalar(1.0)?;
    let wp = p.f_mul(&weight)?;
    Ok((p, wp))
}

/// The confusion matrix of probabilities and weighted probabilities, columns of sum 1; a class that
/// no row predicts has a column of zeros.
pub(super) fn confusion(p: &Tensor, wp: &Tensor) -> Result<Tensor> {
    let _full = Without::autocast();
    let s = wp.f_sum_dim_intlist(0, false, p.f_kind()?)?;
    let absent = s.f_eq(0.0)?;
    Ok(wp.f_tr()?.f_mm(p)?.f_div(&s.f_masked_fill(&absent, 1.0)?)?)
}

/// The normalised class confusion matrix of `logits`, for reading: C x C, without a gradient.
pub fn confusion_matrix(logits: &Tensor, temperature: f64) -> Result<Tensor> {
    let input = Input::new(CLASS, "logits", logits)?;
    check_temperature(temperature)?;
    let dtype = input.floating()?;
    input.matrix()?;
    let (p, wp) = weighted(
        &logits.f_detach()?,
        temperature,
        dtype.at_least_f32().kind(),
    )?;
    Ok(confusion(&p, &wp)?.f_to_kind(loss_dtype(&input, dtype).kind())?)
}
