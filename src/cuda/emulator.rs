//! Kernels on the CPU. The tests compile the same sources with a C++ compiler and a stand-in for what a
//! device has (tests/cuda), and name the library in `TLLIB_RS_CUDA_EMULATOR`: CPU tensors are then treated
//! as CUDA tensors, launches included.

use super::compile::element;
use super::device::Launch;
use super::failed;
use super::modules::kernel_name;
use crate::error::Result;
use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_void};
use std::sync::OnceLock;

/// `launch(kernel, grid, block, args)`, which returns 0 if there is such a kernel.
type Call = unsafe extern "C" fn(*const c_char, u32, u32, *mut c_void) -> c_int;

/// The loaded library.
pub struct Emulator(Call);

impl Emulator {
    /// The one that the environment names, if any.
    pub fn loaded() -> Result<Option<&'static Self>> {
        static LOADED: OnceLock<std::result::Result<Option<Emulator>, String>> = OnceLock::new();
        let loaded = LOADED.get_or_init(|| {
            std::env::var_os("TLLIB_RS_CUDA_EMULATOR")
                .filter(|path| !path.is_empty())
                .map(|path| Self::open(&path))
                .transpose()
        });
        loaded
            .as_ref()
            .map(Option::as_ref)
            .map_err(|text| failed(text))
    }

    fn open(path: &OsStr) -> std::result::Result<Self, String> {
        const LAUNCH: &CStr = c"tllib_emulated_launch";
        let missing = || format!("the emulator {} cannot be loaded", path.display());
        let name = CString::new(path.as_encoded_bytes()).map_err(|_| missing())?;
        // SAFETY: whoever set the variable vouches for the library. It stays loaded.
        let launch = unsafe {
            let library = libc::dlopen(name.as_ptr(), libc::RTLD_NOW);
            if library.is_null() {
                return Err(missing());
            }
            libc::dlsym(library, LAUNCH.as_ptr())
        };
        if launch.is_null() {
            return Err(missing());
        }
        // SAFETY: the library's function has this type.
        Ok(Self(unsafe {
            std::mem::transmute::<*mut c_void, Call>(launch)
        }))
    }

    /// Runs a kernel, and returns when it is done.
    ///
    /// # Safety
    /// As for [`super::device::Stream::launch`].
    pub unsafe fn launch(&self, launch: &Launch, args: *mut c_void) -> Result<()> {
        let kernel = kernel_name(launch.kernel);
        let name = format!("{}/{}/{kernel}", launch.stem, element(launch.dtype));
        let text = CString::new(name.clone()).map_err(|_| failed("a kernel's name has a NUL"))?;
        // SAFETY: per contract.
        match unsafe { (self.0)(text.as_ptr(), launch.grid, launch.block, args) } {
            0 => Ok(()),
            _ => Err(failed(&format!("the emulator has no kernel {name}"))),
        }
    }
}
