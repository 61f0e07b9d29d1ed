use super::{elements, number, tensor, without_gil};
use crate::ops::mcc as ops;
use pyo3::prelude::*;
use pyo3_tch::PyTensor;

const CLASS: &str = "MinimumClassConfusionLoss";

/// The minimum class confusion of `logits` (minibatch, C) at `temperature`.
#[pyfunction]
pub fn mcc(
    py: Python<'_>,
    logits: &Bound<'_, PyAny>,
    temperature: &Bound<'_, PyAny>,
) -> PyResult<PyTensor> {
    let logits = tensor(CLASS, "logits", logits)?;
    let temperature = number(CLASS, "temperature", temperature)?;
    without_gil(py, elements(&logits), move || {
        ops::mcc(&logits, temperature)
    })
    .map(PyTensor)
}

/// Raises unless `temperature` is one that the class accepts.
#[pyfunction]
pub fn check_temperature(temperature: &Bound<'_, PyAny>) -> PyResult<()> {
    Ok(ops::check_temperature(number(
        CLASS,
        "temperature",
        temperature,
    )?)?)
}

/// The class confusion matrix of `logits` (minibatch, C), columns of sum 1.
#[pyfunction]
pub fn confusion_matrix(
    py: Python<'_>,
    logits: &Bound<'_, PyAny>,
    temperature: &Bound<'_, PyAny>,
) -> PyResult<PyTensor> {
    let logits = tensor(CLASS, "logits", logits)?;
    let temperature = number(CLASS, "temperature", temperature)?;
    without_gil(py, elements(&logits), move || {
        ops::confusion_matrix(&logits, temperature)
    })
    .map(PyTensor)
}
