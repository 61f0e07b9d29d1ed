//! Entropy of probabilities on tensors. The mathematics is in [`crate::kernels::entropy`].

use super::{Place, Reduction, place, room_for, stored, threads, widened_on_devices};
use crate::cuda;
use crate::error::Result;
use crate::kernels::columns;
use crate::kernels::element::stored_scale;
use crate::kernels::entropy::{entropy as kernel, entropy_by_columns};
use crate::kernels::mcc::ENTROPY_EPSILON;
use crate::kernels::reduce::sum;
use crate::torch::autograd::{Room, StoredGrad, attach};
use crate::torch::input::Input;
use crate::torch::{Dtype, by_dtype, scalar, vector};
use tch::{Kind, Tensor};

/// The function, for messages.
pub const CLASS: &str = "entropy";

/// The entropy of each row of `predictions`, over dimension 1, or their mean. As in tllib, the sum is not taken.
pub fn entropy(predictions: &Tensor, reduction: Reduction) -> Result<Tensor> {
    let mean = reduction == Reduction::Mean;
    let input = Input::new(CLASS, "predictions", predictions)?;
    let dtype = input.floating()?;
    if input.shape().len() < 2 {
        return Err(input.wrong("have shape (minibatch, C, ...)"));
    }
    // Autocast widens the logarithm.
    let out_dtype = widened_on_devices(&input, dtype);
    let (out, grad) = match place(&[&input]) {
        Place::Cuda => {
            cuda::entropy::entropy(&input, mean, weight(&input, dtype, mean), dtype, out_dtype)?
        }
        Place::Cpu => fused(&input, dtype, mean)?,
        Place::Operations => operations(&input, mean, out_dtype)?,
        Place::Composite => return composite(predictions, mean, out_dtype),
    };
    attach(c"EntropyBackward", &out, &[predictions], [grad], || {
        Ok(move |t: &[Tensor]| composite(&t[0], mean, out_dtype))
    })?;
    Ok(out)
}

/// The weight of a row, and the scale of the stored gradient.
fn weight(input: &Input<'_>, dtype: Dtype, mean: bool) -> (f64, f64) {
    if !mean {
        return (1.0, 1.0);
    }
    let weight = 1.0 / input.shape()[0] as f64;
    // The gradient is at most 12 in magnitude for probabilities: float16 needs a scale only if it is averaged.
    (
        weight,
        by_dtype!(dtype, E => stored_scale::<E>(16.0 * weight)),
    )
}

fn fused(input: &Input<'_>, dtype: Dtype, mean: bool) -> Result<(Tensor, Option<StoredGrad>)> {
    by_dtype!(dtype, E => {
        let rows = input.dense_rows::<E>()?;
        let batch = rows.rows();
        room_for::<f64>(batch)?;
        let mut each = vec![0.0; batch];
        let columns = columns::fit(&rows);
        let mut grad = Room::<E>::laid_out(input, columns)?;
        let (weight, scale) = weight(input, dtype, mean);
        let kernel = if columns { entropy_by_columns } else { kernel };
        kernel(rows, &mut each, grad.slice(), weight * scale, threads(input.numel()));
        let out = if mean {
            scalar(sum(&each) / batch as f64, dtype)?
        } else {
            vector(&each, dtype)?
        };
        Ok((out, grad.stored(scale)))
    })
}

/// The same in libtorch operations, in float32 inside for half precision.
struct Formula {
    p: Tensor,
    /// `p` plus the epsilon.
    shifted: Tensor,
    log: Tensor,
    entropy: Tensor,
}

impl Formula {
    fn of(predictions: &Tensor, mean: bool, out: Dtype) -> Result<Self> {
        let p = predictions.f_to_kind(out.at_least_f32().kind())?;
        let shifted = p.f_add_scalar(ENTROPY_EPSILON)?;
        let log = shifted.f_log()?;
        let each = log.f_mul(&p)?.f_sum_dim_intlist(1, false, None::<Kind>)?;
        let sum = if mean {
            each.f_mean(None::<Kind>)?
        } else {
            each
        };
        Ok(Self {
            entropy: sum.f_neg()?.f_to_kind(out.kind())?,
            p,
            shifted,
            log,
        })
    }
}

fn composite(predictions: &Tensor, mean: bool, out: Dtype) -> Result<Tensor> {
    Ok(Formula::of(predictions, mean, out)?.entropy)
}

fn operations(input: &Input<'_>, mean: bool, out: Dtype) -> Result<(Tensor, Option<StoredGrad>)> {
    let Formula {
        p,
        shifted,
        log,
        entropy,
    } = Formula::of(&input.tensor.f_detach()?, mean, out)?;
    if !input.wants_grad() {
        return Ok((entropy, None));
    }
    let slope = log.f_addcdiv(&p, &shifted)?;
    let grad = if mean {
        slope.f_mul_scalar(-(input.shape()[1] as f64) / input.numel() as f64)?
    } else {
        slope.f_neg()?
    };
    Ok((entropy, Some(stored(&grad)?)))
}
