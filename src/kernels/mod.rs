//! The mathematics, on slices. No torch, no Python: `cargo test --no-default-features` runs it all.
//!
//! The foundation: [`isa`] picks an instruction set at run time, [`real`] has the arithmetic and
//! the vectorizable `exp` and `ln`, [`element`] the storage types, [`rows`] strided matrices,
//! [`reduce`] the sweeps over one row, [`lanes`] those over narrow rows side by side, [`quad`] the transposition
//! of rows, [`columns`] the sweeps over contiguous columns, [`softmax`] a row of probabilities, [`product`] matrix
//! products, [`parallel`] the threads. Every other module is a method.

pub mod columns;
pub mod element;
pub mod isa;
pub mod lanes;
pub mod mirror;
pub mod parallel;
pub mod product;
pub mod quad;
pub mod real;
pub mod reduce;
pub mod rows;
pub mod scale;
pub mod softmax;

pub mod cc_loss;
pub mod dst;
pub mod entropy;
pub mod flexmatch;
pub mod mcc;
pub mod mean_teacher;
pub mod pi_model;
pub mod pseudo_label;
pub mod reid_loss;
pub mod self_ensemble;
pub mod self_tuning;
pub mod uda;

/// A scalar loss, and how its gradient is stored.
#[derive(Clone, Copy, Debug)]
pub struct Loss {
    /// The loss.
    pub value: f64,
    /// The stored gradient is the gradient times this: a power of two for float16, times the divisor
    /// of a mean whose rows are only counted in the sweep itself.
    pub scale: f64,
}
