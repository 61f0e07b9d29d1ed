//! Fused CUDA kernels: C++ sources that NVRTC compiles for the device at first use, launched on torch's
//! current stream.
//!
//! [`serves`] says which tensors they serve. A method's file has the mirror of its kernel's arguments
//! and the launch; the checks were made in `ops`. Nothing here waits for the device.
//!
//! | file | holds |
//! |---|---|
//! | `common.cuh`, `softmax.cuh` | what the kernels share |
//! | `<stem>.cu`, `<stem>.rs` | a method's kernels, and their launch |
//! | [`device`], [`plan`], [`args`] | torch's stream and memory; the shape of a launch; its arguments |
//! | [`modules`], [`compile`], [`sources`], [`nvrtc`] | compiled code in memory and on disk; NVRTC |
//! | [`driver`], [`emulator`] | what runs a kernel |

mod args;
mod compile;
mod device;
mod driver;
mod emulator;
mod modules;
mod nvrtc;
mod plan;
mod sources;

pub mod cross_entropy;
pub mod dst;
pub mod entropy;
pub mod flexmatch;
pub mod hardest;
pub mod mcc;
pub mod mean_teacher;
pub mod pi_model;
pub mod pseudo_label;
pub mod scale;
pub mod self_ensemble;
pub mod self_tuning;
pub mod triplet;
pub mod triplet_gradient;
pub mod uda;

pub use compile::compile;
pub use device::Stream;
pub use sources::{SOURCES, Source};

use crate::error::Error;
use crate::kernels::element::{self, Element};
use crate::kernels::real::Real;
use crate::torch::facts::Facts;
use crate::torch::{Dtype, by_dtype};
use emulator::Emulator;
use std::ops::Deref;
use std::sync::OnceLock;

/// Whether `TLLIB_RS_CUDA=1` asks for these kernels.
pub fn enabled() -> bool {
    static ENABLED: OnceLock<bool> = OnceLock::new();
    *ENABLED.get_or_init(|| std::env::var_os("TLLIB_RS_CUDA").is_some_and(|value| value == "1"))
}

/// Whether CPU tensors are treated as CUDA tensors: the tests run the kernels on the CPU.
pub fn emulated() -> bool {
    enabled() && matches!(Emulator::loaded(), Ok(Some(_)) | Err(_))
}

/// Maximum number of columns: kernels increment an `int` column index by the threads of a block.
const MOST_COLUMNS: i64 = 1 << 30;

/// Whether a kernel serves tensors with these facts: ordinary CUDA tensors of a dtype that has kernels.
/// `false` sends the call to libtorch's operations.
pub fn serves<F: Deref<Target = Facts>>(inputs: &[&F]) -> bool {
    let has_kernels = |facts: &&F| {
        let columns = facts.shape().last().copied().unwrap_or(1);
        args::kernel_dtype(facts).is_some() && reaches(facts) && columns <= MOST_COLUMNS
    };
    inputs.iter().all(has_kernels)
}

/// Whether a kernel can read a tensor with these facts, if it knows the dtype: an ordinary one of a CUDA
/// device.
pub fn reaches(facts: &Facts) -> bool {
    enabled() && (facts.on_cuda() || facts.on_cpu() && emulated())
}

/// [`element::stored_scale`] of a dtype.
fn stored_scale(dtype: Dtype, bound: f64) -> f64 {
    by_dtype!(dtype, E => element::stored_scale::<E>(bound))
}

/// What differences of logits are multiplied by; not 0, which would make infinite ones NaN.
fn inverse(temperature: f64) -> f32 {
    ((1.0 / temperature) as f32).max(f32::MIN_POSITIVE)
}

/// `value` as a tensor of this dtype holds it.
fn rounded(dtype: Dtype, value: f64) -> f32 {
    by_dtype!(dtype, E => element::round_to::<E>(<E as Element>::Acc::of(value)).to_f64() as f32)
}

fn failed(why: &str) -> Error {
    Error::Cuda(why.to_owned())
}
