//! Launches of `mcc.cu`: one for a small batch, otherwise rows, columns and, where a gradient is wanted,
//! rows again.

use super::args::{self, Gathering, Matrix, Partials, Scalar};
use super::device::{Launch, Stream};
use super::plan::{FEW_ROWS, WARP, holds, over_columns, over_rows};
use super::{inverse, stored_scale};
use crate::error::Result;
use crate::kernels::mcc::ENTROPY_EPSILON;
use crate::torch::Dtype;
use crate::torch::autograd::StoredGrad;
use crate::torch::input::Input;
use std::ffi::c_void;
use tch::{Kind, Tensor};

const STEM: &str = "mcc";
/// Rows and columns up to which one block takes less time than two more launches.
const SMALL: (usize, usize) = (128, 128);
/// Maximum number of blocks that write column sums: with more, these could be as many as the logits.
const MOST_PARTS: u32 = 1024;

#[derive(Clone, Copy)]
#[repr(C)]
struct Args {
    logits: Matrix,
    rows: i64,
    cols: i32,
    parts: i32,
    inverse_t: f32,
    epsilon: f32,
    factor: f32,
    of_rows: *mut c_void,
    partials: *mut c_void,
    coefficients: *mut c_void,
    grad: *mut c_void,
    loss: Scalar,
    gathering: Gathering,
}

// SAFETY: the fields of `Mcc` in mcc.cu.
unsafe impl args::Args for Args {}

/// The loss in `out`, and the gradient where `logits` want one.
pub fn mcc(
    logits: &Input<'_>,
    dtype: Dtype,
    temperature: f64,
    out: Dtype,
) -> Result<(Tensor, Option<StoredGrad>)> {
    let (rows, cols) = logits.matrix()?;
    let stream = Stream::current(logits.device())?;
    // The bound is that of the CPU kernel.
    let scale = stored_scale(dtype, 4.0 / temperature);
    let grad = stream.gradient(logits, dtype)?;
    let loss = stream.empty(&[], out.kind())?;
    let args = Args {
        logits: Matrix::of(logits)?,
        rows: rows as i64,
        cols: cols as i32,
        parts: 0,
        inverse_t: inverse(temperature),
        epsilon: ENTROPY_EPSILON as f32,
        factor: (-scale / (cols as f64 * temperature)) as f32,
        of_rows: std::ptr::null_mut(),
        partials: std::ptr::null_mut(),
        coefficients: std::ptr::null_mut(),
        grad: args::pointer(grad.as_ref()),
        loss: Scalar::of(&loss, out),
        gathering: Gathering::NONE,
    };
    if rows <= SMALL.0 && cols <= SMALL.1 {
        in_one_block(&stream, dtype, args, (rows, cols))?;
    } else {
        in_turns(&stream, dtype, args, (rows, cols))?;
    }
    Ok((loss, stream.stored(grad, scale)))
}

fn in_one_block(
    stream: &Stream,
    dtype: Dtype,
    mut args: Args,
    (rows, cols): (usize, usize),
) -> Result<()> {
    let wanted = usize::from(!args.grad.is_null());
    let work = stream.empty(&[(wanted * (4 * rows + 2 * cols)) as i64], Kind::Float)?;
    if wanted > 0 {
        args.of_rows = work.data_ptr();
        args.coefficients = args::place::<f32>(&work, 4 * rows);
    }
    let launch = Launch {
        stem: STEM,
        dtype,
        kernel: ("mcc_small", ""),
        grid: 1,
        block: (WARP * rows.clamp(4, 32)) as u32,
    };
    // SAFETY: the logits are a matrix of this shape and dtype on this device, the gradient is as large, the
    // work has a place for each row and column, and all tensors are alive.
    unsafe { stream.launch(launch, &args) }
}

fn in_turns(
    stream: &Stream,
    dtype: Dtype,
    mut args: Args,
    (rows, cols): (usize, usize),
) -> Result<()> {
    let mut sweep = over_rows(stream, (STEM, "mcc_rows"), &FEW_ROWS, dtype, (rows, cols))?;
    let mut parts = 0;
    if holds(cols) {
        sweep.grid = sweep.grid.min(MOST_PARTS);
        parts = sweep.grid as usize;
    }
    let work = stream.empty(&[(4 * rows + 2 * cols * (parts + 1)) as i64], Kind::Float)?;
    let terms = if holds(cols) { parts } else { rows };
    let columns = over_columns(stream, (STEM, "mcc_columns"), dtype, (terms, cols));
    let partials = Partials::new(stream, columns.grid, 2)?;
    args.parts = parts as i32;
    // Where the blocks write column sums, only the gradient needs `of_rows`.
    if !holds(cols) || !args.grad.is_null() {
        args.of_rows = work.data_ptr();
    }
    args.coefficients = args::place::<f32>(&work, 4 * rows);
    args.partials = args::place::<f32>(&work, 4 * rows + 2 * cols);
    args.gathering = partials.args();
    // SAFETY: as above, and the work has a place for the sums of each block of the first launch.
    unsafe {
        stream.launch(sweep, &args)?;
        stream.launch(columns, &args)?;
        if !args.grad.is_null() && rows > 0 {
            let grad = over_rows(stream, (STEM, "mcc_grad"), &FEW_ROWS, dtype, (rows, cols))?;
            stream.launch(grad, &args)?;
        }
    }
    Ok(())
}
