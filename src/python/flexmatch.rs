use super::{MANY, caught, integer, tensor, without_gil};
use crate::error::{Error, Result};
use crate::ops::flexmatch::{self as ops, CLASS};
use crate::torch::pages;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::IntoPyDict;
use pyo3_tch::PyTensor;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LockResult, Mutex, MutexGuard, PoisonError};
use tch::{Device, Tensor};

/// The labels of all samples and their counts.
#[pyclass(frozen, module = "tllib_rs._core")]
pub struct FlexMatch {
    state: Mutex<ops::FlexMatch>,
    /// The thread that holds the lock, as [`this_thread`] has it, or 0.
    holder: AtomicUsize,
    /// Whether what counts or copies all samples releases the GIL.
    slow: bool,
}

/// Samples on the CPU that are counted, in 10 ms at most, or copied without releasing the GIL: no other thread can fork
/// the process then, with the lock held for ever in the child.
const QUICK: usize = 1 << 24;

/// A number that no other thread has while this one lives.
fn this_thread() -> usize {
    thread_local!(static PLACE: u8 = const { 0 });
    PLACE.with(|place| ptr::from_ref(place).addr())
}

/// The lock on the state of a module.
struct Held<'a> {
    state: MutexGuard<'a, ops::FlexMatch>,
    holder: &'a AtomicUsize,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // Before the lock is released.
        self.holder.store(0, Ordering::Relaxed);
    }
}

/// No more than memory could hold.
const MOST_CLASSES: i64 = 1 << 30;
const MOST_SAMPLES: i64 = 1 << 40;

/// A number of classes or samples: at least one.
fn count(name: &str, n: &Bound<'_, PyAny>, most: i64) -> PyResult<usize> {
    let n = integer(CLASS, name, n)?;
    match usize::try_from(n) {
        Ok(count) if count > 0 && n <= most => Ok(count),
        _ => Err(PyValueError::new_err(format!(
            "{CLASS}: {name} must be an integer in [1, {most}], got {n}"
        ))),
    }
}

impl FlexMatch {
    /// Runs `body` with the lock and the GIL. A thread waits for the lock without the GIL: under the lock libtorch may
    /// run Python code, such as a dispatch mode, which gives up the GIL.
    fn locked<T>(
        &self,
        py: Python<'_>,
        body: impl FnOnce(&mut ops::FlexMatch) -> Result<T>,
    ) -> PyResult<T> {
        Ok(caught(|| {
            self.with_state(|state| state.lock_py_attached(py), body)
        })?)
    }

    /// The same for what counts or copies all samples, without the GIL if there are very many.
    fn locked_for_all<T: Send>(
        &self,
        py: Python<'_>,
        body: impl FnOnce(&mut ops::FlexMatch) -> Result<T> + Send,
    ) -> PyResult<T> {
        if !self.slow {
            return self.locked(py, body);
        }
        without_gil(py, MANY, || self.with_state(Mutex::lock, body))
    }

    /// Dropping a tensor that Python has seen may run code that calls the module: those that were replaced are dropped
    /// after the lock is released. Code that libtorch runs under the lock may call it as well, and would wait for
    /// itself.
    fn with_state<'a, T>(
        &'a self,
        lock: impl FnOnce(&'a Mutex<ops::FlexMatch>) -> LockResult<MutexGuard<'a, ops::FlexMatch>>,
        body: impl FnOnce(&mut ops::FlexMatch) -> Result<T>,
    ) -> Result<T> {
        // Relaxed: what this thread wrote itself is what matters.
        if self.holder.load(Ordering::Relaxed) == this_thread() {
            return Err(Error::Reentered(CLASS));
        }
        let state = lock(&self.state).unwrap_or_else(PoisonError::into_inner);
        self.holder.store(this_thread(), Ordering::Relaxed);
        let mut held = Held {
            state,
            holder: &self.holder,
        };
        let result = body(&mut held.state);
        let retired = held.state.retired();
        drop(held);
        drop(retired);
        result
    }

    /// Checks whether others can reach the labels, and then answers `asked`.
    fn look(&self, py: Python<'_>, asked: impl FnOnce(&ops::FlexMatch) -> bool) -> PyResult<bool> {
        self.locked(py, ops::FlexMatch::adopt)?;
        self.locked(py, |state| {
            state.look();
            Ok(asked(state))
        })
    }

    /// Runs a step on counts that are up to date. The step itself handles Python's tensors and keeps the GIL.
    fn with<T>(
        &self,
        py: Python<'_>,
        step: impl FnOnce(&mut ops::FlexMatch) -> Result<T>,
    ) -> PyResult<T> {
        if self.is_stale(py)? {
            self.locked_for_all(py, ops::FlexMatch::refresh)?;
        }
        self.locked(py, step)
    }
}

#[pymethods]
impl FlexMatch {
    /// `counts_on_device` keeps the counts where `net_outputs` lives, as every device but the CPU does.
    #[new]
    #[pyo3(signature = (classes, samples, device, counts_on_device=None, dtype=None))]
    fn new(
        classes: &Bound<'_, PyAny>,
        samples: &Bound<'_, PyAny>,
        device: &Bound<'_, PyAny>,
        counts_on_device: Option<bool>,
        dtype: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let classes = count("num_classes", classes, MOST_CLASSES)?;
        let samples = count("n_unlabeled_samples", samples, MOST_SAMPLES)?;
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
        let slow = samples > QUICK || labels.device() != Device::Cpu;
        let state = caught(move || {
            pages::ask_for_large(&labels);
            let _ = labels.f_fill_(-1)?;
            ops::FlexMatch::new(classes, labels, counts_on_device)
        })?;
        Ok(Self {
            state: Mutex::new(state),
            holder: AtomicUsize::new(0),
            slow,
        })
    }

    /// The label of each sample, -1 where it has none yet. May be written.
    #[getter]
    fn net_outputs(&self, py: Python<'_>) -> PyResult<PyTensor> {
        self.locked(py, ops::FlexMatch::net_outputs).map(PyTensor)
    }

    #[setter]
    fn set_net_outputs(&self, py: Python<'_>, labels: &Bound<'_, PyAny>) -> PyResult<()> {
        let labels = tensor(CLASS, "net_outputs", labels)?;
        self.locked_for_all(py, move |state| state.set_net_outputs(&labels))
    }

    /// Replaces the labels by a copy of `labels`, which may be of any of the types that labels are stored in.
    fn load(&self, py: Python<'_>, labels: &Bound<'_, PyAny>) -> PyResult<()> {
        let labels = tensor(CLASS, "net_outputs", labels)?;
        self.locked_for_all(py, move |state| state.load(&labels))
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
        if self.locked(py, |state| Ok(state.has_totals()))? {
            return self.locked(py, status).map(PyTensor);
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
        self.locked(py, |state| state.check(&idxes, &mask, &labels))?;
        // Waits for the device without the lock, and without the GIL, which the thread that exchanges what was
        // packed before needs.
        let [idxes, mask, labels] =
            without_gil(py, MANY, move || ops::on_host([idxes, mask, labels]))?;
        self.locked(py, |state| state.pack(&idxes, &mask, &labels))
            .map(PyTensor)
    }

    /// Writes what `pack` made, in order.
    fn apply(&self, py: Python<'_>, words: &Bound<'_, PyAny>) -> PyResult<()> {
        let words = tensor(CLASS, "words", words)?;
        self.with(py, |state| state.apply(&words))
    }

    /// From now on the status is computed from these totals, int64, which include `counts`.
    fn set_totals(&self, py: Python<'_>, totals: &Bound<'_, PyAny>) -> PyResult<()> {
        let totals = tensor(CLASS, "totals", totals)?;
        self.locked(py, |state| state.set_totals(&totals))
    }

    /// Whether anybody else can reach the labels now.
    fn is_shared(&self, py: Python<'_>) -> PyResult<bool> {
        self.look(py, ops::FlexMatch::is_shared)
    }

    /// Whether the next step counts all samples again.
    fn is_stale(&self, py: Python<'_>) -> PyResult<bool> {
        self.look(py, ops::FlexMatch::is_stale)
    }

    /// Samples per class, preceded by those without a label, int64.
    fn counts(&self, py: Python<'_>) -> PyResult<PyTensor> {
        self.with(py, ops::FlexMatch::counts).map(PyTensor)
    }
}
