use super::{MANY, tensor, without_gil};
use crate::torch::autograd;
use pyo3::prelude::*;
use pyo3_tch::PyTensor;

/// The gradients of a loss with respect to the first `count` inputs of its node, float16 ones as float32; its graph
/// is released. `None` for a loss whose node is not ours.
#[pyfunction]
pub fn gradients(
    py: Python<'_>,
    loss: &Bound<'_, PyAny>,
    count: usize,
) -> PyResult<Option<Vec<Option<PyTensor>>>> {
    let loss = tensor("gradients", "loss", loss)?;
    // Whatever the size: a pass that holds the node's lock may wait for the GIL.
    let grads = without_gil(py, MANY, move || autograd::gradients(&loss, count))?;
    Ok(grads.map(|grads| grads.into_iter().map(|grad| grad.map(PyTensor)).collect()))
}
