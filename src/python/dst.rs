use super::{elements, number, tensor, without_gil};
use crate::ops::dst::{self as ops, CLASS};
use pyo3::prelude::*;
use pyo3_tch::PyTensor;

/// The worst-case estimation loss from the logits of both heads on labeled and unlabeled rows.
#[pyfunction]
pub fn dst(
    py: Python<'_>,
    y_l: &Bound<'_, PyAny>,
    y_l_adv: &Bound<'_, PyAny>,
    y_u: &Bound<'_, PyAny>,
    y_u_adv: &Bound<'_, PyAny>,
    eta_prime: &Bound<'_, PyAny>,
) -> PyResult<PyTensor> {
    let (y_l, y_l_adv) = (
        tensor(CLASS, "y_l", y_l)?,
        tensor(CLASS, "y_l_adv", y_l_adv)?,
    );
    let (y_u, y_u_adv) = (
        tensor(CLASS, "y_u", y_u)?,
        tensor(CLASS, "y_u_adv", y_u_adv)?,
    );
    let eta_prime = number(CLASS, "eta_prime", eta_prime)?;
    let work = elements(&y_l) + elements(&y_u);
    without_gil(py, 2 * work, move || {
        ops::dst(&y_l, &y_l_adv, &y_u, &y_u_adv, eta_prime)
    })
    .map(PyTensor)
}

/// Raises unless `eta_prime` is one that the class accepts.
#[pyfunction]
pub fn check_eta_prime(eta_prime: &Bound<'_, PyAny>) -> PyResult<()> {
    Ok(ops::check_eta_prime(number(
        CLASS,
        "eta_prime",
        eta_prime,
    )?)?)
}
