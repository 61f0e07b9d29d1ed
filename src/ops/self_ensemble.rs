//! Class balance on tensors. The mathematics is in [`crate::kernels::self_ensemble`].

use super::ranks::{Exchanged, gradient, leaf};
use super::{Place, inside, loss_dtype, place, threads};
use crate::cuda;
use crate::error::{Error, Result};
use crate::kernels::columns;
use crate::kernels::element::{Element, stored_scale};
use crate::kernels::self_ensemble::{
    LOG_FLOOR, SLOPE_FLOOR, class_balance as kernel, column_means, column_sums, repeat_row,
    repeat_row_by_columns,
};
use crate::torch::autograd::{Backward, Composite, Room, StoredGrad, attach, attach_with};
use crate::torch::input::Input;
use crate::torch::{Dtype, Stored, by_dtype, scalar, vector};
use std::ffi::CStr;
use tch::{Kind, Tensor};

/// The class, for messages.
pub const CLASS: &str = "ClassBalanceLoss";
const LABEL: &CStr = c"ClassBalanceBackward";
/// Elements that are added or written in the time in which one exponential is computed.
const CHEAP: usize = 4;

/// `ValueError` for a number of classes below 1.
pub fn check_num_classes(num_classes: i64) -> Result<()> {
    if num_classes > 0 {
        return Ok(());
    }
    Err(Error::Value(format!(
        "{CLASS}: num_classes must be above 0, got {num_classes}"
    )))
}

/// The loss of the probabilities `p` (minibatch, `num_classes`), differentiable.
pub fn class_balance(p: &Tensor, num_classes: i64) -> Result<Tensor> {
    let (input, dtype) = checked(p, num_classes)?;
    let out = loss_dtype(&input, dtype);
    let formula = move |t: &[Tensor]| composite(&t[0], out.kind());
    match place(&[&input]) {
        Place::Cuda => {
            let (loss, slope) = cuda::self_ensemble::class_balance(&input, dtype, out)?;
            same_rows(&input, dtype, loss, slope, Box::new(formula))
        }
        Place::Operations => {
            let (loss, slope) = operations(&input, out.kind())?;
            same_rows(&input, dtype, loss, slope, Box::new(formula))
        }
        Place::Cpu => {
            let (loss, grad) = fused(&input, dtype, out)?;
            attach(LABEL, &loss, &[p], [grad], || Ok(formula))?;
            Ok(loss)
        }
        Place::Composite => composite(p, out.kind()),
    }
}

/// `loss`, attached to its graph where there is a slope.
fn same_rows(
    input: &Input<'_>,
    dtype: Dtype,
    loss: Tensor,
    slope: Option<Tensor>,
    formula: Composite,
) -> Result<Tensor> {
    if let Some(slope) = slope {
        let shape = input.shape().to_vec();
        let same = SameRows {
            slope,
            shape,
            dtype,
        };
        attach_with(LABEL, &loss, &[input.tensor], Box::new(same), formula)?;
    }
    Ok(loss)
}

/// The backward pass without a CPU kernel: the rows of the gradient, which are all equal, are only written there.
struct SameRows {
    /// The gradient with respect to any row, in the dtype that the loss was computed in.
    slope: Tensor,
    shape: Vec<i64>,
    dtype: Dtype,
}

impl Backward for SameRows {
    fn grads(&mut self, incoming: &Tensor, _: bool) -> Result<Vec<Option<Tensor>>> {
        let number = Input::new(CLASS, "grad_output", incoming)?;
        let grad = cuda::self_ensemble::repeat(&self.slope, &number, &self.shape, self.dtype)?;
        if grad.is_some() {
            return Ok(vec![grad]);
        }
        let rows = self.slope.f_expand(&self.shape, false)?.f_mul(incoming)?;
        Ok(vec![Some(
            rows.f_to_kind(self.dtype.kind())?.f_contiguous()?,
        )])
    }

    fn widen(&mut self) -> Result<()> {
        if self.dtype == Dtype::F16 {
            self.dtype = Dtype::F32;
        }
        Ok(())
    }
}

fn checked(p: &Tensor, num_classes: i64) -> Result<(Input<'_>, Dtype)> {
    let input = Input::new(CLASS, "p", p)?;
    check_num_classes(num_classes)?;
    let dtype = input.floating()?;
    let (_, cols) = input.matrix()?;
    if cols as i64 == num_classes {
        return Ok((input, dtype));
    }
    Err(input.wrong(&format!("have shape (minibatch, {num_classes})")))
}

/// What the ranks exchange: the sum of each column of `p`, then its number of rows, float64.
pub fn part(p: &Tensor, num_classes: i64) -> Result<Tensor> {
    let (input, dtype) = checked(p, num_classes)?;
    if !input.on_cpu() {
        let sums = p.f_detach()?.f_sum_dim_intlist(0, false, Kind::Double)?;
        let count = sums
            .f_narrow(0, 0, 1)?
            .f_full_like(input.shape()[0] as f64)?;
        return Ok(Tensor::f_cat(&[sums, count], 0)?);
    }
    by_dtype!(dtype, E => {
        let rows = input.dense_rows::<E>()?;
        let mut sums = column_sums(rows, threads(input.numel() / CHEAP));
        sums.push(rows.rows() as f64);
        vector(&sums, Dtype::F64)
    })
}

/// The loss of the rows of all ranks, differentiable with respect to the rows `p` of this one.
pub fn finish(p: &Tensor, num_classes: i64, all: &Exchanged<'_>) -> Result<Tensor> {
    let (input, dtype) = checked(p, num_classes)?;
    all.check(CLASS, num_classes as usize + 1)?;
    let out = loss_dtype(&input, dtype);
    let (loss, grad) = if input.on_cpu() {
        let mut means = all.values()?;
        let count = means.pop().unwrap_or_default();
        for mean in &mut means {
            *mean /= count;
        }
        by_dtype!(dtype, E => of_means::<E>(&input, &means, count as usize, out)?)
    } else {
        let leaf = leaf(&input)?;
        let inside = out.at_least_f32().kind();
        let sums = leaf
            .f_to_kind(inside)?
            .f_sum_dim_intlist(0, false, inside)?;
        let (others, count) = (
            all.sums.f_narrow(0, 0, num_classes)?,
            all.sums.f_narrow(0, num_classes, 1)?,
        );
        let others = Exchanged {
            sums: &others,
            world_size: all.world_size,
        };
        let mean = others.through(&sums)?.f_div(&count.f_to_kind(inside)?)?;
        let loss = of_mean(&mean)?;
        let grad = gradient(&loss, &leaf)?;
        (loss.f_detach()?.f_to_kind(out.kind())?, grad)
    };
    all.attach(LABEL, CLASS, &loss, p, grad)?;
    Ok(loss)
}

fn fused(input: &Input<'_>, dtype: Dtype, out: Dtype) -> Result<(Tensor, Option<StoredGrad>)> {
    by_dtype!(dtype, E => {
        let rows = input.dense_rows::<E>()?;
        let means = column_means(rows, threads(input.numel() / CHEAP));
        of_means::<E>(input, &means, rows.rows(), out)
    })
}

/// The loss over `count` rows with these means, and its gradient with respect to those of `input`.
fn of_means<E: Element + Stored>(
    input: &Input<'_>,
    means: &[f64],
    count: usize,
    out: Dtype,
) -> Result<(Tensor, Option<StoredGrad>)> {
    if let Some(mean) = means.iter().find(|mean| **mean < 0.0 || **mean > 1.0) {
        return Err(Error::Value(format!(
            "{CLASS}: p must hold probabilities, with column means in [0, 1], got a mean of {mean} \
             in shape {:?}",
            input.shape()
        )));
    }
    let threads = threads(input.numel() / CHEAP);
    let (value, slope) = kernel(means, count, threads);
    let columns = input.rows::<E>().is_some_and(|rows| columns::fit(&rows));
    let mut grad = Room::<E>::laid_out(input, columns)?;
    let mut scale = 1.0;
    if let Some(grad) = grad.slice() {
        scale = stored_scale::<E>(slope.iter().fold(0.0, |bound, g| g.abs().max(bound)));
        let repeat = if columns {
            repeat_row_by_columns
        } else {
            repeat_row
        };
        repeat(&slope, scale, grad, threads);
    }
    Ok((scalar(value, out)?, grad.stored(scale)))
}

/// The same in libtorch operations. Where a mean is outside [0, 1] the loss is NaN: raising would
/// wait for the device. (torch's own `binary_cross_entropy` aborts the device context there, and
/// refuses to run under CUDA autocast.)
fn composite(p: &Tensor, kind: Kind) -> Result<Tensor> {
    Ok(of_mean(&mean(p, kind)?)?.f_to_kind(kind)?)
}

fn mean(p: &Tensor, kind: Kind) -> Result<Tensor> {
    Ok(p.f_mean_dim(0, false, inside(kind))?)
}

/// The loss, and the gradient with respect to any row: NaN where a mean is outside [0, 1].
fn operations(input: &Input<'_>, kind: Kind) -> Result<(Tensor, Option<Tensor>)> {
    let p = input.tensor.f_detach()?;
    let mean = mean(&p, kind)?;
    let (rows, u) = (input.shape()[0] as f64, 1.0 / input.shape()[1] as f64);
    let rest = mean.f_rsub_scalar(1.0)?;
    // The NaN of a number below 0 passes through the clamp.
    let log = |m: &Tensor| m.f_log()?.f_clamp_min(LOG_FLOOR);
    let each = log(&rest)?.f_lerp(&log(&mean)?, u)?;
    let loss = each.f_mean(inside(kind))?.f_neg()?.f_to_kind(kind)?;
    if !input.wants_grad() {
        return Ok((loss, None));
    }
    let spread = rest.f_mul(&mean)?;
    let outside = spread.f_lt(0.0)?;
    let slope = mean
        .f_sub_scalar(u)?
        .f_mul_scalar(u / rows)?
        .f_div(&spread.f_clamp_min(SLOPE_FLOOR)?)?
        .f_masked_fill(&outside, f64::NAN)?;
    Ok((loss, Some(slope)))
}

/// The loss of the mean probabilities.
fn of_mean(mean: &Tensor) -> Result<Tensor> {
    let outside = mean.f_lt(0.0)?.f_logical_or(&mean.f_gt(1.0)?)?;
    let poison = mean
        .f_detach()?
        .f_zeros_like()?
        .f_masked_fill(&outside, f64::NAN)?;
    let m = mean.f_add(&poison)?;

    let held = m.f_detach()?;
    let u = 1.0 / mean.size1()? as f64;
    let cross_entropy = |m: &Tensor, floor: f64| -> Result<Tensor> {
        let ln = m.f_log()?.f_clamp_min(floor)?.f_mul_scalar(-u)?;
        let rest = m.f_neg()?.f_add_scalar(1.0)?;
        Ok(ln.f_add(&rest.f_log()?.f_clamp_min(floor)?.f_mul_scalar(u - 1.0)?)?)
    };
    // Where a clamp is active the gradient is (m - u) / 1e-12, that of a parabola.
    let spread = held.f_neg()?.f_add_scalar(1.0)?.f_mul(&held)?;
    let edge = spread.f_lt(SLOPE_FLOOR)?;
    let parabola = m
        .f_add_scalar(-u)?
        .f_square()?
        .f_mul_scalar(0.5 / SLOPE_FLOOR)?;
    let at_edge =
        cross_entropy(&held, LOG_FLOOR)?.f_add(&parabola.f_sub(&parabola.f_detach()?)?)?;
    let between = cross_entropy(&m.f_masked_fill(&edge, 0.5)?, f64::NEG_INFINITY)?;
    let each = at_edge.f_where_self(&edge, &between)?;
    Ok(each.f_mean(mean.f_kind()?)?)
}
