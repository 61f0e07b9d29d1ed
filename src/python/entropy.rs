use super::{elements, reduction_named, tensor, without_gil};
use crate::ops::entropy::{self as ops, CLASS};
use pyo3::prelude::*;
use pyo3_tch::PyTensor;

/// The entropy of each row of `predictions`, or their mean.
#[pyfunction]
pub fn entropy(
    py: Python<'_>,
    predictions: &Bound<'_, PyAny>,
    reduction: &Bound<'_, PyAny>,
) -> PyResult<PyTensor> {
    let predictions = tensor(CLASS, "predictions", predictions)?;
    let reduction = reduction_named(CLASS, reduction)?;
    without_gil(py, elements(&predictions), move || {
        ops::entropy(&predictions, reduction)
    })
    .map(PyTensor)
}
