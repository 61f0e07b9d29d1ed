//! FlexMatch's steps where `net_outputs` is in host memory: `O(B)` a step.

use super::stored::by_label;
use super::{CLASS, Stored};
use crate::error::{Error, Result};
use crate::kernels::element::Element;
use crate::kernels::flexmatch::Counts;
use crate::kernels::parallel::threads_for;
use crate::torch::input::Input;
use crate::torch::{Owned, by_dtype, max_threads};
use std::ffi::c_void;
use tch::Tensor;

/// Labels that one thread counts in the time that makes another thread worth starting.
const GRAIN: usize = 1 << 18;

/// The memory of `net_outputs`, which FlexMatch keeps contiguous and of one dimension. An error if somebody made its
/// storage too small.
fn memory(net_outputs: &Tensor) -> Result<(*mut c_void, usize)> {
    let input = Input::new(CLASS, "net_outputs", net_outputs)?;
    Ok((net_outputs.data_ptr(), input.numel()))
}

/// Counts all samples, of the type `stored`. `IndexError` for a label that is neither a class nor -1.
pub fn count(net_outputs: &Tensor, stored: Stored, classes: usize) -> Result<Counts> {
    let (data, len) = memory(net_outputs)?;
    // Each thread also has a table of all classes to fill and to add up.
    let threads = threads_for(len, GRAIN.max(classes), max_threads());
    by_label!(stored, L => {
        // SAFETY: `len` live elements of type `L`. A user thread that writes them meanwhile races
        // with torch's own readers in the same way.
        let labels = unsafe { std::slice::from_raw_parts(data.cast::<L>().cast_const(), len) };
        Counts::of(labels, classes, threads)
    })
    .map_err(|stray| {
        Error::Index(format!(
            "{CLASS}: net_outputs must hold -1 or classes below {classes}, got {} at position {}",
            stray.value, stray.position
        ))
    })
}

/// The status of each label's class. Negative labels count from the end, as torch's indices do.
pub fn status(counts: &Counts, labels: &Input<'_>, classes: usize, warmup: bool) -> Result<Tensor> {
    let values = labels.integers()?;
    let largest = counts.largest(warmup);
    let mut out = Owned::<f32>::new(labels.shape())?;
    for (o, &label) in out.slice().iter_mut().zip(&values) {
        let class = wrap(label, classes)
            .ok_or_else(|| out_of_range("pseudo_labels", label, -(classes as i64), classes))?;
        *o = counts.status(class, largest);
    }
    Ok(out.into_tensor())
}

/// The selected samples of a step, checked.
pub struct Pairs(Vec<(usize, i64)>);

impl Pairs {
    /// Reads the selected (index, label) pairs. `IndexError` where one is out of range; indices may
    /// be negative as torch's may, labels may be -1.
    pub fn read(
        idxes: &Input<'_>,
        mask: &Input<'_>,
        labels: &Input<'_>,
        samples: usize,
        classes: usize,
    ) -> Result<Self> {
        let (idxes, labels) = (idxes.integers()?, labels.integers()?);
        let mut pairs = Vec::with_capacity(idxes.len());
        for ((index, label), selected) in idxes.into_iter().zip(labels).zip(selected(mask)?) {
            if !selected {
                continue;
            }
            let at = wrap(index, samples)
                .ok_or_else(|| out_of_range("idxes", index, -(samples as i64), samples))?;
            if label < -1 || label >= classes as i64 {
                return Err(out_of_range("pseudo_labels", label, -1, classes));
            }
            pairs.push((at, label));
        }
        Ok(Self(pairs))
    }

    /// One number for each pair, `index (classes + 1) + label + 1`.
    pub fn pack(&self, classes: usize) -> Result<Tensor> {
        let mut words = Owned::<i64>::new(&[self.0.len() as i64])?;
        for (word, &(index, label)) in words.slice().iter_mut().zip(&self.0) {
            *word = index as i64 * (classes as i64 + 1) + label + 1;
        }
        Ok(words.into_tensor())
    }

    /// The inverse of [`Pairs::pack`], checked again: the words come from elsewhere.
    pub fn unpack(words: &Input<'_>, samples: usize, classes: usize) -> Result<Self> {
        let width = classes as u64 + 1;
        let pair = |word: i64| {
            let (index, place) = (word as u64 / width, word as u64 % width);
            if index < samples as u64 {
                return Ok((index as usize, place as i64 - 1));
            }
            Err(out_of_range("a received index", index as i64, 0, samples))
        };
        words
            .integers()?
            .into_iter()
            .map(pair)
            .collect::<Result<_>>()
            .map(Self)
    }

    /// Writes the labels, stored as `stored`, and updates `counts` to match. Returns whether anything was written.
    pub fn apply(self, counts: &mut Counts, net_outputs: &Tensor, stored: Stored) -> Result<bool> {
        let (data, len) = memory(net_outputs)?;
        by_label!(stored, L => {
            // SAFETY: `len` live elements of type `L`, and the state's lock excludes our own other
            // threads. A user thread that writes an alias meanwhile races with torch's own writers in
            // the same way.
            let outputs = unsafe { std::slice::from_raw_parts_mut(data.cast::<L>(), len) };
            counts.relabel_all(outputs, &self.0);
        });
        Ok(!self.0.is_empty())
    }
}

fn wrap(index: i64, len: usize) -> Option<usize> {
    let index = if index < 0 {
        index.checked_add(len as i64)?
    } else {
        index
    };
    usize::try_from(index).ok().filter(|&i| i < len)
}

fn out_of_range(name: &str, value: i64, low: i64, above: usize) -> Error {
    Error::Index(format!(
        "{CLASS}: {name} must be in [{low}, {}], got {value}",
        above as i64 - 1
    ))
}

/// `mask == 1`, for masks of any numeric dtype.
fn selected(mask: &Input<'_>) -> Result<Vec<bool>> {
    let Some(dtype) = mask.dtype() else {
        return Ok(mask.integers()?.into_iter().map(|v| v == 1).collect());
    };
    let contiguous = mask.in_memory()?;
    let len = mask.numel();
    if len == 0 {
        return Ok(Vec::new());
    }
    let data = contiguous.data_ptr();
    by_dtype!(dtype, E => {
        // SAFETY: contiguous, of type `E` with `len` elements, alive during the loop.
        let values = unsafe { std::slice::from_raw_parts(data.cast::<E>().cast_const(), len) };
        #[allow(clippy::float_cmp, reason = "tllib compares with 1")]
        Ok(values.iter().map(|v| v.load() == 1.0).collect())
    })
}
