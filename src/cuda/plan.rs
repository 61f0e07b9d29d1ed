//! How a kernel over rows, or over columns, is launched.

use super::device::{Launch, Stream};
use crate::torch::Dtype;

/// The forms that `ROW_KERNEL` in common.cuh makes of a kernel, by the columns that they hold.
const FORMS: [Form; 4] = [
    Form {
        columns: 128,
        suffix: "128",
        threads: 256,
        together: 8,
    },
    Form {
        columns: 1024,
        suffix: "1024",
        threads: 128,
        together: 1,
    },
    Form {
        columns: 4096,
        suffix: "4096",
        threads: 512,
        together: 1,
    },
    Form {
        columns: usize::MAX,
        suffix: "any",
        threads: 1024,
        together: 1,
    },
];

/// Threads of a warp, which has as many columns in a kernel over columns.
pub const WARP: usize = 32;
/// Terms of a column's sum for each warp: fewer, and a warp costs more than it adds up.
const TERMS: usize = 4;

struct Form {
    columns: usize,
    suffix: &'static str,
    /// Threads of a block.
    threads: u32,
    /// Rows that a block has at a time.
    together: usize,
}

/// A launch over rows or columns.
pub struct Plan {
    /// What the kernel's name ends with.
    pub suffix: &'static str,
    /// Blocks. At least one, so that a loss of no rows is written too.
    pub grid: u32,
    /// Threads of a block.
    pub block: u32,
    /// Whether a row's threads hold it in registers.
    pub holds: bool,
}

impl Plan {
    /// The launch of `kernel`, as `ROW_KERNEL` or `KERNEL` calls it, in `<stem>.cu`.
    pub fn launch(&self, stem: &'static str, kernel: &'static str, dtype: Dtype) -> Launch {
        Launch {
            stem,
            dtype,
            kernel: (kernel, self.suffix),
            grid: self.grid,
            block: self.block,
        }
    }
}

/// For `rows` rows of `cols` columns: as many blocks as the device can hold at once, so that blocks are
/// started, and their sums gathered, once.
pub fn plan(stream: &Stream, rows: usize, cols: usize) -> Plan {
    let [warp, block, wide, any] = &FORMS;
    let form = [warp, block, wide]
        .into_iter()
        .find(|form| cols <= form.columns)
        .unwrap_or(any);
    Plan {
        suffix: form.suffix,
        grid: stream.blocks(rows.div_ceil(form.together), form.threads),
        block: form.threads,
        holds: form.columns < usize::MAX,
    }
}

/// For sums of `terms` numbers in each of `cols` columns: blocks of as many warps as pay, which share the
/// terms of `WARP` columns (`across_warps` in common.cuh).
pub fn plan_columns(cols: usize, terms: usize) -> Plan {
    let warps = terms.div_ceil(TERMS).clamp(1, 32);
    Plan {
        suffix: "",
        grid: cols.div_ceil(WARP).max(1) as u32,
        block: (WARP * warps) as u32,
        holds: false,
    }
}
