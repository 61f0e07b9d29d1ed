//! How a kernel over rows, or over columns, is launched.

use super::device::{Launch, Stream};
use crate::error::Result;
use crate::torch::Dtype;

/// The forms of `ROW_KERNEL` in common.cuh, by the columns that they hold.
pub static ROWS: [Form; 7] = [
    Form::new(128, "128", 256, 8),
    Form::new(256, "256", 128, 4),
    Form::new(512, "512", 128, 4),
    Form::new(1024, "1024", 128, 4),
    Form::new(2048, "2048", 128, 1),
    Form::new(HELD, "4096", 128, 1),
    Form::new(usize::MAX, "any", 1024, 1),
];

/// Those of `FEW_ROWS_KERNEL`.
pub static FEW_ROWS: [Form; 4] = [
    Form::new(128, "128", 256, 8),
    Form::new(1024, "1024", 128, 1),
    Form::new(HELD, "4096", 512, 1),
    Form::new(usize::MAX, "any", 1024, 1),
];

/// Columns up to which the threads of a row hold it in registers.
const HELD: usize = 4096;

/// Threads of a warp, and columns that it has in a kernel over columns.
pub const WARP: usize = 32;
/// Terms of a column's sum for each warp: with fewer, a warp costs more than it saves.
const TERMS: usize = 4;
/// Threads of device capacity for each block over columns, which limits the number of blocks.
const THREADS_OF_COLUMNS: usize = 256;

/// A form of a kernel over rows.
pub struct Form {
    columns: usize,
    suffix: &'static str,
    /// Threads of a block.
    threads: u32,
    /// Rows that a block has at a time.
    together: usize,
}

impl Form {
    const fn new(columns: usize, suffix: &'static str, threads: u32, together: usize) -> Self {
        Self {
            columns,
            suffix,
            threads,
            together,
        }
    }
}

/// Whether the threads of a row of so many columns hold it in registers.
pub fn holds(cols: usize) -> bool {
    cols <= HELD
}

/// The launch of a kernel of `<stem>.cu` that has these `forms`, for `rows` rows of `cols` columns.
pub fn over_rows(
    stream: &Stream,
    (stem, kernel): (&'static str, &'static str),
    forms: &'static [Form],
    dtype: Dtype,
    (rows, cols): (usize, usize),
) -> Result<Launch> {
    let wide = &forms[forms.len() - 1];
    let form = forms
        .iter()
        .find(|form| cols <= form.columns)
        .unwrap_or(wide);
    let launch = Launch::of(stem, dtype, (kernel, form.suffix), form.threads);
    stream.sized(launch, rows.div_ceil(form.together))
}

/// The launch of a kernel of `<stem>.cu` that sums `terms` numbers in each of `cols` columns: blocks of as many
/// warps as pay, which share the terms of `WARP` columns at a time (`across_warps` in common.cuh).
pub fn over_columns(
    stream: &Stream,
    (stem, kernel): (&'static str, &'static str),
    dtype: Dtype,
    (terms, cols): (usize, usize),
) -> Launch {
    let warps = terms.div_ceil(TERMS).clamp(1, 32);
    // With many columns of few terms, gathering the sums of another block takes longer than it saves.
    let most = stream.threads_at_once() as usize / THREADS_OF_COLUMNS;
    Launch {
        stem,
        dtype,
        kernel: (kernel, ""),
        grid: cols.div_ceil(WARP).clamp(1, most) as u32,
        block: (WARP * warps) as u32,
    }
}
