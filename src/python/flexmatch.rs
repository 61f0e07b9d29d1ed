use super::{tensor, without_gil};
use crate::error::Result;
use crate::ops::flexmatch as ops;
use pyo3::prelude::*;
use pyo3_tch::PyTensor;
use std::sync::{Mutex, PoisonError};
use tch::{Device, Tensor};

const CLASS: &str = "DynamicThresholdingModule";

/// The labels of all samples and their counts.
#[pyclass(frozen, module = "tllib_rs._core")]
pub struct FlexMatch {
    // Always taken without waiting for the GIL: whoever holds it never asks for the GIL.
    state: Mutex<ops::FlexMatch>,
    samples: usize,
}

impl FlexMatch {
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        body: impl FnOnce(&mut ops::FlexMatch) -> Result<T> + Send,
    ) -> PyResult<T> {
        let lock = || self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let work = if lock().is_stale() { self.samples } else { 0 };
        without_gil(py, work, move || body(&mut lock()))
    }
}

#[pymethods]
impl FlexMatch {
    #[new]
    fn new(classes: i64, samples: i64, warmup: bool, device: &Bound<'_, PyAny>) -> PyResult<Self> {
        let probe = device.py().import("torch")?.call_method(
            "empty",
            (0,),
            Some(&[("device", device)].into_py_dict(device.py())?),
        )?;
        let device: Device = tensor(CLASS, "device", &probe)?.device();
        let state = ops::FlexMatch::new(classes, samples, warmup, device)?;
        Ok(Self { state: Mutex::new(state), samples: samples as usize })
    }

    /// The label of each sample, int64, -1 where it has none yet. May be written.
    #[getter]
    fn net_outputs(&self, py: Python<'_>) -> PyResult<PyTensor> {
        self.with(py, |state| Ok(state.net_outputs())).map(PyTensor)
    }

    #[setter]
    fn set_net_outputs(&self, py: Python<'_>, labels: &Bound<'_, PyAny>) -> PyResult<()> {
        let labels = tensor(CLASS, "net_outputs", labels)?;
        self.with(py, move |state| state.set_net_outputs(&labels))
    }

    /// The learning status of the class of each label, float32.
    fn status(&self, py: Python<'_>, labels: &Bound<'_, PyAny>, warmup: bool) -> PyResult<PyTensor> {
        let labels = tensor(CLASS, "pseudo_labels", labels)?;
        self.with(py, move |state| {
            state.set_warmup(warmup);
            state.status(&labels)
        })
        .map(PyTensor)
    }

    /// Writes the labels of the selected samples.
    fn update(
        &self,
        py: Python<'_>,
        idxes: &Bound<'_, PyAny>,
        selected_mask: &Bound<'_, PyAny>,
        pseudo_labels: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let idxes: Tensor = tensor(CLASS, "idxes", idxes)?;
        let mask = tensor(CLASS, "selected_mask", selected_mask)?;
        let labels = tensor(CLASS, "pseudo_labels", pseudo_labels)?;
        self.with(py, move |state| state.update(&idxes, &mask, &labels))
    }

    /// Samples per class, and in front those without a label, int64.
    fn counts(&self, py: Python<'_>) -> PyResult<PyTensor> {
        self.with(py, ops::FlexMatch::counts).map(PyTensor)
    }
}

use pyo3::types::IntoPyDict;
