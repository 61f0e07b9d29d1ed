//! Where the keys of a batch go in the queue, from labels on the host or on a device.

use super::CLASS;
use crate::error::Result;
use crate::kernels::element::Element;
use crate::kernels::self_tuning::{enqueue, exchange};
use crate::ops::{counting, threads};
use crate::torch::input::Input;
use crate::torch::{Owned, Stored, bump_version, by_dtype, no_grad};
use tch::{Kind, Tensor};

/// Elements that are read in order in the time in which one is exchanged, alone in its cache line.
const WEIGHT: usize = 16;

/// Where the keys of a batch go.
pub struct Plan {
    /// Rows of the batch, int64.
    pub rows: Tensor,
    /// Columns of the queue for those rows, int64. Where a column occurs twice, so does its row.
    pub columns: Tensor,
    /// The pointers afterwards.
    pub pointers: Tensor,
}

impl Plan {
    /// From labels and pointers that are in range.
    pub fn on_host(labels: &[usize], mut pointers: Vec<i64>, keys: usize) -> Result<Self> {
        let places = enqueue(labels, &mut pointers, keys);
        let tensor = |values: Vec<i64>| Tensor::f_from_slice(&values);
        Ok(Self {
            rows: tensor(places.iter().map(|p| p.row as i64).collect())?,
            columns: tensor(places.iter().map(|p| p.column as i64).collect())?,
            pointers: tensor(pointers)?,
        })
    }

    /// In libtorch operations that never wait for the device. `labels` are int64.
    ///
    /// Sorted by class, the members of a class are adjacent in the order of the batch, so a row's
    /// turn is its distance from the first. A key that a later one replaces takes the column *and*
    /// the value of the last one there, so that the order of the device's writes does not matter.
    pub fn on_device(labels: &Tensor, pointers: &Tensor, keys: i64) -> Result<Self> {
        let zeros = pointers.f_zeros_like()?;
        let totals = zeros.f_scatter_add(0, labels, &labels.f_ones_like()?)?;
        let starts = totals.f_cumsum(0, Kind::Int64)?.f_sub(&totals)?;
        let (sorted, order) = labels.f_sort_stable(true, 0, false)?;
        let start = starts.f_index_select(0, &sorted)?;
        let turn = counting(labels.size1()?, labels)?.f_sub(&start)?;
        let behind = totals
            .f_index_select(0, &sorted)?
            .f_sub_scalar(1)?
            .f_sub(&turn)?;
        let laps = behind.f_floor_divide_scalar(keys)?;
        let last = turn.f_add(&laps.f_mul_scalar(keys)?)?;
        let at = pointers
            .f_index_select(0, &sorted)?
            .f_add(&turn)?
            .f_remainder(keys)?;
        Ok(Self {
            rows: order.f_index_select(0, &start.f_add(&last)?)?,
            columns: sorted.f_mul_scalar(keys)?.f_add(&at)?,
            pointers: pointers.f_add(&totals)?.f_remainder(keys)?,
        })
    }

    /// Writes `keys` (minibatch, D) into `queue` (D, N) and moves the pointers.
    pub fn apply(&self, keys: &Tensor, queue: &Tensor, pointers: &Tensor) -> Result<()> {
        no_grad(|| {
            let columns = self.entering(keys, queue)?.f_tr()?;
            let _ = queue
                .shallow_clone()
                .f_index_copy_(1, &self.columns, &columns)?;
            self.advance(pointers)
        })
    }

    /// The same, and returns what was in the columns, one row for each. The plan is one from the host.
    pub fn exchange(&self, keys: &Tensor, queue: &Tensor, pointers: &Tensor) -> Result<Tensor> {
        no_grad(|| {
            let place = Input::new(CLASS, "queue_list", queue)?;
            if !(place.on_cpu() && place.contiguous()) {
                let replaced = queue.f_index_select(1, &self.columns)?.f_tr()?;
                self.apply(keys, queue, pointers)?;
                return Ok(replaced);
            }
            let entering = self.entering(keys, queue)?.f_contiguous()?;
            if entering.numel() == 0 {
                return Ok(entering);
            }
            let columns = Input::new(CLASS, "columns", &self.columns)?.integers()?;
            let columns: Vec<_> = columns.into_iter().map(|column| column as usize).collect();
            let replaced =
                by_dtype!(place.floating()?, E => exchanged::<E>(&place, &entering, &columns)?);
            bump_version(queue);
            self.advance(pointers)?;
            Ok(replaced)
        })
    }

    /// The keys that stay, in the type of the queue.
    fn entering(&self, keys: &Tensor, queue: &Tensor) -> Result<Tensor> {
        let keys = keys.f_detach()?.f_index_select(0, &self.rows)?;
        Ok(keys.f_to_kind(queue.f_kind()?)?)
    }

    fn advance(&self, pointers: &Tensor) -> Result<()> {
        pointers.shallow_clone().f_copy_(&self.pointers)?;
        Ok(())
    }
}

/// Puts the `entering` keys, which are contiguous, into their columns of a contiguous queue.
fn exchanged<E: Element + Stored>(
    queue: &Input<'_>,
    entering: &Tensor,
    columns: &[usize],
) -> Result<Tensor> {
    let keys = Input::new(CLASS, "h_k", entering)?;
    let keys = keys.whole::<E>()?;
    let mut replaced = Owned::<E>::new(&entering.size())?;
    let width = queue.shape()[1] as usize;
    let work = threads(WEIGHT * keys.len());
    // SAFETY: a contiguous tensor of this type on the CPU, whose memory no other tensor here has: `entering` was just
    // made. As in any operation that writes a tensor, whoever calls sees to it that nobody else uses it meanwhile.
    let places = unsafe { std::slice::from_raw_parts_mut(queue.data().cast::<E>(), queue.numel()) };
    exchange(places, width, keys, columns, replaced.slice(), work);
    Ok(replaced.into_tensor())
}
