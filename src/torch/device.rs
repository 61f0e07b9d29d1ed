//! What torch decides about a CUDA device: the current stream, how memory is copied there, and where its
//! libraries are.

use super::check;
use crate::error::Result;
use std::ffi::{CStr, OsStr, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use tch::Tensor;
use torch_sys::C_tensor;

unsafe extern "C" {
    fn tllib_cuda_stream(index: i64, stream: *mut *mut c_void) -> *mut c_char;
    fn tllib_allows_tf32() -> bool;
    fn tllib_upload(from: *const C_tensor, index: i64, to: *mut *mut C_tensor) -> *mut c_char;
    fn tllib_libc10() -> *const c_char;
}

/// torch's current stream on `cuda:<index>`, as a `CUstream`.
pub fn cuda_stream(index: usize) -> Result<*mut c_void> {
    let mut stream = std::ptr::null_mut();
    // SAFETY: it writes one pointer.
    check(unsafe { tllib_cuda_stream(index as i64, &raw mut stream) })?;
    Ok(stream)
}

/// Whether products of float32 matrices on CUDA devices may be computed in TF32, which keeps 10 bits of a
/// factor's fraction.
pub fn allows_tf32() -> bool {
    // SAFETY: it reads torch's settings.
    unsafe { tllib_allows_tf32() }
}

/// A copy of a CPU tensor on `cuda:<index>`, made asynchronously on the current stream.
pub fn upload(from: &Tensor, index: usize) -> Result<Tensor> {
    let mut to = std::ptr::null_mut();
    // SAFETY: a live tensor; it writes one pointer.
    check(unsafe { tllib_upload(from.as_ptr(), index as i64, &raw mut to) })?;
    // SAFETY: no failure was reported, so it is a tensor of ours.
    Ok(unsafe { Tensor::from_ptr(to) })
}

/// The folder of torch's shared libraries.
pub fn library_folder() -> Option<PathBuf> {
    // SAFETY: null, or the loader's own text, which lasts as long as the library is loaded.
    let path = unsafe {
        let path = tllib_libc10();
        if path.is_null() {
            return None;
        }
        CStr::from_ptr(path)
    };
    Path::new(OsStr::from_bytes(path.to_bytes()))
        .parent()
        .map(Path::to_owned)
}
