//! The three arguments of a step.

use super::{CLASS, host};
use crate::error::Result;
use crate::torch::input::Input;
use tch::Tensor;

/// Indices, mask and labels with valid dtypes, shapes and devices.
pub struct Batch<'a> {
    idxes: Input<'a>,
    mask: Input<'a>,
    labels: Input<'a>,
}

impl<'a> Batch<'a> {
    /// Runs all checks that read no values.
    pub fn new(
        idxes: &'a Tensor,
        mask: &'a Tensor,
        labels: &'a Tensor,
        net_outputs: &Tensor,
    ) -> Result<Self> {
        let index = Input::new(CLASS, "idxes", idxes)?;
        let selected = Input::new(CLASS, "selected_mask", mask)?;
        let label = Input::new(CLASS, "pseudo_labels", labels)?;
        index.integer()?;
        label.integer()?;
        selected.real()?;
        index.vector()?;
        for other in [&selected, &label] {
            if other.shape() != index.shape() {
                return Err(other.wrong(&format!("have the shape of idxes, {:?}", index.shape())));
            }
            other.same_device(&index)?;
        }
        index.same_device(&Input::new(CLASS, "net_outputs", net_outputs)?)?;
        Ok(Self {
            idxes: index,
            mask: selected,
            labels: label,
        })
    }

    /// The selected samples' (index, label) pairs.
    pub fn read(&self, samples: usize, classes: usize) -> Result<host::Pairs> {
        host::Pairs::read(&self.idxes, &self.mask, &self.labels, samples, classes)
    }
}
