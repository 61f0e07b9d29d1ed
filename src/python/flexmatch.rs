use super::{tensor, without_gil};
use crate::error::{Error, Result};
use crate::ops::flexmatch as ops;
use crate::torch::pages;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::IntoPyDict;
use pyo3_tch::PyTensor;
use std::sync::{Mutex, PoisonError};
use tch::Tensor;

const CLASS: &str = "DynamicThresholdingModule";

/// The labels of all samples and their counts.
#[pyclass(frozen, module = "tllib_rs._core")]
pub struct FlexMatch {
    // No thread that holds it acquires the GIL, so it may be waited for with the GIL held: see `FlexMatch::locked`.
    state: Mutex<ops::FlexMatch>,
    samples: usize,
}

/// A number of classes or samples: at least one, and no more than memory could hold.
fn positive(name: &str, n: i64) -> PyResult<usize> {
    const MOST: i64 = 1 << 40;
    let most = if name == "num_classes" { 1 << 30 } else { MOST };
    match usize::try_from(n) {
        Ok(count) if count > 0 && n <= most => Ok(count),
        _ => Err(PyValueError::new_err(format!(
            "{CLASS}: {name} must be an integer in [1, {most}], got {n}"
        ))),
    }
}

impl FlexMatch {
    /// Runs `body` with the lock. Dropping a tensor that Python has seen may take the GIL, or release it and take it
    /// again: those that were replaced are dropped after the lock is released.
    fn locked<T>(&self, body: impl FnOnce(&mut ops::FlexMatch) -> T) -> T {
        let (result, retired) = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            (body(&mut state), state.retired())
        };
        drop(retired);
        result
    }

    /// Checks whether others can reach the labels, and then answers `asked`.
    fn look(&self, asked: impl FnOnce(&ops::FlexMatch) -> bool) -> PyResult<bool> {
        self.locked(ops::FlexMatch::adopt)?;
        Ok(self.locked(|state| {
            state.look();
            asked(state)
        }))
    }

    /// Replaces the labels by `labels` with `assign`, which reads all of them.
    fn replace(
        &self,
        py: Python<'_>,
        labels: &Bound<'_, PyAny>,
        assign: impl FnOnce(&mut ops::FlexMatch, &Tensor) -> Result<()> + Send,
    ) -> PyResult<()> {
        let labels = tensor(CLASS, "net_outputs", labels)?;
        without_gil(py, self.samples, move || {
            let labels = labels;
            // The lock is released before the argument is dropped, which may take the GIL.
            self.locked(|state| assign(state, &labels))
        })
    }

    /// Runs a step on counts that are up to date. Only counting all samples again takes long enough to
    /// release the GIL; a step itself handles Python's tensors and keeps it.
    fn with<T>(
        &self,
        py: Python<'_>,
        step: impl FnOnce(&mut ops::FlexMatch) -> Result<T>,
    ) -> PyResult<T> {
        if self.is_stale()? {
            without_gil(py, self.samples, || self.locked(ops::FlexMatch::refresh))?;
        }
        Ok(self.locked(step)?)
    }
}

#[pymethods]
impl FlexMatch {
    /// `counts_on_device` keeps the counts where `net_outputs` lives, as every device but the CPU does.
    #[new]
    #[pyo3(signature = (classes, samples, device, counts_on_device=None, dtype=None))]
    fn new(
        classes: i64,
        samples: i64,
        device: &Bound<'_, PyAny>,
        counts_on_device: Option<bool>,
        dtype: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let (classes, count) = (
            positive("num_classes", classes)?,
            positive("n_unlabeled_samples", samples)?,
        );
        let torch = device.py().import("torch")?;
        let dtype = match dtype {
            Some(dtype) => dtype.clone(),
            None => torch.getattr("int64")?,
        };
        // Before anything is allocated.
        ops::Stored::named(&dtype.str()?.to_cow()?)?.holds(classes)?;
        let options = [("device", device.clone()), ("dtype", dtype)];
        let options = options.into_py_dict(device.py())?;
        let labels = torch.call_method("empty", (samples,), Some(&options))?;
        let mut labels = tensor(CLASS, "net_outputs", &labels)?;
        pages::ask_for_large(&labels);
        let _ = labels.f_fill_(-1).map_err(Error::from)?;
        let state = ops::FlexMatch::new(classes, labels, counts_on_device)?;
        Ok(Self {
            state: Mutex::new(state),
            samples: count,
        })
    }

    /// The label of each sample, -1 where it has none yet. May be written.
    #[getter]
    fn net_outputs(&self) -> PyResult<PyTensor> {
        Ok(PyTensor(self.locked(ops::FlexMatch::net_outputs)?))
    }

    #[setter]
    fn set_net_outputs(&self, py: Python<'_>, labels: &Bound<'_, PyAny>) -> PyResult<()> {
        self.replace(py, labels, ops::FlexMatch::set_net_outputs)
    }

    /// Replaces the labels by a copy of `labels`, which may be of any of the types that labels are stored in.
    fn load(&self, py: Python<'_>, labels: &Bound<'_, PyAny>) -> PyResult<()> {
        self.replace(py, labels, ops::FlexMatch::load)
    }

    /// The learning status of the class of each label, float32.
    fn status(
        &self,
        py: Python<'_>,
        labels: &Bound<'_, PyAny>,
        warmup: bool,
    ) -> PyResult<PyTensor> {
        let labels = tensor(CLASS, "pseudo_labels", labels)?;
        let status = |state: &mut ops::FlexMatch| state.status(&labels, warmup);
        if self.locked(|state| state.has_totals()) {
            return Ok(PyTensor(self.locked(status)?));
        }
        self.with(py, status).map(PyTensor)
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
        self.with(py, |state| state.update(&idxes, &mask, &labels))
    }

    /// What `update` would write, in one int64 for each selected sample; nothing is written.
    fn pack(
        &self,
        py: Python<'_>,
        idxes: &Bound<'_, PyAny>,
        selected_mask: &Bound<'_, PyAny>,
        pseudo_labels: &Bound<'_, PyAny>,
    ) -> PyResult<PyTensor> {
        let idxes = tensor(CLASS, "idxes", idxes)?;
        let mask = tensor(CLASS, "selected_mask", selected_mask)?;
        let labels = tensor(CLASS, "pseudo_labels", pseudo_labels)?;
        self.locked(|state| state.check(&idxes, &mask, &labels))?;
        // Waits for the device without the lock, and without the GIL, which the thread that exchanges what was
        // packed before needs.
        let [idxes, mask, labels] =
            without_gil(py, usize::MAX, move || ops::on_host([idxes, mask, labels]))?;
        let packed = self.locked(|state| state.pack(&idxes, &mask, &labels))?;
        Ok(PyTensor(packed))
    }

    /// Writes what `pack` made, in order.
    fn apply(&self, py: Python<'_>, words: &Bound<'_, PyAny>) -> PyResult<()> {
        let words = tensor(CLASS, "words", words)?;
        self.with(py, |state| state.apply(&words))
    }

    /// From now on the status is computed from these totals, int64, which include `counts`.
    fn set_totals(&self, totals: &Bound<'_, PyAny>) -> PyResult<()> {
        let totals = tensor(CLASS, "totals", totals)?;
        Ok(self.locked(|state| state.set_totals(&totals))?)
    }

    /// Whether anybody else can reach the labels now.
    fn is_shared(&self) -> PyResult<bool> {
        self.look(ops::FlexMatch::is_shared)
    }

    /// Whether the next step counts all samples again.
    fn is_stale(&self) -> PyResult<bool> {
        self.look(ops::FlexMatch::is_stale)
    }

    /// Samples per class, preceded by those without a label, int64.
    fn counts(&self, py: Python<'_>) -> PyResult<PyTensor> {
        self.with(py, ops::FlexMatch::counts).map(PyTensor)
    }
}
