//! L2 consistency on tensors. The mathematics is in [`crate::kernels::pi_model`].

use super::{Place, Reduction, inside, place, room_for, stored, threads, widened_on_devices};
use crate::cuda;
use crate::cuda::pi_model::Weights;
use crate::error::Result;
use crate::kernels::columns;
use crate::kernels::element::{Element, stored_scale};
use crate::kernels::pi_model::{Outputs, pi_model as kernel, pi_model_by_columns};
use crate::kernels::reduce::sum;
use crate::torch::autograd::{Backward, Room, StoredGrad, attach, attach_with, scaled};
use crate::torch::facts::Facts;
use crate::torch::input::Input;
use crate::torch::{Dtype, by_dtype, scalar, vector};
use std::ffi::CStr;
use tch::{Kind, Tensor};

/// The class, for messages.
pub const CLASS: &str = "L2ConsistencyLoss";
const LABEL: &CStr = c"L2ConsistencyBackward";

/// What the losses of the rows are multiplied by.
pub enum Mask {
    /// One number for all.
    Number(f64),
    /// A tensor that broadcasts to the rows.
    Tensor(Tensor),
}

/// The arguments, checked.
struct Call<'a> {
    p1: Input<'a>,
    p2: Input<'a>,
    /// The mask, if it is a tensor.
    mask: Option<Input<'a>>,
    /// The mask, if it is a number, else 1.
    number: f64,
    reduction: Reduction,
    /// The dtype of the loss in tllib's formula.
    out: Dtype,
}

/// The squared distance between the rows of `p1` and `p2`, (minibatch, C, ...), over dimension 1, times
/// `mask`, reduced. Differentiable with respect to all three.
pub fn pi_model(p1: &Tensor, p2: &Tensor, mask: &Mask, reduction: Reduction) -> Result<Tensor> {
    let call = Call::new(p1, p2, mask, reduction)?;
    let dtype = call.p1.floating()?;
    let (loss, mut grads) = match call.place() {
        Place::Cuda => call.launched(dtype)?,
        Place::Cpu => {
            let (loss, grads) = call.fused(dtype)?;
            if call.opposite() {
                let (grad, wanted) = (grads.into_iter().next().flatten(), [true, true]);
                call.attach_opposite(&loss, Opposite { grad, wanted })?;
                return Ok(loss);
            }
            (loss, grads)
        }
        Place::Operations => return call.operations(),
        Place::Composite => {
            let mask = call.mask.as_ref().map(|m| m.tensor);
            return composite(p1, p2, mask, call.number, reduction, call.out.kind());
        }
    };
    let inputs = call.inputs();
    grads.truncate(inputs.len());
    attach(LABEL, &loss, &inputs, grads, || Ok(call.formula()))?;
    Ok(loss)
}

/// The shape of the losses before they are reduced: all dimensions but 1.
fn row_shape(p1: &Input<'_>) -> Vec<i64> {
    let (batch, rest) = p1.shape().split_at(1);
    [batch, &rest[1..]].concat()
}

impl<'a> Call<'a> {
    fn new(p1: &'a Tensor, p2: &'a Tensor, mask: &'a Mask, reduction: Reduction) -> Result<Self> {
        let (p1, p2) = (Input::new(CLASS, "p1", p1)?, Input::new(CLASS, "p2", p2)?);
        let mut out = p1.floating()?.promote(p2.floating()?);
        if p1.shape().len() < 2 {
            return Err(p1.wrong("have shape (minibatch, C, ...)"));
        }
        p2.like(&p1)?;
        let (number, mask) = match mask {
            Mask::Number(number) => (*number, None),
            Mask::Tensor(tensor) => (1.0, Some(Input::new(CLASS, "mask", tensor)?)),
        };
        if let Some(mask) = &mask {
            mask.real()?;
            mask.broadcasts_to(&row_shape(&p1))?;
            // A zero-dimensional tensor is a number to torch: it may be on the CPU whatever the device of the
            // others, and does not affect the dtype.
            let number = mask.shape().is_empty();
            if !number || !mask.is_cpu() {
                mask.same_device(&p1)?;
            }
            if !number {
                out = mask.dtype().map_or(out, |m| out.promote(m));
            }
        }
        // Autocast widens the square.
        out = widened_on_devices(&p1, out);
        Ok(Self {
            p1,
            p2,
            mask,
            number,
            reduction,
            out,
        })
    }

    /// The inputs of the node.
    fn inputs(&self) -> Vec<&'a Tensor> {
        let mut inputs = vec![self.p1.tensor, self.p2.tensor];
        inputs.extend(self.mask.as_ref().map(|m| m.tensor));
        inputs
    }

    /// The loss as a function of them.
    fn formula(&self) -> impl Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + use<> {
        let (number, reduction, kind) = (self.number, self.reduction, self.out.kind());
        move |t: &[Tensor]| composite(&t[0], &t[1], t.get(2), number, reduction, kind)
    }

    /// What computes it.
    fn place(&self) -> Place {
        let mask = |takes: &dyn Fn(&Input<'_>) -> bool| self.mask.as_ref().is_none_or(takes);
        let fits = |reached: fn(&Facts) -> bool| {
            mask(&|m| reached(m) && (!m.wants_grad() || m.shape() == &self.p1.shape()[..1]))
        };
        match place(&[&self.p1, &self.p2]) {
            Place::Cuda if fits(cuda::reaches) && self.out != Dtype::F64 => Place::Cuda,
            Place::Cpu if fits(Facts::on_cpu) => Place::Cpu,
            Place::Composite => Place::Composite,
            _ if mask(&|m| m.plain() && !m.wants_grad()) => Place::Operations,
            _ => Place::Composite,
        }
    }

    /// What the sum of the rows is multiplied by.
    fn mean(&self) -> f64 {
        match self.reduction {
            Reduction::Mean => 1.0 / row_shape(&self.p1).iter().product::<i64>() as f64,
            _ => 1.0,
        }
    }

    /// The scale of the stored gradients if no element of the mask is above `largest`.
    fn scale<E: Element>(&self, largest: f64) -> f64 {
        // Allows for differences of up to 128 before the scaled gradient leaves the headroom of float16, and
        // four times as much before it overflows. Only a mean makes gradients small.
        if self.reduction == Reduction::Mean {
            stored_scale::<E>(256.0 * self.mean() * largest.abs())
        } else {
            1.0
        }
    }

    /// [`Self::fused`] on a device.
    fn launched(&self, dtype: Dtype) -> Result<(Tensor, Vec<Option<StoredGrad>>)> {
        // Integers and booleans have no kernels; nor has float64, which occurs here only as a single number.
        let converted = match &self.mask {
            Some(mask) if !cuda::serves(&[mask]) => {
                Some(mask.tensor.f_detach()?.f_to_kind(Kind::Float)?)
            }
            _ => None,
        };
        let converted = converted
            .as_ref()
            .map(|mask| Input::new(CLASS, "mask", mask))
            .transpose()?;
        let weights = Weights {
            mask: converted.as_ref().or(self.mask.as_ref()),
            number: self.number,
            each: self.reduction == Reduction::None,
            mean: self.mean(),
            // The values on the device are not known here: with masks up to 1 float16 has headroom for them, and with
            // masks up to 512 gradients of probabilities do not overflow.
            scale: by_dtype!(dtype, E => self.scale::<E>(self.number)),
        };
        cuda::pi_model::pi_model(&self.p1, &self.p2, &weights, dtype, self.out)
    }

    /// The loss in libtorch operations, attached to its graph, for a mask that is not differentiated.
    fn operations(&self) -> Result<Tensor> {
        let difference = difference(&self.p1.tensor.f_detach()?, &self.p2.tensor.f_detach()?)?;
        let mask = self
            .mask
            .as_ref()
            .map(|m| m.tensor.f_detach())
            .transpose()?;
        let (number, reduction, kind) = (self.number, self.reduction, self.out.kind());
        let loss = of_difference(&difference, mask.as_ref(), number, reduction, kind)?;
        let wanted = [self.p1.wants_grad(), self.p2.wants_grad()];
        if wanted == [false, false] {
            return Ok(loss);
        }
        let weight = 2.0 * self.mean() * number;
        let grad = match &mask {
            None => difference.f_mul_scalar(weight)?,
            Some(mask) => difference.f_mul(&self.weights(mask, difference.f_kind()?, weight)?)?,
        };
        let backward = Opposite {
            grad: Some(stored(&grad)?),
            wanted,
        };
        self.attach_opposite(&loss, backward)?;
        Ok(loss)
    }

    fn attach_opposite(&self, loss: &Tensor, backward: Opposite) -> Result<()> {
        let (backward, formula) = (Box::new(backward), Box::new(self.formula()));
        attach_with(LABEL, loss, &self.inputs(), backward, formula)
    }

    /// Whether the kernel on the CPU writes the gradient for `p1` alone, where both are wanted: what a loss of each row
    /// comes back with is hardly ever 1, and one gradient is multiplied in half the time.
    fn opposite(&self) -> bool {
        let of_mask = self.mask.as_ref().is_some_and(|mask| mask.wants_grad());
        let both = self.p1.wants_grad() && self.p2.wants_grad();
        self.reduction == Reduction::None && both && !of_mask
    }

    /// `weight` times the mask, in `kind`, in a shape that broadcasts to the predictions.
    fn weights(&self, mask: &Tensor, kind: Kind, weight: f64) -> Result<Tensor> {
        let weights = mask.f_to_kind(kind)?.f_mul_scalar(weight)?;
        // A zero-dimensional mask may be on the CPU, and then has to stay a number.
        if weights.dim() == 0 {
            return Ok(weights);
        }
        Ok(weights
            .f_expand(row_shape(&self.p1), false)?
            .f_unsqueeze(1)?)
    }

    /// The loss, and the gradients for `p1`, `p2` and the mask.
    fn fused(&self, dtype: Dtype) -> Result<(Tensor, Vec<Option<StoredGrad>>)> {
        let rows = self.p1.shape()[0] as usize;
        let weights = self
            .mask
            .as_ref()
            .map(|m| weights(m.tensor, rows))
            .transpose()?;
        room_for::<f64>(rows)?;
        let mut distances = vec![0.0; rows];
        let mean = self.mean();
        let mut grads = self.sweep(dtype, weights.as_deref(), &mut distances)?;
        grads.push(match &self.mask {
            Some(mask) if mask.wants_grad() => Some(mask_grad(&distances, mean, mask.floating()?)?),
            _ => None,
        });
        for (i, d) in distances.iter_mut().enumerate() {
            *d *= weights.as_ref().map_or(self.number, |w| w[i]);
        }
        let loss = match self.reduction {
            Reduction::None => vector(&distances, self.out)?,
            Reduction::Sum => scalar(sum(&distances), self.out)?,
            Reduction::Mean => scalar(sum(&distances) / rows as f64, self.out)?,
        };
        Ok((loss, grads))
    }

    /// Runs the kernel: the distances, and the gradients for `p1` and `p2`.
    fn sweep(
        &self,
        dtype: Dtype,
        weights: Option<&[f64]>,
        distances: &mut [f64],
    ) -> Result<Vec<Option<StoredGrad>>> {
        by_dtype!(dtype, E => {
            let a = self.p1.dense_rows::<E>()?;
            let b = self.p2.dense_rows::<E>()?;
            let columns = columns::fit(&a) && columns::fit(&b);
            let room = |input: &Input<'_>| Room::<E>::laid_out(input, columns);
            let mut grad_a = room(&self.p1)?;
            let mut grad_b = if self.opposite() { Room::left_out() } else { room(&self.p2)? };
            let mut run = |scale: f64, distances: &mut [f64]| {
                let out = Outputs {
                    distances,
                    grad_a: grad_a.slice(),
                    grad_b: grad_b.slice(),
                };
                let kernel = if columns { pi_model_by_columns } else { kernel };
                kernel(a, b, weights, scale * self.mean() * self.number, out, threads(self.p1.numel()));
            };
            let largest = weights.map_or(self.number, |w| w.iter().fold(0.0, |a: f64, w| a.max(w.abs())));
            let mut scale = self.scale::<E>(largest);
            run(scale, distances);
            if let Some(headroom) = E::HEADROOM {
                let bound = self.bound(weights, distances);
                // The gradient of larger differences might overflow at this scale.
                if bound * scale > 2.0 * headroom {
                    scale = scale.min(stored_scale::<E>(bound));
                    run(scale, distances);
                }
            }
            Ok(vec![grad_a.stored(scale), grad_b.stored(scale)])
        })
    }

    /// No element of the gradients for `p1` and `p2` is above this.
    fn bound(&self, weights: Option<&[f64]>, distances: &[f64]) -> f64 {
        let weight = |i: usize| weights.map_or(self.number, |w| w[i]).abs();
        let rows = distances.iter().enumerate();
        let largest = rows.fold(0.0, |most: f64, (i, d)| most.max(d.sqrt() * weight(i)));
        2.0 * self.mean() * largest
    }
}

/// The gradient with respect to the first prediction; that with respect to the second is its negative.
struct Opposite {
    grad: Option<StoredGrad>,
    wanted: [bool; 2],
}

impl Backward for Opposite {
    fn grads(&mut self, incoming: &Tensor, last: bool) -> Result<Vec<Option<Tensor>>> {
        let incoming = Input::new(CLASS, "grad_output", incoming)?;
        let Some(grad) = scaled(&mut self.grad, &incoming, last)? else {
            return Ok(Vec::new());
        };
        let other = self.wanted[1].then(|| grad.f_neg()).transpose()?;
        Ok(vec![self.wanted[0].then_some(grad), other])
    }

    fn widen(&mut self) -> Result<()> {
        self.grad.as_mut().map_or(Ok(()), StoredGrad::widen)
    }
}

/// The mask as one f64 a row.
fn weights(mask: &Tensor, rows: usize) -> Result<Vec<f64>> {
    let rows = mask
        .f_detach()?
        .f_to_kind(Kind::Double)?
        .f_expand([rows as i64], false)?;
    Ok(Vec::try_from(&rows)?)
}

/// The gradient with respect to a mask of one number a row.
fn mask_grad(distances: &[f64], mean: f64, dtype: Dtype) -> Result<StoredGrad> {
    let largest = distances.iter().fold(0.0, |a: f64, d| a.max(*d));
    let scale = by_dtype!(dtype, E => stored_scale::<E>(largest * mean));
    let scaled: Vec<_> = distances.iter().map(|d| d * mean * scale).collect();
    Ok(StoredGrad::new(vector(&scaled, dtype)?, scale))
}

/// The same in libtorch operations.
fn composite(
    p1: &Tensor,
    p2: &Tensor,
    mask: Option<&Tensor>,
    number: f64,
    reduction: Reduction,
    kind: Kind,
) -> Result<Tensor> {
    of_difference(&difference(p1, p2)?, mask, number, reduction, kind)
}

fn difference(p1: &Tensor, p2: &Tensor) -> Result<Tensor> {
    // The subtraction promotes the other.
    Ok(p1.f_to_kind(inside(p1.f_kind()?))?.f_sub(p2)?)
}

fn of_difference(
    difference: &Tensor,
    mask: Option<&Tensor>,
    number: f64,
    reduction: Reduction,
    kind: Kind,
) -> Result<Tensor> {
    let distance = difference
        .f_square()?
        .f_sum_dim_intlist(1, false, None::<Kind>)?;
    let each = match mask {
        Some(mask) => distance.f_mul(mask)?,
        #[allow(clippy::float_cmp, reason = "exactly one changes nothing")]
        None if number == 1.0 => distance,
        None => distance.f_mul_scalar(number)?,
    };
    let loss = match reduction {
        Reduction::None => each,
        Reduction::Mean => each.f_mean(None::<Kind>)?,
        Reduction::Sum => each.f_sum(None::<Kind>)?,
    };
    Ok(loss.f_to_kind(kind)?)
}
