//! The CUDA driver, as far as kernels need it: a device's context, modules, launches. `cudarc` loads it
//! on first use; where there is none, no driver function is called.

use super::compile::Code;
use super::failed;
use crate::error::Result;
use cudarc::driver::sys::CUdevice_attribute as A;
use cudarc::driver::{result, sys};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::mem::MaybeUninit;
use std::sync::{Mutex, OnceLock, PoisonError};

/// A stream, function or module of the driver: an opaque pointer that any thread may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handle(pub *mut c_void);

// SAFETY: the driver's handles are not bound to a thread.
unsafe impl Send for Handle {}
// SAFETY: as above; the driver locks where it must.
unsafe impl Sync for Handle {}

/// The primary context of a device: the one that torch uses.
pub struct Context {
    ordinal: i32,
    device: sys::CUdevice,
    primary: Handle,
    capability: (i32, i32),
    multiprocessors: u32,
    threads_at_once: u32,
}

impl Context {
    /// Of the device that torch calls `cuda:<ordinal>`.
    pub fn of(ordinal: usize) -> Result<&'static Self> {
        static CONTEXTS: Mutex<Option<HashMap<usize, &'static Context>>> = Mutex::new(None);
        let mut contexts = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
        let contexts = contexts.get_or_insert_default();
        if let Some(context) = contexts.get(&ordinal) {
            return Ok(context);
        }
        let context: &'static Self = Box::leak(Box::new(Self::retain(ordinal as i32)?));
        contexts.insert(ordinal, context);
        Ok(context)
    }

    fn retain(ordinal: i32) -> Result<Self> {
        static PRESENT: OnceLock<bool> = OnceLock::new();
        // SAFETY: it tries to load a library, and no more.
        if !PRESENT.get_or_init(|| unsafe { sys::is_culib_present() }) {
            return Err(failed("the CUDA driver, libcuda, cannot be loaded"));
        }
        result::init().map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_STUB_LIBRARY => stub(),
            _ => reason(error),
        })?;
        // The first call may come while a graph is captured.
        let _relaxed = Relaxed::new()?;
        let device = result::device::get(ordinal).map_err(reason)?;
        // SAFETY: the driver returned the device just now. The context is never released.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(reason)?;
        let attribute = |which| {
            // SAFETY: as above.
            unsafe { result::device::get_attribute(device, which) }.map_err(reason)
        };
        let multiprocessors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let of_each = attribute(A::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR)? as u32;
        Ok(Self {
            ordinal,
            device,
            primary: Handle(context.cast()),
            capability: (
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors,
            threads_at_once: multiprocessors * of_each,
        })
    }

    /// As torch counts devices.
    pub fn ordinal(&self) -> i32 {
        self.ordinal
    }

    /// Compute capability: major, minor.
    pub fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// How many threads its multiprocessors hold together.
    pub fn threads_at_once(&self) -> u32 {
        self.threads_at_once
    }

    /// Runs `body` with this context current on the thread: torch's current device may be another, and a thread
    /// that has not used CUDA yet has no context.
    fn within<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        let current = current()?;
        if current == self.primary {
            return body();
        }
        let primary = self.primary.0.cast();
        if current.0.is_null() && self.ordinal == 0 {
            // To stay: the runtime makes it current as well when a thread first uses it, but cuBLAS warns if it comes
            // first.
            // SAFETY: the context is alive: it is never released.
            unsafe { sys::cuCtxSetCurrent(primary) }
                .result()
                .map_err(reason)?;
            return body();
        }
        // SAFETY: as above.
        unsafe { sys::cuCtxPushCurrent_v2(primary) }
            .result()
            .map_err(reason)?;
        let _pushed = Pushed;
        body()
    }

    /// The graph that launches on `stream` are captured into, if any.
    pub fn capture(&self, stream: Handle) -> Result<Option<u64>> {
        self.within(|| {
            // SAFETY: torch's stream of this device; its streams live as long as the process.
            let status = unsafe { result::stream::is_capturing(stream.0.cast()) };
            if status.map_err(reason)? == NOT_CAPTURING {
                return Ok(None);
            }
            graph_of(stream).map(Some)
        })
    }

    /// Refuses the default stream of a current context that is not the primary one, such as those that
    /// `torch.cuda.green_contexts` makes: it has no handle to distinguish it from this context's default stream, where
    /// launches would not be ordered after the work that they depend on.
    pub fn check_default(&self, stream: Handle) -> Result<()> {
        if !stream.0.is_null() {
            return Ok(());
        }
        let current = current()?;
        if current.0.is_null() || current == self.primary {
            return Ok(());
        }
        let mut device = 0;
        // SAFETY: it writes one number.
        unsafe { sys::cuCtxGetDevice(&raw mut device) }
            .result()
            .map_err(reason)?;
        if device != self.device {
            return Ok(());
        }
        Err(failed(&format!(
            "the current context is not the primary one of cuda:{} (a green context?): select a stream of it by \
             torch.cuda.stream",
            self.ordinal
        )))
    }

    /// How many blocks of `block` threads of `function` the device holds at once.
    pub fn resident(&self, function: Handle, block: u32) -> Result<u32> {
        let mut of_each = 0;
        self.beside_captures(|| {
            // SAFETY: a function of this context; it writes one number.
            unsafe {
                sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                    &raw mut of_each,
                    function.0.cast(),
                    block as i32,
                    0,
                )
            }
            .result()
            .map_err(reason)
        })?;
        Ok(of_each as u32 * self.multiprocessors)
    }

    /// [`Self::within`] for calls that do not become part of a graph, and are allowed during a capture only in
    /// relaxed mode.
    fn beside_captures<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        self.within(|| {
            let _relaxed = Relaxed::new()?;
            body()
        })
    }

    /// Loads compiled code, which stays loaded. `None` if it is invalid or not for this device and driver.
    pub fn load(&self, code: &Code) -> Result<Option<Handle>> {
        use sys::CUresult as R;
        self.beside_captures(|| {
            // SAFETY: a cubin, or PTX with a NUL at its end, as NVRTC made it.
            let module = unsafe { result::module::load_data(code.bytes().as_ptr().cast()) };
            match module {
                Ok(module) => Ok(Some(Handle(module.cast()))),
                Err(result::DriverError(
                    R::CUDA_ERROR_INVALID_IMAGE
                    | R::CUDA_ERROR_NO_BINARY_FOR_GPU
                    | R::CUDA_ERROR_INVALID_PTX
                    | R::CUDA_ERROR_INVALID_SOURCE
                    | R::CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
                )) => Ok(None),
                Err(error) => Err(reason(error)),
            }
        })
    }

    /// A kernel of a loaded module. The driver may load it lazily, in this call.
    pub fn function(&self, module: Handle, name: &str) -> Result<Handle> {
        let name = CString::new(name).map_err(|_| failed("a kernel's name has a NUL"))?;
        self.beside_captures(|| {
            // SAFETY: the module is loaded, and stays so.
            let function = unsafe { result::module::get_function(module.0.cast(), name) };
            Ok(Handle(function.map_err(reason)?.cast()))
        })
    }

    /// 4 bytes of device memory that are set to 0 in the order of `stream`, which must not be capturing, and are
    /// never freed.
    pub fn zero(&self, stream: Handle) -> Result<Handle> {
        const SIZE: usize = 4;
        self.beside_captures(|| {
            // SAFETY: the memory is as large as what is set, and the stream is one of this context.
            unsafe {
                let memory = result::malloc_sync(SIZE).map_err(reason)?;
                result::memset_d8_async(memory, 0, SIZE, stream.0.cast()).map_err(reason)?;
                Ok(Handle(memory as *mut c_void))
            }
        })
    }

    /// Launches `function` with the struct that `args` points to.
    ///
    /// # Safety
    /// As for [`super::device::Stream::launch`]; `function` is one of this context's modules.
    pub unsafe fn launch(
        &self,
        function: Handle,
        grid: u32,
        block: u32,
        stream: Handle,
        args: *mut c_void,
    ) -> Result<()> {
        self.within(|| {
            let (grid, block) = ((grid, 1, 1), (block, 1, 1));
            let stream = stream.0.cast();
            // SAFETY: per contract; the driver copies the arguments before it returns.
            unsafe { result::launch_kernel(function.0.cast(), grid, block, 0, stream, &mut [args]) }
                .map_err(reason)
        })
    }
}

const NOT_CAPTURING: sys::CUstreamCaptureStatus =
    sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;

/// The graph that `stream`, of the current context, is captured into.
fn graph_of(stream: Handle) -> Result<u64> {
    type Before12_3 = unsafe extern "C" fn(
        sys::CUstream,
        *mut sys::CUstreamCaptureStatus,
        *mut u64,
        *mut sys::CUgraph,
        *mut *const sys::CUgraphNode,
        *mut usize,
    ) -> sys::CUresult;
    let (mut status, mut graph) = (NOT_CAPTURING, 0);
    let nothing = std::ptr::null_mut;
    // SAFETY: the driver is loaded. The first is only looked up; the second has had this signature since CUDA 11.3.
    let (newer, older) = unsafe {
        let driver = sys::culib();
        (
            driver.get::<*mut c_void>(b"cuStreamGetCaptureInfo_v3\0"),
            driver.get::<Before12_3>(b"cuStreamGetCaptureInfo_v2\0"),
        )
    };
    // SAFETY: a stream of torch's, as in `Context::capture`; two numbers are written, and nothing to the places that
    // are null.
    let asked = unsafe {
        match (newer, older) {
            // cudarc binds only the newer one, and panics where a function is missing.
            (Err(_), Ok(function)) => function(
                stream.0.cast(),
                &raw mut status,
                &raw mut graph,
                nothing(),
                nothing().cast(),
                nothing().cast(),
            ),
            _ => sys::cuStreamGetCaptureInfo_v3(
                stream.0.cast(),
                &raw mut status,
                &raw mut graph,
                nothing(),
                nothing().cast(),
                nothing().cast(),
                nothing().cast(),
            ),
        }
    };
    asked.result().map_err(reason)?;
    Ok(graph)
}

/// The thread's current context; null if it has none.
fn current() -> Result<Handle> {
    let mut current = std::ptr::null_mut();
    // SAFETY: it writes one handle.
    unsafe { sys::cuCtxGetCurrent(&raw mut current) }
        .result()
        .map_err(reason)?;
    Ok(Handle(current.cast()))
}

/// A context that was pushed, and is popped on drop.
struct Pushed;

impl Drop for Pushed {
    fn drop(&mut self) {
        let mut popped = std::ptr::null_mut();
        // SAFETY: it pops what was pushed before. There is nothing to do about a failure.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&raw mut popped) };
    }
}

/// A thread that may do what captures forbid; it holds the thread's previous mode, restored on drop.
struct Relaxed(sys::CUstreamCaptureMode);

impl Relaxed {
    fn new() -> Result<Self> {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: it exchanges the thread's mode with `mode`.
        unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) }
            .result()
            .map_err(reason)?;
        Ok(Self(mode))
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        // SAFETY: as above. There is nothing to do about a failure.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut self.0) };
    }
}

/// What to do about the library of a toolkit that only serves to link programs: `cudarc` looks for `libcuda.so`, the
/// name that it has, before `libcuda.so.1`, which is the driver's.
fn stub() -> crate::error::Error {
    let mut info = MaybeUninit::<libc::Dl_info>::uninit();
    // SAFETY: the library is loaded, and has the function that was just called; the loader says of its address which
    // file it is from, by a text that lasts as long as the library is loaded.
    let file = unsafe {
        let init = sys::culib().get::<*mut c_void>(b"cuInit\0");
        let found = init.is_ok_and(|init| libc::dladdr(*init, info.as_mut_ptr()) != 0);
        found.then(|| CStr::from_ptr(info.assume_init().dli_fname).to_string_lossy())
    };
    failed(&format!(
        "{} is a toolkit's stub of the CUDA driver: take its folder out of LD_LIBRARY_PATH",
        file.as_deref().unwrap_or("libcuda.so")
    ))
}

fn reason(error: result::DriverError) -> crate::error::Error {
    let text = error.error_string().map_or_else(
        |_| format!("{:?}", error.0),
        |text| text.to_string_lossy().into_owned(),
    );
    failed(&text)
}
