use super::{tensor, without_gil};
use crate::torch::autograd;
use pyo3::prelude::*;
use pyo3_tch::PyTensor;

/// The gradients of a loss with respect to the first `count` inputs of its node, float32 where they are float16,
/// and the end of its graph. `None` for a loss that another node made.
#[pyfunction]
pub fn gradients(
    py: Python<'_>,
    loss: &Bound<'_, PyAny>,
    count: usize,
) -> PyResult<Option<Vec<Option<PyTensor>>>> {
    let loss = tensor("gradients", "loss", loss)?;
    // Whatever the size: a pass that holds the node's lock may wait for the GIL.
    let grads = without_gil(py, usize::MAX, move || autograd::gradients(&loss, count))?;
    Ok(grads.map(|grads| grads.into_iter().map(|grad| grad.map(PyTensor)).collect()))
}
