use super::{elements, tensor, without_gil};
use crate::ops::entropy as ops;
use pyo3::prelude::*;
use pyo3_tch::PyTensor;

/// The entropy of each row of `predictions`, or their mean.
#[pyfunction]
pub fn entropy(
    py: Python<'_>,
    predictions: &Bound<'_, PyAny>,
    reduction: &str,
) -> PyResult<PyTensor> {
    let predictions = tensor("entropy", "predictions", predictions)?;
    let mean = ops::parse_reduction(reduction)?;
    without_gil(py, elements(&predictions), move || {
        ops::entropy(&predictions, mean)
    })
    .map(PyTensor)
}
