//! A device and torch's current stream on it: memory from torch's allocator, launches.

use super::args::Args;
use super::driver::{Context, Handle};
use super::emulator::Emulator;
use super::modules;
use crate::error::Result;
use crate::torch::Dtype;
use crate::torch::autograd::StoredGrad;
use crate::torch::device::{cuda_stream, upload};
use crate::torch::input::Input;
use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::sync::{Mutex, PoisonError};
use tch::{Device, Kind, Tensor};

/// The driver's handle of the per-thread default stream.
const CU_STREAM_PER_THREAD: usize = 2;

/// Threads that an emulated device holds at once: a few blocks, so that sums over a grid are tested.
const EMULATED: u32 = 4 * 1024;

/// Where kernels are launched.
pub struct Stream {
    device: Device,
    runs_on: RunsOn,
    /// The graph that launches are captured into, if any.
    capture: Option<u64>,
}

#[derive(Clone, Copy)]
enum RunsOn {
    Device {
        context: &'static Context,
        stream: Handle,
    },
    /// Kernels that were compiled for the CPU, for the tests.
    Emulator(&'static Emulator),
}

/// One kernel launch, without the arguments.
#[derive(Clone, Copy)]
pub struct Launch {
    /// The method: `src/cuda/<stem>.cu`.
    pub stem: &'static str,
    /// The `ELEMENT` that the source is compiled for.
    pub dtype: Dtype,
    /// The kernel, and the suffix of its name.
    pub kernel: (&'static str, &'static str),
    /// Blocks.
    pub grid: u32,
    /// Threads of a block.
    pub block: u32,
}

impl Launch {
    /// One block.
    pub fn of(
        stem: &'static str,
        dtype: Dtype,
        kernel: (&'static str, &'static str),
        block: u32,
    ) -> Self {
        Self {
            stem,
            dtype,
            kernel,
            grid: 1,
            block,
        }
    }
}

/// A counter of blocks; see [`Stream::counter`].
pub enum Counter {
    /// Of a stream: never freed.
    Shared(Handle),
    /// Of one launch, to be kept until the launch is made.
    Own(Tensor),
}

impl Counter {
    /// Its address on the device.
    pub fn place(&self) -> *mut c_void {
        match self {
            Self::Shared(memory) => memory.0,
            Self::Own(tensor) => tensor.data_ptr(),
        }
    }
}

impl Stream {
    /// torch's current stream on `device`.
    pub fn current(device: Device) -> Result<Self> {
        let (runs_on, capture) = match (Emulator::loaded()?, device) {
            (Some(emulator), _) => (RunsOn::Emulator(emulator), None),
            (None, Device::Cuda(index)) => {
                let (context, stream) = (Context::of(index)?, Handle(cuda_stream(index)?));
                context.check_default(stream)?;
                (RunsOn::Device { context, stream }, context.capture(stream)?)
            }
            (None, device) => {
                return Err(super::failed(&format!("{device:?} runs no kernels")));
            }
        };
        Ok(Self {
            device,
            runs_on,
            capture,
        })
    }

    /// Memory of this device, its contents arbitrary.
    pub fn empty(&self, shape: &[i64], kind: Kind) -> Result<Tensor> {
        Ok(Tensor::f_empty(shape, (kind, self.device))?)
    }

    /// Memory for the gradient with respect to `input`, where it wants one: contiguous.
    pub fn gradient(&self, input: &Input<'_>, dtype: Dtype) -> Result<Option<Tensor>> {
        input
            .wants_grad()
            .then(|| self.empty(input.shape(), dtype.kind()))
            .transpose()
    }

    /// Memory for [`StoredGrad::chosen`] of a gradient of `rows` rows, if the gradient is large.
    pub fn chosen(&self, grad: Option<&Tensor>, rows: usize) -> Result<Option<Tensor>> {
        grad.filter(|grad| self.outgrown_by(grad.numel()))
            .map(|_| self.empty(&[rows as i64], Kind::Uint8))
            .transpose()
    }

    /// A gradient that a launch on this stream wrote, times `scale`.
    pub fn stored(&self, grad: Option<Tensor>, scale: f64) -> Option<StoredGrad> {
        grad.map(|tensor| StoredGrad {
            capture: self.capture,
            ..StoredGrad::new(tensor, scale)
        })
    }

    /// A counter of blocks that is 0, and will be again when the launch that uses it has run.
    ///
    /// Launches on one stream are ordered and share a counter. A captured launch gets its own, zeroed in the graph:
    /// the graph may be replayed on any stream. So does a launch on the per-thread default stream, whose one handle
    /// stands for a different stream in each thread.
    pub fn counter(&self) -> Result<Counter> {
        static COUNTERS: Mutex<Option<HashMap<(i64, usize), Handle>>> = Mutex::new(None);
        let locked = || COUNTERS.lock().unwrap_or_else(PoisonError::into_inner);
        if self.capture.is_some() || self.of_each_thread() {
            return Ok(Counter::Own(self.zero()?));
        }
        let key = self.key();
        if let Some(&counter) = locked().as_ref().and_then(|counters| counters.get(&key)) {
            return Ok(Counter::Shared(counter));
        }
        let made = match self.runs_on {
            // Not from torch's allocator, which may be allocating from a graph's pool (torch.compile runs a
            // model once in the memory that it will be captured in): nothing from there may be kept.
            RunsOn::Device { context, stream } => match context.zero(stream) {
                Ok(memory) => memory,
                // torch's allocator may have reserved all memory, and can still allocate from it.
                Err(_) => return Ok(Counter::Own(self.zero()?)),
            },
            RunsOn::Emulator(_) => Handle(ManuallyDrop::new(self.zero()?).data_ptr()),
        };
        // Another thread may have made one meanwhile: no lock is held while memory is allocated.
        let mut counters = locked();
        let counter = counters.get_or_insert_default().entry(key).or_insert(made);
        Ok(Counter::Shared(*counter))
    }

    fn zero(&self) -> Result<Tensor> {
        Ok(Tensor::f_zeros([1], (Kind::Int, self.device))?)
    }

    /// What distinguishes it from other streams: the device, and the handle of the stream.
    pub fn key(&self) -> (i64, usize) {
        match self.runs_on {
            RunsOn::Device { context, stream } => (i64::from(context.ordinal()), stream.0 as usize),
            RunsOn::Emulator(_) => (-1, 0),
        }
    }

    /// Whether it is the per-thread default stream: a different one in each thread, under one handle.
    pub fn of_each_thread(&self) -> bool {
        self.key().1 == CU_STREAM_PER_THREAD
    }

    /// The graph that launches are captured into, if any.
    pub fn capture(&self) -> Option<u64> {
        self.capture
    }

    /// A copy of `words` in memory of this device, made in stream order, without synchronizing. In a captured
    /// graph it is made anew whenever the graph is replayed.
    pub fn upload(&self, words: &[i64]) -> Result<Tensor> {
        let here = Tensor::f_from_slice(words)?;
        match self.device {
            Device::Cuda(index) => upload(&here, index),
            _ => Ok(here),
        }
    }

    /// How many threads the device holds at once, of kernels that use few enough registers.
    pub fn threads_at_once(&self) -> u32 {
        match self.runs_on {
            RunsOn::Device { context, .. } => context.threads_at_once(),
            RunsOn::Emulator(_) => EMULATED,
        }
    }

    /// The launch with a block for each piece of `work`, at most as many as the device holds of this kernel at
    /// once, so that blocks are started, and their sums gathered, only once. At least one, so that a result over no
    /// rows is written too. All launches of the kernel must have the same block size.
    pub fn sized(&self, launch: Launch, work: usize) -> Result<Launch> {
        let most = match self.runs_on {
            RunsOn::Device { context, .. } => modules::function(context, &launch)?.resident,
            RunsOn::Emulator(_) => EMULATED / launch.block,
        };
        let grid = work.clamp(1, most.max(1) as usize) as u32;
        Ok(Launch { grid, ..launch })
    }

    /// Whether that many elements are more than the device's cache keeps from one launch to the next, so that not
    /// having to read them is worth the extra cost.
    pub fn outgrown_by(&self, elements: usize) -> bool {
        // An H200's cache has 50 MB, and it holds 270,336 threads at once.
        elements / 16 > self.threads_at_once() as usize
    }

    /// The number of blocks of `threads` threads that have `work` pieces of work, one for each: at least one, and at
    /// most as many as [`Self::threads_at_once`] allows.
    pub fn blocks(&self, work: usize, threads: u32) -> u32 {
        work.clamp(1, (self.threads_at_once() / threads).max(1) as usize) as u32
    }

    /// Launches a kernel, which runs in stream order.
    ///
    /// # Safety
    /// `args` are those of the kernel, and its pointers are to memory of this device that is as large as
    /// the kernel assumes, and that torch's allocator does not reuse before the work already on this
    /// stream, the launch included, is done: memory of a tensor that is alive now.
    pub unsafe fn launch<A: Args>(&self, launch: Launch, args: &A) -> Result<()> {
        let pointer = std::ptr::from_ref(args).cast_mut().cast::<c_void>();
        match self.runs_on {
            RunsOn::Device { context, stream } => {
                let function = modules::function(context, &launch)?.handle;
                // SAFETY: the function is one of a module that is never unloaded; the rest is the caller's.
                unsafe { context.launch(function, launch.grid, launch.block, stream, pointer) }
            }
            // SAFETY: as above, and CPU tensors are memory of this "device".
            RunsOn::Emulator(emulator) => unsafe { emulator.launch(&launch, pointer) },
        }
    }
}
