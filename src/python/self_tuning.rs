use super::{caught, elements, integer, number, tensor, without_gil};
use crate::ops::self_tuning::{self as ops, CLASS};
use pyo3::prelude::*;
use pyo3::types::PyType;
use pyo3_tch::PyTensor;
use tch::Tensor;

/// The hyper-parameters as the class has them at the moment of a call.
#[pyclass(frozen, module = "tllib_rs._core")]
pub struct SelfTuningSettings(ops::Settings);

#[pymethods]
impl SelfTuningSettings {
    #[new]
    fn new(
        num_classes: &Bound<'_, PyAny>,
        keys: &Bound<'_, PyAny>,
        momentum: &Bound<'_, PyAny>,
        temperature: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let settings = ops::Settings {
            classes: integer(CLASS, "num_classes", num_classes)?,
            keys: integer(CLASS, "K", keys)?,
            momentum: number(CLASS, "m", momentum)?,
            temperature: number(CLASS, "T", temperature)?,
        };
        settings.check()?;
        Ok(Self(settings))
    }

    /// Raises for a batch that a step would not take, as far as that is known before the encoders
    /// run.
    fn check(
        &self,
        im_q: &Bound<'_, PyAny>,
        im_k: &Bound<'_, PyAny>,
        labels: &Bound<'_, PyAny>,
        queue_list: &Bound<'_, PyAny>,
        queue_ptr: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (im_q, im_k) = (tensor(CLASS, "im_q", im_q)?, tensor(CLASS, "im_k", im_k)?);
        let labels = tensor(CLASS, "labels", labels)?;
        let list = tensor(CLASS, "queue_list", queue_list)?;
        let pointers = tensor(CLASS, "queue_ptr", queue_ptr)?;
        Ok(self
            .0
            .check_batch((&im_q, &im_k, &labels), (&list, &pointers))?)
    }

    /// The log-probabilities of a batch, without a graph; nothing is enqueued.
    fn forward(
        &self,
        py: Python<'_>,
        h_q: &Bound<'_, PyAny>,
        h_k: &Bound<'_, PyAny>,
        labels: &Bound<'_, PyAny>,
        queue_list: &Bound<'_, PyAny>,
    ) -> PyResult<PyTensor> {
        let batch = OwnedBatch::extract(h_q, h_k, labels, queue_list)?;
        let settings = self.0;
        without_gil(py, elements(&batch.queue_list), move || {
            ops::parts::forward(&batch.borrow(), settings)
        })
        .map(PyTensor)
    }

    /// The gradient of the queries, from that of the log-probabilities.
    #[allow(clippy::too_many_arguments, reason = "the step's tensors, one by one")]
    fn backward(
        &self,
        py: Python<'_>,
        grad_output: &Bound<'_, PyAny>,
        pgc_logits: &Bound<'_, PyAny>,
        h_q: &Bound<'_, PyAny>,
        h_k: &Bound<'_, PyAny>,
        labels: &Bound<'_, PyAny>,
        queue_list: &Bound<'_, PyAny>,
    ) -> PyResult<PyTensor> {
        let incoming = tensor(CLASS, "grad_output", grad_output)?;
        let out = tensor(CLASS, "pgc_logits", pgc_logits)?;
        let batch = OwnedBatch::extract(h_q, h_k, labels, queue_list)?;
        let settings = self.0;
        without_gil(py, elements(&batch.queue_list), move || {
            ops::parts::backward(&incoming, &out, &batch.borrow(), settings)
        })
        .map(PyTensor)
    }

    /// Puts the keys of a batch into the queue.
    fn enqueue(
        &self,
        h_k: &Bound<'_, PyAny>,
        labels: &Bound<'_, PyAny>,
        queue_list: &Bound<'_, PyAny>,
        queue_ptr: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (h_k, labels) = (tensor(CLASS, "h_k", h_k)?, tensor(CLASS, "labels", labels)?);
        let list = tensor(CLASS, "queue_list", queue_list)?;
        let pointers = tensor(CLASS, "queue_ptr", queue_ptr)?;
        // With the GIL: no other lock keeps two calls apart.
        Ok(caught(|| {
            ops::parts::enqueue(&h_k, &labels, (&list, &pointers), self.0)
        })?)
    }
}

/// A batch that keeps its tensors alive without the GIL.
struct OwnedBatch {
    h_q: Tensor,
    h_k: Tensor,
    labels: Tensor,
    queue_list: Tensor,
}

impl OwnedBatch {
    fn extract(
        h_q: &Bound<'_, PyAny>,
        h_k: &Bound<'_, PyAny>,
        labels: &Bound<'_, PyAny>,
        queue_list: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        Ok(Self {
            h_q: tensor(CLASS, "h_q", h_q)?,
            h_k: tensor(CLASS, "h_k", h_k)?,
            labels: tensor(CLASS, "labels", labels)?,
            queue_list: tensor(CLASS, "queue_list", queue_list)?,
        })
    }

    fn borrow(&self) -> ops::Batch<'_> {
        ops::Batch {
            h_q: &self.h_q,
            h_k: &self.h_k,
            labels: &self.labels,
            queue_list: &self.queue_list,
            enqueued: None,
        }
    }
}

/// The changes of a queue that graphs still need. A copy or a pickle of it starts empty.
#[pyclass(frozen, module = "tllib_rs._core")]
#[derive(Default)]
pub struct SelfTuningHistory(ops::History);

#[pymethods]
impl SelfTuningHistory {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    #[allow(
        clippy::unused_self,
        reason = "a method to Python; the history starts anew in a copy"
    )]
    fn __reduce__<'py>(&self, py: Python<'py>) -> (Bound<'py, PyType>, ()) {
        (py.get_type::<Self>(), ())
    }

    /// The log-probabilities of a batch against the queue; then its keys are enqueued, or the keys and
    /// labels of `enqueued`.
    #[pyo3(signature = (h_q, h_k, labels, queue_list, queue_ptr, settings, enqueued = None))]
    #[allow(clippy::too_many_arguments, reason = "the step's tensors, one by one")]
    fn step(
        &self,
        py: Python<'_>,
        h_q: &Bound<'_, PyAny>,
        h_k: &Bound<'_, PyAny>,
        labels: &Bound<'_, PyAny>,
        queue_list: &Bound<'_, PyAny>,
        queue_ptr: &Bound<'_, PyAny>,
        settings: &SelfTuningSettings,
        enqueued: Option<(Bound<'_, PyAny>, Bound<'_, PyAny>)>,
    ) -> PyResult<PyTensor> {
        let batch = OwnedBatch::extract(h_q, h_k, labels, queue_list)?;
        let queue_ptr = tensor(CLASS, "queue_ptr", queue_ptr)?;
        let enqueued = match &enqueued {
            None => None,
            Some((keys, labels)) => Some((
                tensor(CLASS, "enqueued keys", keys)?,
                tensor(CLASS, "enqueued labels", labels)?,
            )),
        };
        let (settings, history) = (settings.0, &self.0);
        // The product reads the queue once a step.
        without_gil(py, elements(&batch.queue_list), move || {
            let batch = ops::Batch {
                enqueued: enqueued.as_ref().map(|(keys, labels)| (keys, labels)),
                ..batch.borrow()
            };
            ops::self_tuning(&batch, &queue_ptr, settings, history)
        })
        .map(PyTensor)
    }
}
