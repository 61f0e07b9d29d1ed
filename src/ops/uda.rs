//! Strong-weak consistency on tensors. The mathematics is in [`crate::kernels::uda`].

use super::{Place, place, positive, threads};
use crate::cuda;
use crate::error::{Error, Result};
use crate::kernels::uda::uda as kernel;
use crate::torch::autograd::{StoredGrad, attach};
use crate::torch::input::Input;
use crate::torch::{Dtype, Owned, by_dtype, scalar};
use tch::{Kind, Tensor};

const CLASS: &str = "StrongWeakConsistencyLoss";

/// `ValueError` for a threshold that is NaN or a temperature that is not above 0.
pub fn check(threshold: f64, temperature: f64) -> Result<()> {
    if threshold.is_nan() {
        return Err(Error::Value(format!(
            "{CLASS}: threshold must be a number, got {threshold}"
        )));
    }
    positive(CLASS, "temperature", temperature)
}

/// The loss of the logits `y_strong` against those of `y`, both (minibatch, C), differentiable with
/// respect to `y_strong`.
pub fn uda(y_strong: &Tensor, y: &Tensor, threshold: f64, temperature: f64) -> Result<Tensor> {
    let (strong, weak) = (
        Input::new(CLASS, "y_strong", y_strong)?,
        Input::new(CLASS, "y", y)?,
    );
    check(threshold, temperature)?;
    let (dtype, weak_dtype) = (strong.floating()?, weak.floating()?);
    strong.matrix()?;
    weak.matrix()?;
    weak.same_device(&strong)?;
    if weak.shape() != strong.shape() {
        return Err(weak.wrong(&format!("have the shape of y_strong, {:?}", strong.shape())));
    }
    // The mask is float32, and so promotes half types, in tllib too.
    let out = dtype.promote(weak_dtype).at_least_f32();
    let (loss, grad) = match place(&[&strong, &weak]) {
        Place::Cuda => cuda::uda::uda(&strong, &weak, dtype, threshold, temperature)?,
        Place::Cpu => fused(&strong, &weak, dtype, threshold, temperature)?,
        Place::Composite => return composite(y_strong, y, threshold, temperature, out.kind()),
    };
    if grad.is_some() {
        // As an input of the node y is guarded against writes; detached, it gets no gradient.
        let inputs = [y_strong, &y.f_detach()?];
        let formula = Box::new(move |t: &[Tensor]| {
            composite(&t[0], &t[1], threshold, temperature, out.kind())
        });
        attach(c"UdaBackward", &loss, &inputs, vec![grad, None], formula)?;
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
        let mut grad = strong.wants_grad().then(|| Owned::<E>::new(strong.shape())).transpose()?;
        let slice = grad.as_mut().map(Owned::slice);
        let loss = kernel(z, y, threshold, temperature, slice, threads(2 * strong.numel()));
        let grad = grad.map(|g| StoredGrad::new(g.into_tensor(), loss.scale));
        Ok((scalar(loss.value, dtype.at_least_f32())?, grad))
    })
}

/// The same in libtorch operations.
fn composite(
    y_strong: &Tensor,
    y: &Tensor,
    threshold: f64,
    temperature: f64,
    kind: Kind,
) -> Result<Tensor> {
    let y = y.f_detach()?;
    // In the dtype of y, which decides what is selected.
    let (confidence, _) = y.f_softmax(1, None::<Kind>)?.f_max_dim(1, false)?;
    let mask = confidence.f_gt(threshold)?.f_to_kind(kind)?;
    let q = y.f_to_kind(kind)?.f_softmax(1, kind)?;
    let log_p = y_strong
        .f_to_kind(kind)?
        .f_div_scalar(temperature)?
        .f_log_softmax(1, kind)?;
    let terms = q.f_xlogy(&q)?.f_sub(&q.f_mul(&log_p)?)?;
    let each = terms.f_sum_dim_intlist(1, false, kind)?.f_mul(&mask)?;
    Ok(each
        .f_sum(kind)?
        .f_div(&mask.f_sum(kind)?.f_clamp_min(1.0)?)?)
}
