//! Where the keys of a batch go in the queue, from labels on the host or on a device.

use crate::error::Result;
use crate::kernels::self_tuning::enqueue;
use crate::ops::counting;
use crate::torch::no_grad;
use tch::{Kind, Tensor};

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
            let keys = keys.f_detach()?.f_index_select(0, &self.rows)?;
            let columns = keys.f_to_kind(queue.f_kind()?)?.f_tr()?;
            let (mut queue, mut target) = (queue.shallow_clone(), pointers.shallow_clone());
            let _ = queue.f_index_copy_(1, &self.columns, &columns)?;
            target.f_copy_(&self.pointers)?;
            Ok(())
        })
    }
}
