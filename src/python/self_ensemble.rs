use super::{MANY, elements, integer, tensor, without_gil};
use crate::ops::ranks::Exchanged;
use crate::ops::self_ensemble::{self as ops, CLASS};
use pyo3::prelude::*;
use pyo3_tch::PyTensor;

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

/// What the ranks add up: the column sums of `p` (minibatch, `num_classes`), then its number of rows; float64.
#[pyfunction]
pub fn class_balance_sums(
    py: Python<'_>,
    p: &Bound<'_, PyAny>,
    num_classes: &Bound<'_, PyAny>,
) -> PyResult<PyTensor> {
    let p = tensor(CLASS, "p", p)?;
    let num_classes = integer(CLASS, "num_classes", num_classes)?;
    without_gil(py, elements(&p), move || ops::part(&p, num_classes)).map(PyTensor)
}

/// The class balance of all ranks, from the sums of all ranks, with a gradient for the rows `p` of
/// this one.
#[pyfunction]
pub fn class_balance_of_sums(
    py: Python<'_>,
    p: &Bound<'_, PyAny>,
    num_classes: &Bound<'_, PyAny>,
    sums: &Bound<'_, PyAny>,
    world_size: i64,
) -> PyResult<PyTensor> {
    let (p, sums) = (tensor(CLASS, "p", p)?, tensor(CLASS, "sums", sums)?);
    let num_classes = integer(CLASS, "num_classes", num_classes)?;
    // Whatever the size: off the CPU this runs torch's autograd, which refuses to run with the GIL held.
    without_gil(py, MANY, move || {
        let all = Exchanged {
            sums: &sums,
            world_size,
        };
        ops::finish(&p, num_classes, &all)
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
