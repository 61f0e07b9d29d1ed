//! `tllib_rs`: the self-training methods of the Transfer Learning Library as fused kernels.
//!
//! The layers, each knowing only those above it in this list:
//!
//! | layer | holds | may not use |
//! |---|---|---|
//! | [`kernels`] | the mathematics on slices: a loss and its gradient in one sweep | torch, Python |
//! | `torch` | what tch lacks: tensor facts, the autograd node, torch's threads | Python |
//! | `cuda` | CUDA sources, compiled at run time, and their launch on torch's stream | Python |
//! | `ops` | a method on tensors: checks, then CPU kernel, CUDA kernel or libtorch's operations | Python |
//! | `python` | `PyO3`: extract, release the GIL, call, wrap; errors mapped in one place | |
//!
//! A method has one stem in all of them: `kernels/mcc.rs`, `ops/mcc.rs`, `python/mcc.rs`,
//! `python/tllib_rs/self_training/mcc.py`, `tests/test_mcc.py`. (Not quite the re-identification losses: `reid_loss` in
//! Rust, `vision/models/reid/loss.py` in Python, sources of their own in `cuda`.)
//! `cargo test --no-default-features` builds and tests the kernels alone. One exception to the order: the autograd
//! node, in `torch`, has gradients on CUDA scaled by `cuda`.

// Tests compare exact values on purpose.
#![cfg_attr(test, allow(clippy::float_cmp))]

pub mod kernels;

#[cfg(feature = "python")]
mod cuda;
#[cfg(feature = "python")]
mod error;
#[cfg(feature = "python")]
mod ops;
#[cfg(feature = "python")]
mod python;
#[cfg(feature = "python")]
mod torch;
