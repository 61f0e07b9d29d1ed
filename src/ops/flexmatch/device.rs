//! FlexMatch's steps on a device, by its kernels or else in libtorch operations. Neither ever waits: no step
//! looks at a value on the host. Range checks are the device's own.
//!
//! The counts are updated in place: a captured graph goes on from those of its last replay.

use crate::cuda;
use crate::error::Result;
use tch::{Kind, Tensor};

/// Labels that are widened to indices at a time: the count needs no second copy of all labels.
const CHUNK: i64 = 1 << 24;

/// `counts[c + 1]` of all samples.
pub fn count(net_outputs: &Tensor, classes: usize) -> Result<Tensor> {
    let mut counts = Tensor::f_zeros([classes as i64 + 1], (Kind::Int64, net_outputs.device()))?;
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

/// Writes the selected labels into `outputs` and keeps `counts` true, in place. Of equal indices the last
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

/// A stable sort puts equal indices side by side in batch order; the last of each run is the winner, and
/// every member of the batch, selected or not, writes its run's winner (or the old value), so that the
/// order of the device's writes does not matter.
fn sort_and_write(
    counts: &Tensor,
    outputs: &Tensor,
    idxes: &Tensor,
    mask: &Tensor,
    labels: &Tensor,
) -> Result<()> {
    let (samples, batch) = (outputs.size1()?, idxes.size1()?);
    let labels = labels.f_to_kind(Kind::Int64)?;
    let idxes = idxes.f_to_kind(Kind::Int64)?;
    let wrapped = idxes
        .f_lt(0)?
        .f_to_kind(Kind::Int64)?
        .f_mul_scalar(samples)?;
    let unselected = mask.f_ne(1)?;
    // The indices of unselected rows are not looked at: they may be of no sample.
    let idxes = idxes.f_add(&wrapped)?.f_masked_fill(&unselected, 0)?;
    // Such rows sort behind every sample.
    let (keys, order) = idxes
        .f_masked_fill(&unselected, samples)?
        .f_sort_stable(true, 0, false)?;
    let sorted = labels.f_index_select(0, &order)?;
    // The end of each row's run of selected equal indices, if it has one.
    let end = idxes
        .f_searchsorted(&keys, false, true, "right", None::<Tensor>)?
        .f_sub_scalar(1)?;
    let end = end.f_clamp_min(0)?;
    let found = keys.f_index_select(0, &end)?.f_eq_tensor(&idxes)?;
    let old = outputs.f_index_select(0, &idxes)?.f_to_kind(Kind::Int64)?;
    let new = sorted.f_index_select(0, &end)?.f_where_self(&found, &old)?;
    // A row is its run's winner where the run ends at the row itself.
    let winner = order
        .f_index_select(0, &end)?
        .f_eq_tensor(&Tensor::f_arange(batch, (Kind::Int64, idxes.device()))?)?;
    let winner = winner
        .f_logical_and(&unselected.f_logical_not()?)?
        .f_to_kind(Kind::Int64)?;
    let stored = new.f_to_kind(outputs.f_kind()?)?;
    let _ = outputs.shallow_clone().f_index_copy_(0, &idxes, &stored)?;
    let mut counts = counts.shallow_clone();
    let _ = counts.f_scatter_add_(0, &old.f_add_scalar(1)?, &winner.f_neg()?)?;
    let _ = counts.f_scatter_add_(0, &new.f_add_scalar(1)?, &winner)?;
    Ok(())
}
