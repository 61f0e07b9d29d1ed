use super::{MANY, elements, number, tensor, without_gil};
use crate::ops::mcc::{self as ops, CLASS};
use crate::ops::ranks::Exchanged;
use crate::torch::input::Input;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3_tch::PyTensor;
use std::sync::{Mutex, PoisonError};

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

/// A rank's part of a batch: its class sums go out, and those of all ranks come back.
#[pyclass(frozen, module = "tllib_rs._core")]
pub struct MccPart(Mutex<Option<ops::Part>>);

#[pymethods]
impl MccPart {
    /// The first sweep over `logits` (minibatch, C).
    #[new]
    fn new(
        py: Python<'_>,
        logits: &Bound<'_, PyAny>,
        temperature: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let logits = tensor(CLASS, "logits", logits)?;
        let temperature = number(CLASS, "temperature", temperature)?;
        let part = without_gil(py, elements(&logits), move || {
            ops::Part::new(&logits, temperature)
        })?;
        Ok(Self(Mutex::new(Some(part))))
    }

    /// (2 C,), float64: to be added to those of the other ranks, in place.
    #[getter]
    fn sums(&self) -> PyResult<PyTensor> {
        let part = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*part {
            Some(part) => Ok(PyTensor(part.sums.shallow_clone())),
            None => Err(finished()),
        }
    }

    /// The loss of all ranks, from the sums of all ranks. To be called once.
    fn finish(
        &self,
        py: Python<'_>,
        sums: &Bound<'_, PyAny>,
        world_size: i64,
    ) -> PyResult<PyTensor> {
        let sums = tensor(CLASS, "sums", sums)?;
        let taken = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let part = taken.ok_or_else(finished)?;
        // Whatever the size: off the CPU this runs torch's autograd, which refuses to run with the GIL held.
        without_gil(py, MANY, move || {
            part.finish(&Exchanged {
                sums: &sums,
                world_size,
            })
        })
        .map(PyTensor)
    }
}

fn finished() -> PyErr {
    PyRuntimeError::new_err(format!("{CLASS}: this part is finished"))
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
    // A sum over the rows for each pair of classes.
    let classes = Input::new(CLASS, "logits", &logits)?
        .shape()
        .last()
        .map_or(1, |&classes| classes as usize);
    without_gil(py, elements(&logits).saturating_mul(classes), move || {
        ops::confusion_matrix(&logits, temperature)
    })
    .map(PyTensor)
}
