//! The methods on tensors: checks first, then the CPU kernel, the CUDA kernel or the libtorch composite.
//!
//! A fused loss is four things: checks, a kernel call that yields loss and gradient, an autograd
//! node over both ([`crate::torch::autograd::attach`]), and a composite in libtorch operations for
//! everything else: other devices, `torch.func`, second derivatives.

pub mod cc_loss;
pub mod dst;
pub mod entropy;
pub mod flexmatch;
pub mod mcc;
pub mod mean_teacher;
pub mod pi_model;
pub mod pseudo_label;
pub mod ranks;
pub mod reid_loss;
pub mod self_ensemble;
pub mod self_tuning;
pub mod uda;

use crate::cuda;
use crate::error::{Error, Result};
use crate::kernels::parallel::threads_for;
use crate::torch::input::Input;
use crate::torch::{Dtype, max_threads};
use std::num::NonZeroUsize;

/// Elements of exponential and logarithm that one thread computes in the time that makes another
/// thread worth starting.
const GRAIN: usize = 1 << 14;

/// What computes a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// [`crate::kernels`]
    Cpu,
    /// [`crate::cuda`]
    Cuda,
    /// libtorch operations, for everything else.
    Composite,
}

/// The place of a call whose kernels read these tensors: one device, one dtype, no wrappers.
fn place(inputs: &[&Input<'_>]) -> Place {
    let same = inputs
        .windows(2)
        .all(|two| two[0].dtype() == two[1].dtype());
    if same && cuda::serves(inputs) {
        Place::Cuda
    } else if same && inputs.iter().all(|input| input.on_cpu()) {
        Place::Cpu
    } else {
        Place::Composite
    }
}

/// Threads for a row loss over `elements` logits.
fn threads(elements: usize) -> NonZeroUsize {
    threads_for(elements, GRAIN, max_threads())
}

/// The dtype of a loss that has the dtype of its inputs in tllib's formula, or float32 where autocast
/// runs its sums.
fn loss_dtype(input: &Input<'_>, dtype: Dtype) -> Dtype {
    if input.autocast() {
        dtype.at_least_f32()
    } else {
        dtype
    }
}

/// `ValueError` unless `value` is a finite number above 0.
pub fn positive(class: &str, name: &str, value: f64) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(Error::Value(format!(
        "{class}: {name} must be a finite number above 0, got {value}"
    )))
}
