use super::{elements, number, tensor, without_gil};
use crate::ops::pseudo_label::{self as ops, CLASS};
use pyo3::prelude::*;
use pyo3_tch::PyTensor;

/// Loss, mask and pseudo labels of `y` with labels from `y_target`, both (minibatch, C, ...).
#[pyfunction]
pub fn pseudo_label(
    py: Python<'_>,
    y: &Bound<'_, PyAny>,
    y_target: &Bound<'_, PyAny>,
    threshold: &Bound<'_, PyAny>,
) -> PyResult<(PyTensor, PyTensor, PyTensor)> {
    let (y, target) = (tensor(CLASS, "y", y)?, tensor(CLASS, "y_target", y_target)?);
    let threshold = number(CLASS, "threshold", threshold)?;
    let out = without_gil(py, 2 * elements(&y), move || {
        ops::pseudo_label(&y, &target, threshold)
    })?;
    Ok((PyTensor(out.loss), PyTensor(out.mask), PyTensor(out.labels)))
}

/// Raises unless `threshold` is one that the class accepts.
#[pyfunction]
pub fn check_threshold(threshold: &Bound<'_, PyAny>) -> PyResult<()> {
    Ok(ops::check_threshold(number(
        CLASS,
        "threshold",
        threshold,
    )?)?)
}
