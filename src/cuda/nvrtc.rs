//! NVRTC's functions, from the library that torch itself would call. `cudarc` would look it up by name, and find that
//! of a toolkit first, which may be newer than the driver.

use super::failed;
use crate::error::Result;
use crate::torch::device::library_folder;
use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::OnceLock;

/// `nvrtcProgram`
type Handle = *mut c_void;
/// `nvrtcResult`, a number: later versions have more of them.
type Status = c_int;
const SUCCESS: Status = 0;
const DOES_NOT_COMPILE: Status = 6;

/// The functions by name, with the types of their arguments and of what they return.
macro_rules! functions {
    ($($name:ident: $symbol:literal $arguments:tt -> $result:ty;)*) => {
        /// The library's functions, as NVIDIA documents them.
        pub struct Nvrtc {
            $($name: functions!(@type $arguments -> $result),)*
        }

        impl Nvrtc {
            /// `None` where one is missing.
            ///
            /// # Safety
            /// `library` is a handle of NVRTC, which is never closed.
            unsafe fn of(library: *mut c_void) -> Option<Self> {
                Some(Self {
                    $($name: {
                        // SAFETY: a handle and a text with a NUL.
                        let found = unsafe { libc::dlsym(library, $symbol.as_ptr()) };
                        if found.is_null() {
                            return None;
                        }
                        // SAFETY: a function of that name has this type in every version.
                        unsafe {
                            std::mem::transmute::<*mut c_void, functions!(@type $arguments -> $result)>(
                                found,
                            )
                        }
                    },)*
                })
            }
        }
    };
    (@type ($($argument:ty),*) -> $result:ty) => {
        unsafe extern "C" fn($($argument),*) -> $result
    };
}

functions! {
    error_string: c"nvrtcGetErrorString" (Status) -> *const c_char;
    version: c"nvrtcVersion" (*mut c_int, *mut c_int) -> Status;
    architecture_count: c"nvrtcGetNumSupportedArchs" (*mut c_int) -> Status;
    architectures: c"nvrtcGetSupportedArchs" (*mut c_int) -> Status;
    create: c"nvrtcCreateProgram" (
        *mut Handle, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char
    ) -> Status;
    compile: c"nvrtcCompileProgram" (Handle, c_int, *const *const c_char) -> Status;
    destroy: c"nvrtcDestroyProgram" (*mut Handle) -> Status;
    log_size: c"nvrtcGetProgramLogSize" (Handle, *mut usize) -> Status;
    log: c"nvrtcGetProgramLog" (Handle, *mut c_char) -> Status;
    cubin_size: c"nvrtcGetCUBINSize" (Handle, *mut usize) -> Status;
    cubin: c"nvrtcGetCUBIN" (Handle, *mut c_char) -> Status;
    ptx_size: c"nvrtcGetPTXSize" (Handle, *mut usize) -> Status;
    ptx: c"nvrtcGetPTX" (Handle, *mut c_char) -> Status;
}

type Size = unsafe extern "C" fn(Handle, *mut usize) -> Status;
type Bytes = unsafe extern "C" fn(Handle, *mut c_char) -> Status;

impl Nvrtc {
    /// Loaded once.
    pub fn get() -> Result<&'static Self> {
        static LOADED: OnceLock<Option<Nvrtc>> = OnceLock::new();
        let loaded = LOADED.get_or_init(|| candidates().iter().find_map(|path| open(path)));
        loaded.as_ref().ok_or_else(|| {
            failed(
                "NVRTC cannot be loaded; CUDA builds of torch bring it as a package of their own",
            )
        })
    }

    /// Major and minor.
    pub fn version(&self) -> Result<(i32, i32)> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: it writes two numbers.
        self.check(unsafe { (self.version)(&raw mut major, &raw mut minor) })?;
        Ok((major, minor))
    }

    /// The numbers of the architectures that it compiles for.
    pub fn architectures(&self) -> Result<Vec<c_int>> {
        let mut count = 0;
        // SAFETY: it writes one number.
        self.check(unsafe { (self.architecture_count)(&raw mut count) })?;
        let mut known = vec![0; count.max(0) as usize];
        // SAFETY: there is room for as many numbers as NVRTC said.
        self.check(unsafe { (self.architectures)(known.as_mut_ptr()) })?;
        Ok(known)
    }

    fn check(&self, result: Status) -> Result<()> {
        if result == SUCCESS {
            return Ok(());
        }
        // SAFETY: it returns the address of a constant string for any result.
        let text = unsafe { CStr::from_ptr((self.error_string)(result)) };
        Err(failed(&format!("NVRTC: {}", text.to_string_lossy())))
    }
}

/// A source that is compiled.
pub struct Program {
    nvrtc: &'static Nvrtc,
    handle: Handle,
}

impl Program {
    /// From the text of the file `name`.
    pub fn new(text: &str, name: &str) -> Result<Self> {
        let nvrtc = Nvrtc::get()?;
        let (text, name) = (terminated(text)?, terminated(name)?);
        let mut handle = std::ptr::null_mut();
        // SAFETY: texts that end with a NUL and are copied; no headers; it writes one handle.
        nvrtc.check(unsafe {
            (nvrtc.create)(
                &raw mut handle,
                text.as_ptr(),
                name.as_ptr(),
                0,
                std::ptr::null(),
                std::ptr::null(),
            )
        })?;
        Ok(Self { nvrtc, handle })
    }

    /// Whether it could be compiled; if not, [`Self::log`] says why.
    pub fn compile(&self, options: &[String]) -> Result<bool> {
        let options: Vec<_> = options
            .iter()
            .map(|option| terminated(option))
            .collect::<Result<_>>()?;
        let pointers: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: a program, and as many texts as are counted.
        let result = unsafe {
            (self.nvrtc.compile)(self.handle, pointers.len() as c_int, pointers.as_ptr())
        };
        if result == DOES_NOT_COMPILE {
            return Ok(false);
        }
        self.nvrtc.check(result)?;
        Ok(true)
    }

    /// What the compiler says.
    pub fn log(&self) -> Result<String> {
        let bytes = self.bytes(self.nvrtc.log_size, self.nvrtc.log)?;
        let text = String::from_utf8_lossy(&bytes);
        Ok(text.trim_end_matches('\0').trim().to_owned())
    }

    /// Compiled code for one architecture.
    pub fn cubin(&self) -> Result<Vec<u8>> {
        self.bytes(self.nvrtc.cubin_size, self.nvrtc.cubin)
    }

    /// What the driver compiles, with a NUL at the end.
    pub fn ptx(&self) -> Result<Vec<u8>> {
        self.bytes(self.nvrtc.ptx_size, self.nvrtc.ptx)
    }

    fn bytes(&self, size: Size, write: Bytes) -> Result<Vec<u8>> {
        let mut len = 0;
        // SAFETY: a program; it writes one number.
        let result = unsafe { size(self.handle, &raw mut len) };
        self.nvrtc.check(result)?;
        let mut bytes = vec![0u8; len];
        // SAFETY: there is room for as many bytes as NVRTC said.
        let result = unsafe { write(self.handle, bytes.as_mut_ptr().cast()) };
        self.nvrtc.check(result)?;
        Ok(bytes)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: it was created by NVRTC and is destroyed once. There is nothing to do about a failure.
        let _ = unsafe { (self.nvrtc.destroy)(&raw mut self.handle) };
    }
}

fn terminated(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| failed("a source has a NUL"))
}

/// What to open, the best first: where pip puts the NVRTC of CUDA 13 and of CUDA 12; the library that links torch to
/// its own, wherever that is; the system's. An NVRTC of a CUDA version other than torch's comes last: another package
/// may have installed it, and the driver may not accept its output.
fn candidates() -> Vec<CString> {
    let of_torch = [
        "../../nvidia/cu13/lib/libnvrtc.so.13",
        "../../nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
        "libcaffe2_nvrtc.so",
    ];
    let of_system = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
    let folder = library_folder();
    let beside = |file: &&str| folder.as_ref().map(|folder| folder.join(file));
    let mut paths: Vec<_> = of_torch
        .iter()
        .filter_map(beside)
        .filter(|path| path.exists())
        .chain(of_system.map(|name| Path::new(name).to_owned()))
        .collect();
    let foreign = torchs_cuda().map(|major| if major == 13 { ".so.12" } else { ".so.13" });
    paths.sort_by_key(|path| foreign.is_some_and(|end| path.to_string_lossy().ends_with(end)));
    paths
        .into_iter()
        .filter_map(|path| CString::new(OsStr::as_bytes(path.as_os_str())).ok())
        .collect()
}

/// The major version of the CUDA runtime that torch has loaded.
fn torchs_cuda() -> Option<u32> {
    let loaded = |name: &CStr| {
        // SAFETY: it loads nothing; a handle of what is loaded is never closed.
        let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
        !library.is_null()
    };
    let versions = [(c"libcudart.so.13", 13), (c"libcudart.so.12", 12)];
    versions
        .into_iter()
        .find_map(|(name, version)| loaded(name).then_some(version))
}

/// Loads the builtins library that an NVRTC opens by name when it first compiles. It is in the NVRTC's folder, which
/// the loader knows only if torch found it.
fn open_builtins(beside: &CStr) {
    let path = Path::new(OsStr::from_bytes(beside.to_bytes()));
    let Some(files) = path.parent().and_then(|folder| folder.read_dir().ok()) else {
        return;
    };
    for file in files.flatten() {
        let name = file.file_name();
        if !name.as_bytes().starts_with(b"libnvrtc-builtins.so") {
            continue;
        }
        if let Ok(path) = CString::new(file.path().into_os_string().into_vec()) {
            // SAFETY: as in `open`. Where it cannot be loaded, NVRTC will say so.
            let _ = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        }
    }
}

fn open(path: &CStr) -> Option<Nvrtc> {
    open_builtins(path);
    // SAFETY: a library of NVIDIA's or torch's, which runs nothing of ours when it is loaded, and is never closed.
    let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        return None;
    }
    // SAFETY: as above. A handle also finds the symbols of the libraries that this one links to.
    unsafe { Nvrtc::of(library) }
}
