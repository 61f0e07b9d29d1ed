//! The checks of self-tuning's arguments.

use super::{Batch, CLASS, Settings};
use crate::error::{Error, Result};
use crate::ops::in_host_memory;
use crate::ops::{fraction, positive};
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
        if self.keys.checked_mul(self.classes).is_none() {
            return Err(Error::Value(format!(
                "{CLASS}: K * num_classes must fit in 64 bits, got {} * {}",
                self.keys, self.classes
            )));
        }
        fraction(CLASS, "m", self.momentum)?;
        positive(CLASS, "T", self.temperature)
    }

    /// Checks what is known before the encoders run, and so before anything changes.
    pub fn check_batch(
        self,
        (im_q, im_k, labels): (&Tensor, &Tensor, &Tensor),
        (queue_list, queue_ptr): (&Tensor, &Tensor),
    ) -> Result<()> {
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
        if in_host_memory(&labels) {
            classes_of(&labels, self.classes)?;
        }
        check_queue(&Input::new(CLASS, "queue_list", queue_list)?, None, self)?;
        Pointers::new(queue_ptr, queue_list, self)?.on_host()?;
        Ok(())
    }
}

/// The queue; `dim` is the projections' width, where it is known.
fn check_queue(list: &Input<'_>, dim: Option<i64>, settings: Settings) -> Result<()> {
    list.floating()?;
    let columns = settings.keys * settings.classes;
    let fits = matches!(*list.shape(), [d, n] if dim.is_none_or(|dim| d == dim) && n == columns);
    if fits {
        return Ok(());
    }
    let dim = dim.map_or_else(|| "projection_dim".to_owned(), |d| d.to_string());
    Err(list.wrong(&format!(
        "have shape (projection_dim, K * num_classes) = [{dim}, {columns}]"
    )))
}

/// The positions at which the next keys go, checked.
pub struct Pointers<'a> {
    pub queue_ptr: Input<'a>,
    keys: i64,
}

impl<'a> Pointers<'a> {
    pub fn new(queue_ptr: &'a Tensor, queue_list: &Tensor, settings: Settings) -> Result<Self> {
        let queue_ptr = Input::new(CLASS, "queue_ptr", queue_ptr)?;
        queue_ptr.int64()?;
        if queue_ptr.shape() != [settings.classes] {
            return Err(queue_ptr.wrong(&format!(
                "have shape (num_classes,) = [{}]",
                settings.classes
            )));
        }
        queue_ptr.same_device(&Input::new(CLASS, "queue_list", queue_list)?)?;
        let keys = settings.keys;
        Ok(Self { queue_ptr, keys })
    }

    /// The positions, in range; `None` if reading them would wait for a device or is not
    /// possible.
    pub fn on_host(&self) -> Result<Option<Vec<i64>>> {
        if !in_host_memory(&self.queue_ptr) {
            return Ok(None);
        }
        let pointers = self.queue_ptr.integers()?;
        match pointers.iter().find(|p| !(0..self.keys).contains(*p)) {
            None => Ok(Some(pointers)),
            Some(p) => Err(Error::Value(format!(
                "{CLASS}: queue_ptr must hold positions in [0, {}], got {p}",
                self.keys - 1
            ))),
        }
    }
}

/// A batch, checked.
pub struct Checked<'a> {
    pub h_q: Input<'a>,
    pub h_k: Input<'a>,
    pub list: Input<'a>,
    pub labels: Input<'a>,
    /// Labels to enqueue in place of `labels`.
    enqueued: Option<Input<'a>>,
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
        let dtypes = [h_q.floating()?, h_k.floating()?, list.floating()?];
        let (rows, dim) = h_q.matrix()?;
        if h_k.shape() != h_q.shape() {
            return Err(h_k.wrong(&format!("have the shape of h_q, {:?}", h_q.shape())));
        }
        check_labels(&labels, rows as i64)?;
        check_queue(&list, Some(dim as i64), settings)?;
        for other in [&h_k, &list] {
            other.same_device(&h_q)?;
        }
        let enqueued = match batch.enqueued {
            None => None,
            Some((keys, labels)) => {
                let keys = Input::new(CLASS, "enqueued keys", keys)?;
                let labels = Input::new(CLASS, "enqueued labels", labels)?;
                let entering = keys.matrix()?;
                if entering.1 != dim || keys.dtype() != h_k.dtype() {
                    return Err(keys.wrong(&format!("have the dtype and width of h_k, {dim}")));
                }
                keys.same_device(&h_q)?;
                check_labels(&labels, entering.0 as i64)?;
                Some(labels)
            }
        };
        // tllib concatenates onto an empty tensor of the default dtype.
        let dtype = dtypes.into_iter().fold(Dtype::default(), Dtype::promote);
        let on_cpu = [&h_q, &h_k, &list].iter().all(|i| i.on_cpu());
        let fusible = on_cpu && list.dtype() == Some(dtype);
        Ok(Self {
            h_q,
            h_k,
            list,
            labels,
            enqueued,
            dtype,
            fusible,
        })
    }

    /// The labels to enqueue if they are not those of the batch, in range. The batch must be
    /// [`Checked::on_host`].
    pub fn enqueued_on_host(&self, settings: Settings) -> Result<Option<Vec<usize>>> {
        self.enqueued
            .as_ref()
            .map(|labels| classes_of(labels, settings.classes))
            .transpose()
    }

    /// The labels, in range; `None` if reading them would wait for a device or is not possible.
    pub fn on_host(&self, settings: Settings) -> Result<Option<Vec<usize>>> {
        let enqueued = self
            .enqueued
            .as_ref()
            .is_none_or(|labels| in_host_memory(labels));
        if !(in_host_memory(&self.labels) && enqueued) {
            return Ok(None);
        }
        classes_of(&self.labels, settings.classes).map(Some)
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
