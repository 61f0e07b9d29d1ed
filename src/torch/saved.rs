//! A tensor that a backward pass needs as forward saw it, but that others can modify.

use super::version;
use crate::error::{Error, Result};
use tch::Tensor;

/// A saved tensor like those of torch's own operations: not copied, and an error if it was modified since.
pub struct Saved {
    tensor: Tensor,
    version: i64,
    /// For the message.
    name: &'static str,
}

// SAFETY: at::Tensor's reference count is atomic, and nothing writes the metadata of a tensor that only the
// backward pass holds.
unsafe impl Sync for Saved {}

impl Saved {
    /// Detaches `tensor`, so that memory and version counter are shared with the user's, but not the graph. An
    /// inference tensor, which has no version counter and no place in a graph, is copied.
    pub fn of(tensor: &Tensor, name: &'static str) -> Result<Self> {
        let tensor = if tensor.f_is_inference()? {
            tensor.f_detach_copy()?
        } else {
            tensor.f_detach()?
        };
        Ok(Self {
            version: version(&tensor),
            tensor,
            name,
        })
    }

    /// As it was, or an error.
    pub fn get(&self) -> Result<&Tensor> {
        if version(&self.tensor) == self.version {
            return Ok(&self.tensor);
        }
        Err(Error::Bridge(format!(
            "one of the variables needed for gradient computation has been modified by an inplace \
             operation: {}",
            self.name
        )))
    }
}
