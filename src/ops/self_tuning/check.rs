//! What self-tuning asks of its arguments.

use super::{Batch, CLASS, Settings};
use crate::error::{Error, Result};
use crate::ops::positive;
use crate::torch::Dtype;
use crate::torch::input::Input;
use tch::Tensor;

impl Settings {
    /// `ValueError` for settings that the class does not take.
    pub fn check(self) -> Result<()> {
        for (name, value) in [("num_classes", self.classes), ("K", self.keys)] {
            if value < 1 {
                return Err(Error::Value(format!(
                    "{CLASS}: {name} must be an integer above 0, got {value}"
                )));
            }
        }
        if !(0.0..=1.0).contains(&self.momentum) {
            return Err(Error::Value(format!(
                "{CLASS}: m must be in [0, 1], got {}",
                self.momentum
            )));
        }
        positive(CLASS, "T", self.temperature)
    }

    /// What is known before the encoders run, and so before anything changes.
    pub fn check_batch(self, im_q: &Tensor, im_k: &Tensor, labels: &Tensor) -> Result<()> {
        self.check()?;
        let (im_q, im_k) = (
            Input::new(CLASS, "im_q", im_q)?,
            Input::new(CLASS, "im_k", im_k)?,
        );
        let labels = Input::new(CLASS, "labels", labels)?;
        let Some(&batch) = im_q.shape().first() else {
            return Err(im_q.wrong("have shape (minibatch, ...)"));
        };
        if im_k.shape().first() != Some(&batch) {
            return Err(im_k.wrong(&format!("have as many rows as im_q, {batch}")));
        }
        check_labels(&labels, batch)?;
        if labels.on_cpu() {
            classes_of(&labels, self.classes)?;
        }
        Ok(())
    }
}

/// The arguments of a step, checked.
pub struct Checked<'a> {
    pub h_q: Input<'a>,
    pub labels: Input<'a>,
    pub queue_ptr: Input<'a>,
    /// What the queries, the keys and the queue are promoted to.
    pub dtype: Dtype,
    /// Whether all that a kernel would read is in host memory, and the queue of type `dtype`.
    pub fusible: bool,
}

impl<'a> Checked<'a> {
    pub fn new(batch: &Batch<'a>, settings: Settings) -> Result<Self> {
        settings.check()?;
        let h_q = Input::new(CLASS, "h_q", batch.h_q)?;
        let h_k = Input::new(CLASS, "h_k", batch.h_k)?;
        let labels = Input::new(CLASS, "labels", batch.labels)?;
        let list = Input::new(CLASS, "queue_list", batch.queue_list)?;
        let queue_ptr = Input::new(CLASS, "queue_ptr", batch.queue_ptr)?;
        let dtypes = [h_q.floating()?, h_k.floating()?, list.floating()?];
        let (rows, dim) = h_q.matrix()?;
        if h_k.shape() != h_q.shape() {
            return Err(h_k.wrong(&format!("have the shape of h_q, {:?}", h_q.shape())));
        }
        check_labels(&labels, rows as i64)?;
        let expected = [dim as i64, settings.keys * settings.classes];
        if list.shape() != expected {
            return Err(list.wrong(&format!(
                "have shape (projection_dim, K * num_classes) = {expected:?}"
            )));
        }
        queue_ptr.int64()?;
        if queue_ptr.shape() != [settings.classes] {
            return Err(queue_ptr.wrong(&format!(
                "have shape (num_classes,) = [{}]",
                settings.classes
            )));
        }
        for other in [&h_k, &list, &queue_ptr] {
            other.same_device(&h_q)?;
        }
        // tllib concatenates to an empty tensor of the default dtype.
        let dtype = dtypes.into_iter().fold(Dtype::default(), Dtype::promote);
        let on_cpu = [&h_q, &h_k, &list].iter().all(|i| i.on_cpu());
        let fusible = on_cpu && list.dtype() == Some(dtype);
        Ok(Self {
            h_q,
            labels,
            queue_ptr,
            dtype,
            fusible,
        })
    }

    /// Labels and pointers on the host, in range; `None` where a look at them would wait for a
    /// device or is not possible.
    pub fn on_host(&self, settings: Settings) -> Result<Option<(Vec<usize>, Vec<i64>)>> {
        if !(self.labels.on_cpu() && self.queue_ptr.on_cpu()) {
            return Ok(None);
        }
        let labels = classes_of(&self.labels, settings.classes)?;
        let pointers = self.queue_ptr.integers()?;
        match pointers.iter().find(|p| !(0..settings.keys).contains(*p)) {
            None => Ok(Some((labels, pointers))),
            Some(p) => Err(Error::Value(format!(
                "{CLASS}: queue_ptr must hold positions in [0, {}], got {p}",
                settings.keys - 1
            ))),
        }
    }
}

fn check_labels(labels: &Input<'_>, batch: i64) -> Result<()> {
    labels.integer()?;
    if labels.shape() == [batch] {
        return Ok(());
    }
    Err(labels.wrong(&format!("have shape (minibatch,) = [{batch}]")))
}

/// The labels of a CPU tensor, in range.
fn classes_of(labels: &Input<'_>, classes: i64) -> Result<Vec<usize>> {
    let class = |label: i64| {
        if (0..classes).contains(&label) {
            return Ok(label as usize);
        }
        Err(Error::Index(format!(
            "{CLASS}: labels must be in [0, {}], got {label}",
            classes - 1
        )))
    };
    labels.integers()?.into_iter().map(class).collect()
}
