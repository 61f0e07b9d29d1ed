use super::{elements, integer, tensor, without_gil};
use crate::ops::self_ensemble as ops;
use pyo3::prelude::*;
use pyo3_tch::PyTensor;

const CLASS: &str = "ClassBalanceLoss";

/// The class balance of the probabilities `p` (minibatch, `num_classes`).
#[pyfunction]
pub fn class_balance(
    py: Python<'_>,
    p: &Bound<'_, PyAny>,
    num_classes: &Bound<'_, PyAny>,
) -> PyResult<PyTensor> {
    let p = tensor(CLASS, "p", p)?;
    let num_classes = integer(CLASS, "num_classes", num_classes)?;
    without_gil(py, elements(&p), move || {
        ops::class_balance(&p, num_classes)
    })
    .map(PyTensor)
}

/// Raises unless `num_classes` is one that the class accepts.
#[pyfunction]
pub fn check_num_classes(num_classes: &Bound<'_, PyAny>) -> PyResult<()> {
    Ok(ops::check_num_classes(integer(
        CLASS,
        "num_classes",
        num_classes,
    )?)?)
}
