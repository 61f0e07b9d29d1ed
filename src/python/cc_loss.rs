use super::{elements, number, tensor, without_gil};
use crate::ops::cc_loss::{self as ops, CLASS};
use pyo3::prelude::*;
use pyo3_tch::PyTensor;

/// Loss, fraction of the rows that are selected, and whether none is (false if only the device knows). The
/// differentiated input comes first.
#[pyfunction]
pub fn cc_loss(
    py: Python<'_>,
    logits_strong: &Bound<'_, PyAny>,
    logits: &Bound<'_, PyAny>,
    temperature: &Bound<'_, PyAny>,
    thr: &Bound<'_, PyAny>,
) -> PyResult<(PyTensor, PyTensor, bool)> {
    let (weak, strong) = (
        tensor(CLASS, "logits", logits)?,
        tensor(CLASS, "logits_strong", logits_strong)?,
    );
    let temperature = number(CLASS, "temperature", temperature)?;
    let thr = number(CLASS, "thr", thr)?;
    let out = without_gil(py, 2 * elements(&weak), move || {
        ops::cc_loss(&weak, &strong, temperature, thr)
    })?;
    Ok((PyTensor(out.loss), PyTensor(out.fraction), out.nothing))
}

/// Raises unless the class accepts these arguments.
#[pyfunction]
pub fn check_cc_loss(temperature: &Bound<'_, PyAny>, thr: &Bound<'_, PyAny>) -> PyResult<()> {
    let temperature = number(CLASS, "temperature", temperature)?;
    Ok(ops::check_cc_loss(temperature, number(CLASS, "thr", thr)?)?)
}
