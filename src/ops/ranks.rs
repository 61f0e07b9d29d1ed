//! Losses over the batches of several ranks.
//!
//! A rank knows its own rows, and of the others only the sums that the loss depends on. All ranks
//! get one loss, that of all rows, and each the gradient with respect to its own rows, times the
//! number of ranks: the gradient of the sum of the losses that the ranks return, which is what
//! `DistributedDataParallel` expects, as it takes the mean over the ranks. Nothing is exchanged in
//! backward.

use crate::error::{Error, Result};
use crate::torch::autograd::{StoredGrad, attach};
use crate::torch::input::Input;
use std::ffi::CStr;
use tch::{Kind, Tensor};

/// The sums of all ranks, as they came back from the exchange.
pub struct Exchanged<'a> {
    /// One dimension, float64, on the device of the batch.
    pub sums: &'a Tensor,
    /// How many ranks took part.
    pub world_size: i64,
}

impl Exchanged<'_> {
    /// `TypeError` or `ValueError` unless there are `count` sums and at least one rank.
    pub fn check(&self, class: &'static str, count: usize) -> Result<()> {
        let input = Input::new(class, "sums", self.sums)?;
        if input.floating()?.kind() != Kind::Double || input.shape() != [count as i64] {
            return Err(input.wrong(&format!("be float64 of shape ({count},)")));
        }
        if self.world_size > 0 {
            return Ok(());
        }
        Err(Error::Value(format!(
            "{class}: world_size must be above 0, got {}",
            self.world_size
        )))
    }

    /// The sums, which must be on the CPU.
    pub fn values(&self) -> Result<Vec<f64>> {
        Ok(Vec::try_from(self.sums.f_contiguous()?)?)
    }

    /// The sums, the same numbers on every rank, with the gradient of `own`, this rank's part of them.
    pub fn through(&self, own: &Tensor) -> Result<Tensor> {
        let nothing = own.f_sub(&own.f_detach()?)?;
        Ok(self.sums.f_to_kind(own.f_kind()?)?.f_add(&nothing)?)
    }

    /// Makes `loss` differentiable with respect to `input`, but only once: the ranks' second derivatives
    /// depend on each other.
    pub fn attach(
        &self,
        label: &'static CStr,
        class: &'static str,
        loss: &Tensor,
        input: &Tensor,
        grad: Option<StoredGrad>,
    ) -> Result<()> {
        let grad = grad.map(|grad| StoredGrad {
            scale: grad.scale / self.world_size as f64,
            ..grad
        });
        attach(label, loss, &[input], [grad], || {
            Ok(move |_: &[Tensor]| {
                Err(Error::Bridge(format!(
                    "{class}: no second derivative (create_graph=True) across ranks"
                )))
            })
        })
    }
}

/// `input` cut off from its graph, as the start of one that [`gradient`] differentiates.
pub fn leaf(input: &Input<'_>) -> Result<Tensor> {
    let leaf = input.tensor.f_detach()?;
    Ok(leaf.f_set_requires_grad(input.wants_grad())?)
}

/// The gradient of `loss` with respect to `leaf`, where it wants one.
pub fn gradient(loss: &Tensor, leaf: &Tensor) -> Result<Option<StoredGrad>> {
    if !leaf.requires_grad() {
        return Ok(None);
    }
    let found = Tensor::f_run_backward(&[loss], &[leaf], false, false)?;
    // A stored gradient is contiguous; autograd's may be one row, expanded.
    let stored = found.first().map(Tensor::f_contiguous).transpose()?;
    Ok(stored.map(|tensor| StoredGrad::new(tensor, 1.0)))
}
