//! Launch of `mean_teacher.cu`, and the tables on the device that say what it averages.

use super::args::{self, kernel_dtype};
use super::device::{Launch, Stream};
use crate::error::Result;
use crate::torch::Dtype;
use crate::torch::facts::Facts;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};
use tch::{Device, Tensor};

const THREADS: u32 = 256;
/// Chunks for each block that the device holds at once, if the model is large: several, so that uneven chunks
/// balance out.
const TURNS: usize = 4;
/// The length of a chunk is a multiple of this, so that chunks are aligned as their tensor is and give each
/// thread 16 bytes of float16.
const UNIT: usize = 8 * THREADS as usize;
/// Maximum number of cached tables that may be evicted.
const LOOSE: usize = 8;

/// One parameter: `len` elements each of the teacher's and of the student's memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    teacher: *mut c_void,
    student: *mut c_void,
    len: usize,
    dtypes: [i32; 2],
}

// SAFETY: addresses, which are only compared and copied here.
unsafe impl Send for Pair {}

impl Pair {
    /// Of two dense tensors of one layout and device, `None` where a dtype has no kernel.
    pub fn new(teacher: &Facts, student: &Facts) -> Option<Self> {
        Some(Self {
            teacher: teacher.data(),
            student: student.data(),
            len: teacher.numel(),
            dtypes: [
                args::code(kernel_dtype(teacher)?),
                args::code(kernel_dtype(student)?),
            ],
        })
    }
}

#[repr(C)]
struct Args {
    chunks: *const c_void,
    keep: f32,
    take: f32,
}

// SAFETY: the fields of `MeanTeacher` in mean_teacher.cu.
unsafe impl args::Args for Args {}

/// `t <- alpha t + (1 - alpha) s` over pairs that are all on `device`, in one launch.
///
/// # Safety
/// The tensors of all pairs are alive and on `device`, and a teacher shares memory with no other tensor
/// of this call, except its student, if the two are one tensor.
pub unsafe fn blend_all(device: Device, pairs: &[Pair], alpha: f64) -> Result<()> {
    let stream = Stream::current(device)?;
    let (chunks, count) = table(&stream, pairs)?;
    if count == 0 {
        return Ok(());
    }
    let args = Args {
        chunks: chunks.data_ptr(),
        keep: alpha as f32,
        take: (1.0 - alpha) as f32,
    };
    let launch = Launch {
        stem: "mean_teacher",
        dtype: Dtype::F32,
        kernel: ("mean_teacher", ""),
        grid: count as u32,
        block: THREADS,
    };
    // SAFETY: the table has `count` chunks within the pairs; the rest is the caller's.
    unsafe { stream.launch(launch, &args) }
}

/// What the kernel reads, made once and used until a parameter moves.
///
/// The same pairs are the same memory: a caller that averages it on another stream has to make that stream
/// wait for the last average anyway, and with it for the table. But the table must not be freed to the stream
/// that it was made on while another stream, or a captured graph, may still read it.
struct Table {
    pairs: Vec<Pair>,
    chunks: Tensor,
    count: usize,
    stream: (i64, usize),
    /// Whether it is never freed.
    kept: bool,
}

/// The chunks of these pairs, in memory of the stream's device, and how many there are.
fn table(stream: &Stream, pairs: &[Pair]) -> Result<(Tensor, usize)> {
    static TABLES: Mutex<Vec<Table>> = Mutex::new(Vec::new());
    let (here, capturing) = (stream.key(), stream.capture().is_some());
    let mut tables = TABLES.lock().unwrap_or_else(PoisonError::into_inner);
    let known = |table: &Table| table.stream.0 == here.0 && table.pairs == pairs;
    if let Some(place) = tables.iter().position(known) {
        // Moved to the end: the least recently used tables are at the front.
        let mut table = tables.remove(place);
        table.kept |= capturing || table.stream != here;
        let found = (table.chunks.shallow_clone(), table.count);
        tables.push(table);
        return Ok(found);
    }
    let words = words(pairs, stream.blocks(usize::MAX, THREADS) as usize);
    let (chunks, count) = (stream.upload(&words)?, words.len() / WORDS);
    // A captured table is only filled when its graph is replayed: nothing else may read it before.
    if !capturing {
        let loose = tables.iter().filter(|table| !table.kept).count();
        if let Some(oldest) = tables.iter().position(|table| !table.kept)
            && loose >= LOOSE
        {
            tables.remove(oldest);
        }
        tables.push(Table {
            pairs: pairs.to_vec(),
            chunks: chunks.shallow_clone(),
            count,
            stream: here,
            kept: stream.of_each_thread(),
        });
    }
    Ok((chunks, count))
}

/// The size of `Chunk` in `mean_teacher.cu`.
const WORDS: usize = 3;

/// The chunks, as the kernel reads them. There are at most `TURNS` for each of `blocks` blocks, plus one for
/// each pair, whatever the sizes.
fn words(pairs: &[Pair], blocks: usize) -> Vec<i64> {
    let total: usize = pairs.iter().map(|pair| pair.len).sum();
    let length = total.div_ceil(TURNS * blocks).next_multiple_of(UNIT);
    // A chunk's length has 31 bits.
    let length = length.clamp(UNIT, 1 << 30);
    let mut words = Vec::with_capacity(WORDS * (pairs.len() + TURNS * blocks));
    for pair in pairs {
        let [teacher, student] = pair.dtypes;
        let dtypes = i64::from(teacher) << 32 | i64::from(student) << 48;
        for start in (0..pair.len).step_by(length) {
            words.extend([
                pair.teacher as i64 + (start * width(teacher)) as i64,
                pair.student as i64 + (start * width(student)) as i64,
                length.min(pair.len - start) as i64 | dtypes,
            ]);
        }
    }
    words
}

/// Bytes of an element, by [`args::code`].
fn width(code: i32) -> usize {
    if code == args::code(Dtype::F32) { 4 } else { 2 }
}
