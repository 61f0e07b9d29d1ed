use super::{elements, number, tensor, without_gil};
use crate::ops::uda::{self as ops, CLASS};
use pyo3::prelude::*;
use pyo3_tch::PyTensor;

/// The consistency of `y_strong` with `y`, both (minibatch, C, ...).
#[pyfunction]
pub fn uda(
    py: Python<'_>,
    y_strong: &Bound<'_, PyAny>,
    y: &Bound<'_, PyAny>,
    threshold: &Bound<'_, PyAny>,
    temperature: &Bound<'_, PyAny>,
) -> PyResult<PyTensor> {
    let (strong, y) = (tensor(CLASS, "y_strong", y_strong)?, tensor(CLASS, "y", y)?);
    let threshold = number(CLASS, "threshold", threshold)?;
    let temperature = number(CLASS, "temperature", temperature)?;
    let work = 2 * elements(&strong);
    without_gil(py, work, move || {
        ops::uda(&strong, &y, threshold, temperature)
    })
    .map(PyTensor)
}

/// Raises unless both are ones that the class accepts.
#[pyfunction]
pub fn check_uda(threshold: &Bound<'_, PyAny>, temperature: &Bound<'_, PyAny>) -> PyResult<()> {
    Ok(ops::check_uda(
        number(CLASS, "threshold", threshold)?,
        number(CLASS, "temperature", temperature)?,
    )?)
}
