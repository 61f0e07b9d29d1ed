//! What tch does not offer: tensor facts in one call, the autograd node of the fused losses, version
//! counters, and torch's threads. The C++ halves are `bridge.cpp`, `node.cpp`, `device.cpp`, `unpack.cpp`
//! (what needs torch's Python headers) and `team.cpp`.

pub mod autograd;
pub mod device;
mod dtype;
pub mod facts;
pub mod input;
mod owned;
pub mod pages;
pub mod product;
pub mod saved;
pub mod team;

use crate::error::{Error, Result};
pub(crate) use dtype::by_dtype;
pub use dtype::{Dtype, ScalarType, Stored};
use facts::Borrowed;
pub use owned::{Owned, scalar, vector};
use std::ffi::{CStr, c_char, c_void};
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

unsafe extern "C" {
    fn tllib_default_dtype() -> ScalarType;
    fn tllib_composites_only() -> bool;
    fn tllib_torch_version() -> *const c_char;
    fn tllib_average(
        targets: *const *const C_tensor,
        sources: *const *const C_tensor,
        count: usize,
        keep: f64,
        take: f64,
    ) -> *mut c_char;
    fn tllib_bump_version(tensor: *const C_tensor);
    fn tllib_version(tensor: *const C_tensor) -> i64;
    fn tllib_aliased(tensor: *const C_tensor) -> bool;
    fn tllib_held(tensor: *const C_tensor) -> bool;
    fn tllib_same(a: *const C_tensor, b: *const C_tensor) -> bool;
    fn tllib_free(text: *mut c_char);
    fn tllib_without_autocast() -> *mut c_void;
    fn tllib_without_transforms() -> *mut c_void;
    fn tllib_without_inference() -> *mut c_void;
    fn tllib_drop_guard(guard: *mut c_void);
}

/// A failure reported by the bridge: null, or a message that is ours to free.
fn check(failure: *mut c_char) -> Result<()> {
    if failure.is_null() {
        return Ok(());
    }
    // SAFETY: the bridge returns null or a NUL-terminated string from malloc, owned by us.
    let text = unsafe { CStr::from_ptr(failure).to_string_lossy().into_owned() };
    // SAFETY: as above; it is not used after this.
    unsafe { tllib_free(failure) };
    Err(Error::Bridge(text))
}

/// Tells autograd that `tensor` was written.
pub fn bump_version(tensor: &Tensor) {
    // SAFETY: a `Tensor` always points to a live `at::Tensor`.
    unsafe { tllib_bump_version(tensor.as_ptr()) }
}

/// `target <- keep * target + take * source` for all pairs, in place and hidden from autograd, in two foreach
/// operations of torch. On a device these take few launches if all tensors have one dtype, and those of a pair
/// the same strides, without gaps.
pub fn average(targets: &[Borrowed], sources: &[Borrowed], keep: f64, take: f64) -> Result<()> {
    let count = targets.len().min(sources.len());
    // SAFETY: a `Borrowed` is a pointer to a live tensor, and there are at least `count` of each.
    check(unsafe {
        tllib_average(
            targets.as_ptr().cast(),
            sources.as_ptr().cast(),
            count,
            keep,
            take,
        )
    })
}

/// Whether `TLLIB_RS_COMPOSITE=1` asks for libtorch's operations in place of all kernels.
pub fn composites_only() -> bool {
    // SAFETY: it reads the environment once.
    unsafe { tllib_composites_only() }
}

/// The version of the torch that the C++ half was compiled against.
pub fn built_for() -> &'static str {
    // SAFETY: a constant text.
    unsafe { CStr::from_ptr(tllib_torch_version()) }
        .to_str()
        .unwrap_or("?")
}

/// How often `tensor` was written, as far as torch knows.
pub fn version(tensor: &Tensor) -> i64 {
    // SAFETY: as above.
    unsafe { tllib_version(tensor.as_ptr()) }
}

/// Whether anybody else can reach the memory of `tensor`: another tensor, a view, a numpy array, a
/// storage object. The caller holds the GIL.
pub fn aliased(tensor: &Tensor) -> bool {
    // SAFETY: as above.
    unsafe { tllib_aliased(tensor.as_ptr()) }
}

/// Whether both are one tensor, to autograd too.
pub fn same(a: &Tensor, b: &Tensor) -> bool {
    // SAFETY: as above.
    unsafe { tllib_same(a.as_ptr(), b.as_ptr()) }
}

/// Whether anybody but the caller, who has one reference, holds this very tensor. The caller holds the GIL.
pub fn held(tensor: &Tensor) -> bool {
    // SAFETY: as above.
    unsafe { tllib_held(tensor.as_ptr()) }
}

/// Runs `body` with grad mode off, and leaves it as it was even if `body` unwinds: tch's function of this name does
/// not.
pub fn no_grad<T>(body: impl FnOnce() -> T) -> T {
    let _guard = tch::no_grad_guard();
    body()
}

/// Excludes a layer of torch's dispatch, or a mode, from this thread's operations until it is dropped, on the same
/// thread (it is not `Send`).
pub struct Without {
    guard: *mut c_void,
}

impl Without {
    /// Excludes autocast.
    pub fn autocast() -> Self {
        // SAFETY: it takes no arguments; the guard is freed once, in `drop`.
        let guard = unsafe { tllib_without_autocast() };
        Self { guard }
    }

    /// Leaves inference mode: tensors that are allocated may be written anywhere. Operations are recorded for autograd.
    pub fn inference() -> Self {
        // SAFETY: as above.
        let guard = unsafe { tllib_without_inference() };
        Self { guard }
    }

    /// Excludes the transforms of `torch.func`. No operation accepts tensors that they wrapped then.
    pub fn transforms() -> Self {
        // SAFETY: as above.
        let guard = unsafe { tllib_without_transforms() };
        Self { guard }
    }
}

impl Drop for Without {
    fn drop(&mut self) {
        // SAFETY: the guard comes from this thread, and may be null.
        unsafe { tllib_drop_guard(self.guard) }
    }
}

/// Elements that are copied to page-locked memory so that nobody waits; torch keeps such memory.
const UPLOADED: usize = 1 << 17;

/// `tensor` as `kind` on the device of `like`, of whatever type: tch has names for a few device types, and takes all
/// others for MPS. A copy of at most [`UPLOADED`] elements from the CPU to a CUDA device does not block.
pub fn beside(tensor: &Tensor, kind: Kind, like: &Tensor) -> Result<Tensor> {
    if let (Device::Cpu, Device::Cuda(index)) = (tensor.device(), like.device())
        && tensor.numel() <= UPLOADED
    {
        return device::upload(&tensor.f_to_kind(kind)?, index);
    }
    if let known @ (Device::Cpu | Device::Cuda(_)) = like.device() {
        return Ok(tensor.f_to_device_(known, kind, false, false)?);
    }
    let nothing = like.f_reshape([-1])?.f_narrow(0, 0, 0)?;
    Ok(tensor.f_type_as(&nothing.f_to_kind(kind)?)?)
}

/// `tensor` detached, as `kind` and contiguous; it shares the memory of `tensor` if that needs no copy.
pub fn dense(tensor: &Tensor, kind: Kind) -> Result<Tensor> {
    Ok(tensor.f_detach()?.f_to_kind(kind)?.f_contiguous()?)
}

/// `torch.get_num_threads()`, the most threads that a kernel may use.
pub fn max_threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1)
}
