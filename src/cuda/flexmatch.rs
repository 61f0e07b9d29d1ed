//! Launches of `flexmatch.cu`.

use super::args;
use super::device::{Launch, Stream};
use super::reaches;
use crate::error::Result;
use crate::torch::input::Input;
use crate::torch::{Dtype, ScalarType};
use std::ffi::c_void;
use tch::{Kind, Tensor};

/// `ROWS_EACH` rows for each thread of the one block.
const MOST_ROWS: usize = 4096;
/// The largest block.
const THREADS: usize = 1024;

/// A tensor of one dimension, of any type.
#[derive(Clone, Copy)]
#[repr(C)]
struct Entries {
    data: *const c_void,
    stride: i64,
    scalar_type: ScalarType,
}

impl Entries {
    fn of(input: &Input<'_>) -> Self {
        Self {
            data: input.data(),
            // Of a contiguous tensor all elements follow each other, whatever its dimensions.
            stride: match input.strides() {
                &[stride] => stride,
                _ => 1,
            },
            scalar_type: input.scalar_type(),
        }
    }
}

#[repr(C)]
struct StatusArgs {
    counts: *const c_void,
    classes: i32,
    warmup: i32,
    samples: i64,
    labels: Entries,
    length: i64,
    status: *mut c_void,
}

// SAFETY: the fields of `FlexmatchStatus` in flexmatch.cu.
unsafe impl args::Args for StatusArgs {}

#[repr(C)]
struct UpdateArgs {
    counts: *mut c_void,
    classes: i32,
    outputs_type: ScalarType,
    outputs: *mut c_void,
    samples: i64,
    idxes: Entries,
    mask: Entries,
    labels: Entries,
    batch: i32,
    slots: i32,
}

// SAFETY: the fields of `FlexmatchUpdate` in flexmatch.cu.
unsafe impl args::Args for UpdateArgs {}

fn launch(kernel: &'static str, grid: u32, block: usize) -> Launch {
    Launch {
        stem: "flexmatch",
        dtype: Dtype::F32,
        kernel: (kernel, ""),
        grid,
        block: block.next_multiple_of(32).clamp(32, THREADS) as u32,
    }
}

/// The status of the class of each label, float32. `counts` is contiguous, int64 and on the device of
/// `labels`. `None` where no kernel serves them.
pub fn status(
    counts: &Tensor,
    labels: &Tensor,
    samples: usize,
    warmup: bool,
) -> Result<Option<Tensor>> {
    let (tally, given) = (input(counts)?, input(labels)?);
    if ![&tally, &given].iter().all(|input| reaches(input)) {
        return Ok(None);
    }
    let in_order = given.contiguous() || given.shape().len() == 1;
    let plain = (!in_order).then(|| labels.f_contiguous()).transpose()?;
    let labels = plain.as_ref().map_or(Ok(given), input)?;
    let stream = Stream::current(labels.device())?;
    let (classes, length) = (tally.numel() - 1, labels.numel());
    let status = stream.empty(labels.shape(), Kind::Float)?;
    if length == 0 {
        return Ok(Some(status));
    }
    let args = StatusArgs {
        counts: tally.data(),
        classes: classes as i32,
        warmup: warmup.into(),
        samples: samples as i64,
        labels: Entries::of(&labels),
        length: length as i64,
        status: status.data_ptr(),
    };
    // Each block searches for the largest count: it should have enough labels to be worth that.
    let grid = stream.blocks(length.div_ceil(THREADS), THREADS as u32);
    // SAFETY: `status` is as large as `labels`; all tensors are of this device and alive.
    unsafe {
        stream.launch(launch("flexmatch_status", grid, length.max(classes)), &args)?;
    }
    Ok(Some(status))
}

/// Writes the selected labels into `outputs` and updates `counts` to match, in place. Both are contiguous;
/// the others are of one dimension and one length. False, and nothing done, where no kernel serves them.
pub fn update(
    counts: &Tensor,
    outputs: &Tensor,
    idxes: &Tensor,
    mask: &Tensor,
    labels: &Tensor,
) -> Result<bool> {
    let (tally, stored) = (input(counts)?, input(outputs)?);
    let (idxes, mask, labels) = (input(idxes)?, input(mask)?, input(labels)?);
    let batch = idxes.numel();
    let inputs = [&tally, &stored, &idxes, &mask, &labels];
    let served = inputs.iter().all(|input| reaches(input));
    if !served || batch > MOST_ROWS {
        return Ok(false);
    }
    let stream = Stream::current(idxes.device())?;
    let args = UpdateArgs {
        counts: tally.data(),
        classes: (tally.numel() - 1) as i32,
        outputs_type: stored.scalar_type(),
        outputs: stored.data(),
        samples: stored.numel() as i64,
        idxes: Entries::of(&idxes),
        mask: Entries::of(&mask),
        labels: Entries::of(&labels),
        batch: batch as i32,
        slots: (2 * batch).next_power_of_two() as i32,
    };
    // SAFETY: all tensors are of this device and alive, and the batch is one that a block can take.
    unsafe { stream.launch(launch("flexmatch_update", 1, batch), &args)? };
    Ok(true)
}

fn input(tensor: &Tensor) -> Result<Input<'_>> {
    Input::new("DynamicThresholdingModule", "a tensor", tensor)
}
