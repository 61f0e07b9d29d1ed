//! FlexMatch's state on tensors. The mathematics is in [`crate::kernels::flexmatch`].
//!
//! `net_outputs` belongs to the user as well, who may read and write it at any time. Counts are
//! therefore trusted only while nobody else can have written: the tensor's version is the one they
//! were made at, and no alias of its memory was alive since. Otherwise they are counted again, once.
//! What is handed out is an alias that shares the version; the tensor kept here never leaves.

mod device;
mod host;

use crate::error::{Error, Result};
use crate::kernels::flexmatch::Counts;
use crate::torch::input::Input;
use crate::torch::{aliased, bump_version, version};
use tch::Tensor;

const CLASS: &str = "DynamicThresholdingModule";

/// How often each value occurs, where `net_outputs` lives.
enum Tally {
    Host(Counts),
    /// `counts[c + 1]`, int64, on the device; `counts[0]` is of -1.
    Device(Tensor),
}

/// The labels of all samples, and what they count up to.
#[allow(
    clippy::struct_excessive_bools,
    reason = "four independent facts, not states of a machine"
)]
pub struct FlexMatch {
    net_outputs: Tensor,
    classes: usize,
    samples: usize,
    warmup: bool,
    /// Whether counts are kept on the host, beside labels that are there too.
    on_host: bool,
    tally: Option<Tally>,
    /// The version of `net_outputs` that the tally belongs to.
    version: i64,
    /// Whether an alias of `net_outputs` was alive at the last look before the count, or since.
    exposed: bool,
    /// Whether one was alive at the last look.
    shared: bool,
}

impl FlexMatch {
    /// No sample has a label yet.
    pub fn new(
        classes: usize,
        net_outputs: Tensor,
        warmup: bool,
        counts_on_device: Option<bool>,
    ) -> Result<Self> {
        let input = Input::new(CLASS, "net_outputs", &net_outputs)?;
        let (samples, on_cpu) = (input.vector()?, input.on_cpu());
        if input.is_meta() {
            return Err(Error::Value(format!(
                "{CLASS}: device must hold values, got meta"
            )));
        }
        let on_host = !counts_on_device.unwrap_or(!on_cpu);
        let tally = on_host.then(|| Tally::Host(Counts::unlabelled(samples, classes)));
        let version = version(&net_outputs);
        Ok(Self {
            net_outputs,
            classes,
            samples,
            warmup,
            on_host,
            tally,
            version,
            exposed: false,
            shared: false,
        })
    }

    /// The labels, to be read or written by the caller.
    pub fn net_outputs(&mut self) -> Result<Tensor> {
        self.exposed = true;
        Ok(self.net_outputs.f_detach()?)
    }

    /// Takes `labels` as the new `net_outputs`. On the same device it is adopted, not copied.
    pub fn set_net_outputs(&mut self, labels: &Tensor) -> Result<()> {
        let input = Input::new(CLASS, "net_outputs", labels)?;
        input.int64()?;
        if input.shape() != [self.samples as i64] {
            return Err(input.wrong(&format!(
                "have shape (n_unlabeled_samples,) = [{}]",
                self.samples
            )));
        }
        let mut moved = labels.f_detach()?.f_to_device(self.net_outputs.device())?;
        if self.on_host {
            moved = Input::new(CLASS, "net_outputs", &moved)?.in_memory()?;
            host::count(&moved, self.classes)?;
        } else {
            moved = moved.f_contiguous()?;
        }
        self.net_outputs = moved;
        self.tally = None;
        Ok(())
    }

    /// Whether warm-up counts the samples without a label.
    pub fn set_warmup(&mut self, warmup: bool) {
        self.warmup = warmup;
    }

    /// The status of the class of each label, float32, in the shape of `labels`.
    pub fn status(&mut self, labels: &Tensor) -> Result<Tensor> {
        let input = Input::new(CLASS, "pseudo_labels", labels)?;
        input.integer()?;
        input.same_device(&Input::new(CLASS, "net_outputs", &self.net_outputs)?)?;
        let (classes, warmup, samples) = (self.classes, self.warmup, self.samples);
        match self.tally()? {
            Tally::Host(counts) => host::status(counts, &input, classes, warmup),
            Tally::Device(counts) => device::status(counts, labels, samples, warmup),
        }
    }

    /// `net_outputs[idxes[mask == 1]] = labels[mask == 1]`; of equal indices the last one wins.
    pub fn update(&mut self, idxes: &Tensor, mask: &Tensor, labels: &Tensor) -> Result<()> {
        let index = Input::new(CLASS, "idxes", idxes)?;
        let selected = Input::new(CLASS, "selected_mask", mask)?;
        let label = Input::new(CLASS, "pseudo_labels", labels)?;
        index.integer()?;
        label.integer()?;
        index.vector()?;
        for other in [&selected, &label] {
            if other.shape() != index.shape() {
                return Err(other.wrong(&format!("have the shape of idxes, {:?}", index.shape())));
            }
            other.same_device(&index)?;
        }
        index.same_device(&Input::new(CLASS, "net_outputs", &self.net_outputs)?)?;
        let (samples, classes) = (self.samples, self.classes);
        let outputs = self.net_outputs.shallow_clone();
        let changed = match self.tally()? {
            Tally::Host(counts) => {
                let batch = host::Batch::read(&index, &selected, &label, samples, classes)?;
                batch.apply(counts, &outputs)
            }
            Tally::Device(counts) => {
                *counts = device::update(counts, &outputs, idxes, mask, labels)?;
                true
            }
        };
        if changed {
            bump_version(&self.net_outputs);
        }
        self.version = version(&self.net_outputs);
        Ok(())
    }

    /// Counts per class, and of -1 in front, int64.
    pub fn counts(&mut self) -> Result<Tensor> {
        match self.tally()? {
            Tally::Host(counts) => Ok(Tensor::f_from_slice(counts.raw())?),
            Tally::Device(counts) => Ok(counts.f_clone_detached()?),
        }
    }

    /// Looks whether others can reach the labels. To be called at the start of every step, with the
    /// GIL; the rest of a step never asks for it.
    pub fn look(&mut self) {
        self.shared = aliased(&self.net_outputs);
        self.exposed |= self.shared;
    }

    /// Whether the next step has to count all samples again.
    pub fn is_stale(&self) -> bool {
        self.tally.is_none() || self.exposed || version(&self.net_outputs) != self.version
    }

    /// Counts all samples, where that is needed.
    pub fn refresh(&mut self) -> Result<()> {
        self.tally().map(|_| ())
    }

    fn tally(&mut self) -> Result<&mut Tally> {
        if self.is_stale() {
            // Invalid until the count succeeds.
            self.tally = None;
            let fresh = if self.on_host {
                Tally::Host(host::count(&self.net_outputs, self.classes)?)
            } else {
                Tally::Device(device::count(&self.net_outputs, self.classes)?)
            };
            self.tally = Some(fresh);
            self.version = version(&self.net_outputs);
            // The holder of an alias may go on writing in ways that leave no trace.
            self.exposed = self.shared;
        }
        self.tally
            .as_mut()
            .ok_or_else(|| Error::Value(format!("{CLASS}: no counts")))
    }
}

trait CloneDetached: Sized {
    fn f_clone_detached(&self) -> Result<Self>;
}

impl CloneDetached for Tensor {
    fn f_clone_detached(&self) -> Result<Self> {
        let mut copy = self.f_empty_like()?;
        copy.f_copy_(self)?;
        Ok(copy)
    }
}
