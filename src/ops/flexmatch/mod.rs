//! FlexMatch's state on tensors. The mathematics is in [`crate::kernels::flexmatch`].
//!
//! The user may read and write `net_outputs` at any time. Counts are therefore trusted only while
//! nobody else can have written: the tensor's version is the one that was counted, and no alias of
//! its memory has been alive since. Otherwise all samples are counted again, once. The user gets an
//! alias that shares the version counter; the tensor kept here is never handed out.

mod batch;
mod device;
mod host;
mod stored;
mod trust;

use crate::cuda;
use crate::error::{Error, Result};
use crate::kernels::flexmatch::Counts;
use crate::ops::in_host_memory;
use crate::torch::input::Input;
use crate::torch::{Without, aliased, beside, bump_version, held, pages, version};
use batch::Batch;
pub use stored::Stored;
use tch::{Device, Kind, Tensor};
use trust::Trust;

/// The class, for messages.
pub const CLASS: &str = "DynamicThresholdingModule";

/// How often each value occurs, where `net_outputs` lives.
enum Tally {
    Host(Counts),
    /// `counts[c + 1]`, int64, on the device; `counts[0]` is that of -1.
    Device(Tensor),
}

/// The labels of all samples, and their counts.
pub struct FlexMatch {
    net_outputs: Tensor,
    /// The alias that was handed out, while somebody may hold it: what is assigned to its `.data` becomes the labels.
    handed: Option<Tensor>,
    /// Replaced tensors that Python may have seen: see [`FlexMatch::retired`].
    retired: Vec<Tensor>,
    stored: Stored,
    classes: usize,
    samples: usize,
    /// Whether counts are kept on the host; the labels are there too then.
    on_host: bool,
    tally: Option<Tally>,
    /// Counts over more samples than these, and the number of those samples: the status is computed from them if set.
    totals: Option<(Tally, usize)>,
    /// The version of `net_outputs` that the tally belongs to.
    version: i64,
    trust: Trust,
}

/// Copies a batch to the CPU. Waits for its device.
pub fn on_host(batch: [Tensor; 3]) -> Result<[Tensor; 3]> {
    let [idxes, mask, labels] = batch;
    let here = |t: Tensor| t.f_to_device(Device::Cpu);
    Ok([here(idxes)?, here(mask)?, here(labels)?])
}

impl FlexMatch {
    /// No sample has a label yet.
    pub fn new(
        classes: usize,
        net_outputs: Tensor,
        counts_on_device: Option<bool>,
    ) -> Result<Self> {
        let net_outputs = ordinary(net_outputs)?;
        // The counts shall be ordinary as well.
        let _guard = Without::inference();
        let input = Input::new(CLASS, "net_outputs", &net_outputs)?;
        let samples = input.vector()?;
        if input.is_meta() {
            return Err(Error::Value(format!(
                "{CLASS}: device must hold values, got meta"
            )));
        }
        let stored = Stored::of(&input)?;
        stored.holds(classes)?;
        let on_host = !counts_on_device.unwrap_or(!in_host_memory(&input) || cuda::emulated());
        // Counted from the start on a device as well, in memory that stays: the first step may be captured into a
        // graph.
        let tally = if on_host {
            Tally::Host(Counts::unlabelled(samples, classes))
        } else {
            Tally::Device(device::count(&net_outputs, classes)?)
        };
        let version = version(&net_outputs);
        Ok(Self {
            // Another tensor than the one for which Python may have an object.
            net_outputs: net_outputs.f_detach()?,
            handed: None,
            retired: Vec::new(),
            stored,
            classes,
            samples,
            on_host,
            tally: Some(tally),
            totals: None,
            version,
            trust: Trust::unshared(),
        })
    }

    /// The labels, to be read or written by the caller, who holds the GIL.
    pub fn net_outputs(&mut self) -> Result<Tensor> {
        self.adopt()?;
        self.trust.shared_now();
        let handed = match self.handed.take() {
            Some(handed) => handed,
            None => self.net_outputs.f_detach()?,
        };
        Ok(self.handed.insert(handed).shallow_clone())
    }

    /// The tensors that were replaced since the last call. The caller drops them after releasing its lock on the
    /// state: dropping them may wait for the GIL.
    pub fn retired(&mut self) -> Vec<Tensor> {
        std::mem::take(&mut self.retired)
    }

    /// Replaces the kept labels by `labels`, and retires the old ones and their alias.
    fn replace(&mut self, labels: Tensor) {
        let before = std::mem::replace(&mut self.net_outputs, labels);
        self.retired
            .extend([Some(before), self.handed.take()].into_iter().flatten());
    }

    /// Adopts what was assigned to the `.data` of the alias that was handed out, or to the alias by `set_`, and
    /// retires an alias that nobody holds. To be called before [`Self::look`]; what is [`Self::retired`] must be
    /// dropped in between, because it is an alias as well.
    pub fn adopt(&mut self) -> Result<()> {
        let Some(handed) = self.handed.take() else {
            return Ok(());
        };
        let here = |t: &Tensor| -> Result<_> {
            let facts = Input::new(CLASS, "net_outputs", t)?;
            Ok((facts.data(), facts.shape().to_vec(), facts.scalar_type()))
        };
        let taken = if here(&handed)? == here(&self.net_outputs)? {
            Ok(())
        } else {
            self.set_net_outputs(&handed)
        };
        // If what was assigned had to be copied, or was refused, the tensor handed out is no longer an alias.
        if held(&handed) && here(&handed)? == here(&self.net_outputs)? {
            self.handed = Some(handed);
        } else {
            self.retired.push(handed);
        }
        taken
    }

    /// Takes `labels` as the new `net_outputs`. On the same device it is adopted, not copied.
    pub fn set_net_outputs(&mut self, labels: &Tensor) -> Result<()> {
        let input = Input::new(CLASS, "net_outputs", labels)?;
        input.of_type(self.stored.scalar_type())?;
        self.check_shape(&input)?;
        let mut moved = beside(&labels.f_detach()?, self.stored.kind(), &self.net_outputs)?;
        let input = Input::new(CLASS, "net_outputs", &moved)?;
        if self.on_host {
            moved = input.in_memory()?;
            host::count(&moved, self.stored, self.classes)?;
        } else {
            moved = input.in_its_memory()?;
        }
        self.replace(ordinary(moved)?);
        self.trust.shared_now();
        Ok(())
    }

    /// Makes a copy of `labels`, of any of the stored types, the new `net_outputs`. May wait for the
    /// device.
    pub fn load(&mut self, labels: &Tensor) -> Result<()> {
        let input = Input::new(CLASS, "net_outputs", labels)?;
        let from = Stored::of(&input)?;
        self.check_shape(&input)?;
        // Counted in the type they come in: narrowed, an invalid number might turn into a class.
        let here = labels.f_detach()?.f_to_device(Device::Cpu)?;
        let here = Input::new(CLASS, "net_outputs", &here)?.in_memory()?;
        let counts = host::count(&here, from, self.classes)?;
        let copy = copied(&here, &self.net_outputs)?;
        self.version = version(&copy);
        self.replace(copy);
        if self.on_host {
            self.tally = Some(Tally::Host(counts));
            self.trust = Trust::unshared();
        } else {
            // To be counted on the device, where the counts are.
            self.trust = Trust::uncounted();
        }
        Ok(())
    }

    fn check_shape(&self, labels: &Input<'_>) -> Result<()> {
        if labels.shape() == [self.samples as i64] {
            return Ok(());
        }
        Err(labels.wrong(&format!(
            "have shape (n_unlabeled_samples,) = [{}]",
            self.samples
        )))
    }

    /// The status of the class of each label, float32, in the shape of `labels`. `warmup` says whether the samples
    /// without a label count as a class.
    pub fn status(&mut self, labels: &Tensor, warmup: bool) -> Result<Tensor> {
        let input = Input::new(CLASS, "pseudo_labels", labels)?;
        input.integer()?;
        input.same_device(&Input::new(CLASS, "net_outputs", &self.net_outputs)?)?;
        let (classes, samples) = (self.classes, self.samples);
        let (tally, samples) = match &self.totals {
            Some((totals, all)) => (totals, *all),
            None => (&*self.tally()?, samples),
        };
        match tally {
            Tally::Host(counts) => host::status(counts, &input, classes, warmup),
            Tally::Device(counts) => device::status(counts, labels, samples, warmup),
        }
    }

    /// From now on the status is computed from these counts (`counts[c + 1]`, int64, on the CPU), which
    /// cover more than the labels here, and not from our own.
    pub fn set_totals(&mut self, counts: &Tensor) -> Result<()> {
        let input = Input::new(CLASS, "totals", counts)?;
        input.int64()?;
        if input.shape() != [self.classes as i64 + 1] {
            return Err(input.wrong(&format!(
                "have shape (num_classes + 1,) = [{}]",
                self.classes + 1
            )));
        }
        let raw = input.integers()?;
        let all = raw.iter().sum::<i64>() as usize;
        let totals = if self.on_host {
            Tally::Host(Counts::from_raw(raw))
        } else {
            Tally::Device(beside(counts, Kind::Int64, &self.net_outputs)?)
        };
        self.totals = Some((totals, all));
        Ok(())
    }

    /// Whether [`FlexMatch::status`] does not depend on the labels here.
    pub fn has_totals(&self) -> bool {
        self.totals.is_some()
    }

    /// `net_outputs[idxes[mask == 1]] = labels[mask == 1]`; of equal indices the last one wins.
    pub fn update(&mut self, idxes: &Tensor, mask: &Tensor, labels: &Tensor) -> Result<()> {
        let batch = Batch::new(idxes, mask, labels, &self.net_outputs)?;
        let (samples, classes) = (self.samples, self.classes);
        self.write(
            || batch.read(samples, classes),
            |counts, outputs| device::update(counts, outputs, idxes, mask, labels),
        )
    }

    /// Whether [`FlexMatch::update`] would take such tensors, whatever their values are.
    pub fn check(&self, idxes: &Tensor, mask: &Tensor, labels: &Tensor) -> Result<()> {
        Batch::new(idxes, mask, labels, &self.net_outputs).map(|_| ())
    }

    /// What [`FlexMatch::update`] would write, checked, in one int64 for each selected sample:
    /// `index (classes + 1) + label + 1`. Nothing is written. The batch must be [`on_host`].
    pub fn pack(&self, idxes: &Tensor, mask: &Tensor, labels: &Tensor) -> Result<Tensor> {
        let batch = Batch::new(idxes, mask, labels, idxes)?;
        batch.read(self.samples, self.classes)?.pack(self.classes)
    }

    /// Writes what [`FlexMatch::pack`] made, here or elsewhere, in order: of equal indices the last
    /// one wins.
    pub fn apply(&mut self, words: &Tensor) -> Result<()> {
        let input = Input::new(CLASS, "words", words)?;
        input.integer()?;
        input.vector()?;
        let (samples, classes) = (self.samples, self.classes);
        let pairs = host::Pairs::unpack(&input, samples, classes)?;
        self.write(
            || Ok(pairs),
            |counts, outputs| {
                let width = classes as i64 + 1;
                let words = beside(words, Kind::Int64, outputs)?;
                let idxes = words.f_divide_scalar_mode(width, "floor")?;
                let labels = words.f_remainder(width)?.f_sub_scalar(1)?;
                device::update(counts, outputs, &idxes, &idxes.f_ones_like()?, &labels)
            },
        )
    }

    /// Writes a batch into the labels and the counts, whichever of the two ways they are kept.
    fn write(
        &mut self,
        on_host: impl FnOnce() -> Result<host::Pairs>,
        on_device: impl FnOnce(&Tensor, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let (outputs, stored) = (self.net_outputs.shallow_clone(), self.stored);
        let changed = match self.tally()? {
            Tally::Host(counts) => on_host()?.apply(counts, &outputs, stored)?,
            Tally::Device(counts) => {
                on_device(counts, &outputs)?;
                true
            }
        };
        if changed {
            bump_version(&self.net_outputs);
        }
        self.version = version(&self.net_outputs);
        Ok(())
    }

    /// Counts per class, preceded by that of -1, int64.
    pub fn counts(&mut self) -> Result<Tensor> {
        match self.tally()? {
            Tally::Host(counts) => Ok(Tensor::f_from_slice(counts.raw())?),
            Tally::Device(counts) => Ok(counts.f_detach_copy()?),
        }
    }

    /// Checks whether others can reach the labels. To be called at the start of every step, with the GIL.
    pub fn look(&mut self) {
        self.trust.looked(aliased(&self.net_outputs));
    }

    /// Whether others could reach them at the last look.
    pub fn is_shared(&self) -> bool {
        self.trust.is_shared()
    }

    /// Whether the next step has to count all samples again: once after each look while an alias is held.
    pub fn is_stale(&self) -> bool {
        self.tally.is_none() || self.trust.is_lost() || version(&self.net_outputs) != self.version
    }

    /// Counts all samples, if that is needed.
    pub fn refresh(&mut self) -> Result<()> {
        self.tally().map(|_| ())
    }

    fn tally(&mut self) -> Result<&mut Tally> {
        if self.is_stale() {
            // Invalid until the count succeeds.
            let before = self.tally.take();
            let fresh = if self.on_host {
                Tally::Host(host::count(&self.net_outputs, self.stored, self.classes)?)
            } else {
                let fresh = device::count(&self.net_outputs, self.classes)?;
                Tally::Device(in_place_of(before, fresh)?)
            };
            self.tally = Some(fresh);
            self.version = version(&self.net_outputs);
            self.trust.counted();
        }
        self.tally
            .as_mut()
            .ok_or_else(|| Error::Value(format!("{CLASS}: no counts")))
    }
}

/// `labels`, or a copy where they are an inference tensor, which nobody could write outside inference mode.
fn ordinary(labels: Tensor) -> Result<Tensor> {
    if labels.f_is_inference()? {
        return copied(&labels, &labels);
    }
    Ok(labels)
}

/// A copy of `labels`, of the type and on the device of `like`, in memory that may be written in any mode.
fn copied(labels: &Tensor, like: &Tensor) -> Result<Tensor> {
    let _guard = Without::inference();
    let mut copy = like.f_empty_like()?;
    pages::ask_for_large(&copy);
    copy.f_copy_(labels)?;
    Ok(copy)
}

/// Copies `fresh` into the memory of the previous counts, if there were any: the counts keep their memory as
/// long as the labels do, for captured graphs that read both.
fn in_place_of(before: Option<Tally>, fresh: Tensor) -> Result<Tensor> {
    let Some(Tally::Device(mut counts)) = before else {
        return Ok(fresh);
    };
    counts.f_copy_(&fresh)?;
    Ok(counts)
}
