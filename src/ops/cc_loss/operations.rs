//! Class confusion consistency in libtorch operations. Rows that are not selected are kept, with a weight of 0,
//! because removing them would wait for the device.

use crate::error::Result;
use crate::ops::mcc::{Weighted, confusion};
use crate::ops::stored;
use crate::torch::Without;
use crate::torch::autograd::StoredGrad;
use crate::torch::input::Input;
use tch::{Kind, Tensor};

/// What a call has besides tensors.
#[derive(Clone, Copy)]
pub struct Call {
    pub temperature: f64,
    pub thr: f64,
    /// The dtype of the probabilities that decide what is selected. The autocast region may end before backward runs.
    pub selecting: Kind,
}

/// The selected rows.
struct Selection {
    /// The weak logits' probabilities.
    q: Tensor,
    /// The mask of the rows that are not selected, (minibatch, 1).
    others: Tensor,
    /// The selected rows as a fraction of all, in the dtype in which the loss is computed; 0 for an empty batch.
    fraction: Tensor,
}

impl Selection {
    fn of(weak: &Tensor, call: Call, inside: Kind) -> Result<Self> {
        let z = weak.f_div_scalar(call.temperature)?;
        let q = z.f_softmax(1, call.selecting)?;
        let selected = q.f_amax([1].as_slice(), true)?.f_ge(call.thr)?;
        Ok(Self {
            q,
            others: selected.f_logical_not()?,
            // The divisor of a mean is not baked into a graph that is traced.
            fraction: if selected.numel() == 0 {
                selected.f_to_kind(inside)?.f_sum(inside)?
            } else {
                selected.f_to_kind(inside)?.f_mean(inside)?
            },
        })
    }

    /// The factor of the sum of squares, which is over a matrix of the classes of `logits`.
    fn factor(&self, logits: &Tensor) -> Result<Tensor> {
        Ok(self.fraction.f_div_scalar(logits.size()[1])?)
    }

    fn fraction(&self) -> Result<Tensor> {
        Ok(self.fraction.f_to_kind(Kind::Float)?)
    }
}

fn both(weak: &Tensor, strong: &Tensor) -> Result<Kind> {
    let wide = weak.f_kind()? == Kind::Double || strong.f_kind()? == Kind::Double;
    Ok(if wide { Kind::Double } else { Kind::Float })
}

/// Loss and fraction, in operations that autograd differentiates.
pub fn composite(logits: &Tensor, logits_strong: &Tensor, call: Call) -> Result<(Tensor, Tensor)> {
    let inside = both(logits, logits_strong)?;
    let weak = logits.f_detach()?;
    let chosen = Selection::of(&weak, call, inside)?;
    let matrix = |z: &Tensor| -> Result<Tensor> {
        // Masked before the softmax, so that its gradient has no NaN from the other rows.
        let z = z.f_to_kind(inside)?.f_masked_fill(&chosen.others, 0.0)?;
        let rows = Weighted::of(&z, call.temperature, inside)?;
        Ok(confusion(&rows.p, &rows.wp.f_masked_fill(&chosen.others, 0.0)?)?.0)
    };
    let squares = matrix(&weak)?
        .f_sub(&matrix(logits_strong)?)?
        .f_square()?
        .f_sum(inside)?;
    let loss = squares.f_mul(&chosen.factor(logits)?)?;
    Ok((loss, chosen.fraction()?))
}

/// Loss and fraction, and the gradient in closed form. With `H` the gradient of the loss with respect to the
/// numerators of the strong matrix `C`, it is `(w p) H + w (p H' - r)` with respect to `p`, where `r_c` is the sum
/// of the elementwise product `H C` over column `c`, and then goes through the softmax.
pub fn operations(
    weak: &Input<'_>,
    strong: &Input<'_>,
    call: Call,
) -> Result<((Tensor, Tensor), Option<StoredGrad>)> {
    let _full = Without::autocast();
    let (z, z_strong) = (weak.tensor.f_detach()?, strong.tensor.f_detach()?);
    let inside = both(&z, &z_strong)?;
    let chosen = Selection::of(&z, call, inside)?;
    let probabilities = |z: &Tensor| {
        let z = z.f_to_kind(inside)?.f_div_scalar(call.temperature)?;
        z.f_softmax(1, inside)
    };
    // Rows of zeros contribute nothing, and have no gradient.
    let rows = |p: &Tensor| Weighted::of_probabilities(p.f_masked_fill(&chosen.others, 0.0)?);
    let of_weak = if chosen.q.f_kind()? == inside {
        rows(&chosen.q)?
    } else {
        rows(&probabilities(&z)?)?
    };
    let Weighted { p, weight, wp } = rows(&probabilities(&z_strong)?)?;
    let (target, _) = confusion(&of_weak.p, &of_weak.wp)?;
    let (matrix, present) = confusion(&p, &wp)?;
    let difference = matrix.f_sub(&target)?;
    let factor = chosen.factor(&z)?;
    let loss = difference.f_square()?.f_sum(inside)?.f_mul(&factor)?;
    let outputs = (loss, chosen.fraction()?);
    if !strong.wants_grad() {
        return Ok((outputs, None));
    }
    let h = difference
        .f_div(&present)?
        .f_mul(&factor.f_mul_scalar(2.0 / call.temperature)?)?;
    let r = h.f_mul(&matrix)?.f_sum_dim_intlist(0, false, inside)?;
    let of_wp = p.f_mm(&h.f_tr()?)?.f_sub(&r)?;
    let of_p = of_wp.f_mul(&weight)?.f_add(&wp.f_mm(&h)?)?;
    let grad = Tensor::f_internal_softmax_backward_data(&of_p, &p, 1, inside)?;
    Ok((outputs, Some(stored(&grad)?)))
}
