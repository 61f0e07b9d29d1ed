//! The methods on tensors: checks first, then the CPU kernel, the CUDA kernel or libtorch's operations.
//!
//! A fused loss has four parts: checks, a call that yields loss and gradient, an autograd node over both
//! ([`crate::torch::autograd::attach`]), and a composite in libtorch operations for everything else: other
//! devices, `torch.func`, second derivatives. The call is to a kernel or, if none serves the tensors and they are
//! not wrapped, to libtorch operations that compute the gradient in closed form: fewer than autograd would run.

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
use crate::torch::autograd::StoredGrad;
use crate::torch::facts::Facts;
use crate::torch::input::Input;
use crate::torch::{Dtype, beside, composites_only, max_threads};
use std::num::NonZeroUsize;
use tch::{Device, Kind, Tensor};

/// Elements of exponential and logarithm that one thread computes in the time that makes another
/// thread worth starting.
const GRAIN: usize = 1 << 14;

/// How the numbers of the rows are reduced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// They are returned.
    None,
    /// Their mean, over all rows whatever the mask.
    Mean,
    /// Their sum.
    Sum,
}

impl Reduction {
    /// By its name. tllib treats any other name as `'none'`; here it is an error.
    pub fn parse(class: &str, name: Option<&str>) -> Result<Self> {
        match name {
            None | Some("none") => Ok(Self::None),
            Some("mean") => Ok(Self::Mean),
            Some("sum") => Ok(Self::Sum),
            Some(other) => Err(Error::Value(format!(
                "{class}: reduction must be 'none', 'mean' or 'sum', got {other:?}"
            ))),
        }
    }
}

/// What computes a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// [`crate::kernels`]
    Cpu,
    /// [`crate::cuda`]
    Cuda,
    /// libtorch operations for loss and gradient.
    Operations,
    /// libtorch operations that autograd differentiates, for everything else.
    Composite,
}

/// Where a call on these tensors is computed. Kernels take matrices with columns, on one device and of one dtype,
/// without wrappers.
fn place(inputs: &[&Input<'_>]) -> Place {
    let matrix = |input: &&Input<'_>| matches!(input.shape(), &[_, cols] if cols > 0);
    let kernels = inputs.iter().all(matrix)
        && inputs
            .windows(2)
            .all(|two| two[0].dtype() == two[1].dtype());
    if kernels && cuda::serves(inputs) {
        Place::Cuda
    } else if kernels && inputs.iter().all(|input| input.on_cpu()) {
        Place::Cpu
    } else if inputs.iter().all(|input| input.plain()) {
        Place::Operations
    } else {
        Place::Composite
    }
}

/// Whether the values are in host memory, so that checks read them, without waiting and without an operation that a
/// mode or transform would intercept, even if no kernel may. What no kernel may read is not there while libtorch's
/// operations or an emulator stand in for a device.
fn in_host_memory(facts: &Facts) -> bool {
    let stand_in = || composites_only() || cuda::emulated();
    let here = || facts.is_cpu() && facts.readable() && facts.contiguous();
    facts.on_cpu() || here() && !stand_in()
}

/// The dtype in which operations compute a result of `kind`.
fn inside(kind: Kind) -> Kind {
    if kind == Kind::Double {
        kind
    } else {
        Kind::Float
    }
}

/// The gradient of the sum of `-weight_i log_p_i,label(i)` over the rows with respect to the logits; all in one
/// dtype.
fn nll_gradient(log_p: &Tensor, labels: &Tensor, weight: &Tensor) -> Result<StoredGrad> {
    let kind = log_p.f_kind()?;
    // Only read if the reduction is a mean.
    let total = weight.f_new_empty([1], (kind, weight.device()))?;
    let (each, kept) = (None::<Tensor>, tch::Reduction::None);
    let of_log = if log_p.dim() == 2 {
        log_p.f_nll_loss_backward(weight, labels, each, kept, -100, &total)?
    } else {
        // As in libtorch, any other number of dimensions is reshaped to images of one line.
        let shape = log_p.size();
        let (rows, cols, line) = (shape[0], shape[1], shape[2..].iter().product());
        let image = [rows, 1, line];
        log_p
            .f_reshape([rows, cols, 1, line])?
            .f_nll_loss2d_backward(
                &weight.f_reshape(image)?,
                &labels.f_reshape(image)?,
                each,
                kept,
                -100,
                &total,
            )?
            .f_reshape(&shape)?
    };
    stored(&Tensor::f_internal_log_softmax_backward_data(
        &of_log, log_p, 1, kind,
    )?)
}

/// 0, 1, ... below `end`, int64, on the device of `like`.
fn counting(end: i64, like: &Tensor) -> Result<Tensor> {
    match like.device() {
        // Created where it is needed, rather than copied from the host.
        known @ Device::Cuda(_) => Ok(Tensor::f_arange(end, (Kind::Int64, known))?),
        _ => beside(
            &Tensor::f_arange(end, (Kind::Int64, Device::Cpu))?,
            Kind::Int64,
            like,
        ),
    }
}

/// A gradient that libtorch operations computed, in the dtype they computed in. Autograd converts what a node
/// returns to the dtype of its input.
fn stored(grad: &Tensor) -> Result<StoredGrad> {
    Ok(StoredGrad::new(grad.f_contiguous()?, 1.0))
}

/// Threads for a row loss over `elements` logits.
fn threads(elements: usize) -> NonZeroUsize {
    threads_for(elements, GRAIN, max_threads())
}

/// An error if a kernel's scratch space of `count` numbers cannot be had: a vector that cannot be allocated ends the
/// process.
fn room_for<T>(count: usize) -> Result<()> {
    Vec::<T>::new()
        .try_reserve_exact(count)
        .map_err(|_| Error::Memory(count.saturating_mul(size_of::<T>())))
}

/// The dtype of a loss that has the dtype of its inputs in tllib's formula; at least float32 under autocast,
/// which runs its sums in float32.
fn loss_dtype(input: &Input<'_>, dtype: Dtype) -> Dtype {
    if input.autocast() {
        dtype.at_least_f32()
    } else {
        dtype
    }
}

/// The dtype of an operation, such as a softmax, that autocast runs in float32 on devices but leaves alone on the CPU.
fn widened_on_devices(input: &Input<'_>, dtype: Dtype) -> Dtype {
    if input.is_cpu() {
        dtype
    } else {
        loss_dtype(input, dtype)
    }
}

/// `ValueError` for NaN.
fn not_nan(class: &str, name: &str, value: f64) -> Result<()> {
    if !value.is_nan() {
        return Ok(());
    }
    Err(Error::Value(format!(
        "{class}: {name} must be a number, got {value}"
    )))
}

/// `ValueError` unless `value` is finite.
fn finite(class: &str, name: &str, value: f64) -> Result<()> {
    if value.is_finite() {
        return Ok(());
    }
    Err(Error::Value(format!(
        "{class}: {name} must be a finite number, got {value}"
    )))
}

/// `ValueError` unless `value` is in [0, 1].
fn fraction(class: &str, name: &str, value: f64) -> Result<()> {
    if (0.0..=1.0).contains(&value) {
        return Ok(());
    }
    Err(Error::Value(format!(
        "{class}: {name} must be in [0, 1], got {value}"
    )))
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
