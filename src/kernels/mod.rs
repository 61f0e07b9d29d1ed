//! The mathematics, on slices. No torch, no Python: `cargo test --no-default-features` runs it all.
//!
//! The foundation: [`isa`] picks an instruction set at run time, [`real`] has the arithmetic and
//! the vectorisable `exp` and `ln`, [`element`] the storage types, [`rows`] strided matrices,
//! [`reduce`] the sweeps over one row, [`parallel`] the threads. Every other module is a method.

pub mod element;
pub mod isa;
pub mod parallel;
pub mod real;
pub mod reduce;
pub mod rows;
pub mod scale;

pub mod entropy;
pub mod flexmatch;
pub mod mcc;
pub mod mean_teacher;
pub mod pseudo_label;
pub mod reid_loss;

/// A scalar loss, and how its gradient is stored.
#[derive(Clone, Copy, Debug)]
pub struct Loss {
    /// The loss.
    pub value: f64,
    /// The stored gradient is the gradient times this power of two (1 except for float16).
    pub scale: f64,
}
