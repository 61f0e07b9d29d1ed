//! The losses of person re-identification on tensors. The mathematics is in
//! [`crate::kernels::reid_loss`].

mod check;
mod composite;
mod cross_entropy;
mod device;
mod distances;
mod mining;
mod operations;
mod triplet;

pub use check::{check_margin, check_triplet};
pub use cross_entropy::{check_smoothing, cross_entropy, label_smooth};
pub use distances::{distances, distances_backward};
pub use mining::hardest;
pub use triplet::{Arguments, Objective, triplet};
