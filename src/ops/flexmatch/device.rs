//! FlexMatch's steps on a device, by its kernels or else in libtorch operations. Neither ever waits: no step
//! reads a value on the host. Range checks are the device's own.
//!
//! The counts are updated in place: a replay of a captured graph continues from those of the last one.

use crate::cuda;
use crate::error::Result;
use crate::ops::counting;
use tch::{Device, Kind, Tensor};

/// Labels that are widened to indices at a time, so that counting needs no second copy of all labels.
const CHUNK: i64 = 1 << 24;
/// Sorts after every sample, and is exact in f64.
const NOBODY: i64 = 1 << 62;

/// `counts[c + 1]` of all samples.
pub fn count(net_outputs: &Tensor, classes: usize) -> Result<Tensor> {
    let mut counts = counting(classes as i64 + 1, net_outputs)?.f_zeros_like()?;
    for chunk in net_outputs.f_split(CHUNK, 0)? {
        let places = chunk.f_to_kind(Kind::Int64)?.f_add_scalar(1)?;
        counts = counts.f_scatter_add(0, &places, &places.f_ones_like()?)?;
    }
    Ok(counts)
}

/// The status of each label's class.
pub fn status(counts: &Tensor, labels: &Tensor, samples: usize, warmup: bool) -> Result<Tensor> {
    if let Some(status) = cuda::flexmatch::status(counts, labels, samples, warmup)? {
        return Ok(status);
    }
    let classes = counts.f_narrow(0, 1, counts.size1()? - 1)?;
    let all = counts.f_max()?;
    let largest = if warmup {
        all.shallow_clone()
    } else {
        classes.f_max()?
    };
    let quotient = classes
        .f_to_kind(Kind::Double)?
        .f_div(&largest.f_to_kind(Kind::Double)?)?;
    let status = quotient
        .f_masked_fill(&all.f_eq(samples as i64)?, 0.0)?
        .f_to_kind(Kind::Float)?;
    Ok(status.f_index(&[Some(labels)])?)
}

/// Writes the selected labels into `outputs` and updates `counts` to match, in place. Of equal indices the last
/// selected one wins and is counted once.
pub fn update(
    counts: &Tensor,
    outputs: &Tensor,
    idxes: &Tensor,
    mask: &Tensor,
    labels: &Tensor,
) -> Result<()> {
    if idxes.size1()? == 0 || cuda::flexmatch::update(counts, outputs, idxes, mask, labels)? {
        return Ok(());
    }
    sort_and_write(counts, outputs, idxes, mask, labels)
}

/// A stable sort puts equal indices side by side in batch order; the last of each run is the winner. The changes
/// by the winners are added, and the others add 0, so that the order of the device's writes does not matter.
fn sort_and_write(
    counts: &Tensor,
    outputs: &Tensor,
    idxes: &Tensor,
    mask: &Tensor,
    labels: &Tensor,
) -> Result<()> {
    let samples = outputs.size1()?;
    let idxes = idxes.f_to_kind(Kind::Int64)?;
    let wrapped = idxes.f_add(&idxes.f_lt(0)?.f_mul_scalar(samples)?)?;
    // Rows that are not selected sort after every sample.
    let keys = wrapped.f_masked_fill(&mask.f_ne(1)?, NOBODY)?;
    let (keys, order) = keys.f_sort_stable(true, 0, false)?;
    // A winner differs from the next key, so it is never a row that is not selected.
    let next = keys
        .f_narrow(0, 1, keys.size1()? - 1)?
        .f_pad([0, 1], "constant", NOBODY as f64)?;
    let winner = keys.f_ne_tensor(&next)?.f_to_kind(Kind::Int64)?;
    // The indices and labels of the others are not used: they may be no sample and no class.
    let idxes = keys.f_mul(&winner)?;
    let old = outputs.f_index_select(0, &idxes)?.f_to_kind(Kind::Int64)?;
    let labels = labels.f_to_kind(Kind::Int64)?.f_index_select(0, &order)?;
    let change = labels.f_sub(&old)?.f_mul(&winner)?;
    let places = Tensor::f_cat(&[&old, &old.f_add(&change)?], 0)?.f_add_scalar(1)?;
    if !matches!(outputs.device(), Device::Cuda(_)) {
        // Raises for a label that is no class before anything is written. On CUDA nothing works after it anyway.
        let _ = counts.f_index_select(0, &places)?;
    }
    let added = change.f_to_kind(outputs.f_kind()?)?;
    let _ = outputs.shallow_clone().f_scatter_add_(0, &idxes, &added)?;
    let moved = Tensor::f_cat(&[&winner.f_neg()?, &winner], 0)?;
    let _ = counts.shallow_clone().f_scatter_add_(0, &places, &moved)?;
    Ok(())
}
