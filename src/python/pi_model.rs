use super::{elements, reduction_named, tensor, unusable, without_gil};
use crate::ops::pi_model::{self as ops, CLASS, Mask};
use pyo3::prelude::*;
use pyo3::types::PyFloat;
use pyo3_tch::PyTensor;

/// The L2 consistency of `p1` and `p2`, (minibatch, C, ...), times `mask`, reduced.
#[pyfunction]
pub fn pi_model(
    py: Python<'_>,
    p1: &Bound<'_, PyAny>,
    p2: &Bound<'_, PyAny>,
    mask: &Bound<'_, PyAny>,
    reduction: &Bound<'_, PyAny>,
) -> PyResult<PyTensor> {
    let (p1, p2) = (tensor(CLASS, "p1", p1)?, tensor(CLASS, "p2", p2)?);
    // The default is a float: trying to extract a tensor from it would format an error that nobody reads.
    let tensor = if mask.is_instance_of::<PyFloat>() {
        None
    } else {
        mask.extract::<PyTensor>().ok()
    };
    let mask = match tensor {
        Some(tensor) => Mask::Tensor(tensor.0),
        None => Mask::Number(mask.extract().map_err(|error| {
            unusable(CLASS, "mask", "a torch.Tensor or a number", mask, &error)
        })?),
    };
    let reduction = reduction_named(CLASS, reduction)?;
    without_gil(py, 2 * elements(&p1), move || {
        ops::pi_model(&p1, &p2, &mask, reduction)
    })
    .map(PyTensor)
}

/// Raises unless `reduction` is one that the class named `class` accepts.
#[pyfunction]
pub fn check_reduction(class: &str, reduction: &Bound<'_, PyAny>) -> PyResult<()> {
    reduction_named(class, reduction).map(|_| ())
}
