//! NVRTC: the sources, compiled for one device and one element type.

use super::failed;
use super::sources::Source;
use crate::error::Result;
use crate::torch::Dtype;
use crate::torch::device::library_folder;
use cudarc::nvrtc::{result, sys};
use std::ffi::{CStr, CString, c_int};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::sync::OnceLock;

/// What the driver loads: a cubin where NVRTC knows the device, otherwise PTX, which the driver compiles and
/// which ends with a NUL. The driver is told no length: it must be whole.
pub struct Code(Vec<u8>);

impl Code {
    /// What a file of the cache holds after the mark of what follows; `None` if it was cut off or damaged.
    pub fn from_file(file: &[u8]) -> Option<Self> {
        let (mark, bytes) = file.split_at_checked(MARK)?;
        (mark == Self::mark(bytes)).then(|| Self(bytes.to_vec()))
    }

    /// As [`Self::from_file`] reads it.
    pub fn to_file(&self) -> Vec<u8> {
        [&Self::mark(&self.0)[..], &self.0].concat()
    }

    /// What the driver reads.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn mark(bytes: &[u8]) -> [u8; MARK] {
        let mut hash = DefaultHasher::new();
        bytes.hash(&mut hash);
        hash.finish().to_le_bytes()
    }
}

const MARK: usize = size_of::<u64>();

/// Compiled code, and what the compiler says of registers and spills.
pub struct Compiled {
    /// What the driver loads.
    pub code: Code,
    /// The compiler's log.
    pub log: String,
}

/// Compiles `source` for compute capability `(major, minor)`.
pub fn compile(source: Source, dtype: Dtype, capability: (i32, i32)) -> Result<Compiled> {
    let architecture = Architecture::of(capability)?;
    let text = CString::new(source.text()).map_err(|_| failed("a source has a NUL"))?;
    let name = CString::new(format!("{}.cu", source.stem)).unwrap_or_default();
    let program = result::create_program(&text, Some(&name)).map_err(reason)?;
    let program = Program(program);
    let options = options(dtype, &architecture);
    // SAFETY: the program was created above and is destroyed when `program` is dropped.
    let outcome = unsafe { result::compile_program(program.0, &options) };
    // SAFETY: as above.
    let log = unsafe { result::get_program_log(program.0) }.map_err(reason)?;
    let log: Vec<u8> = log.into_iter().map(|c| c as u8).collect();
    let log = String::from_utf8_lossy(&log)
        .trim_end_matches('\0')
        .trim()
        .to_owned();
    if outcome.is_err() {
        return Err(failed(&format!(
            "{}.cu does not compile:\n{log}",
            source.stem
        )));
    }
    let code = if architecture.native {
        program.cubin()?
    } else {
        program.ptx()?
    };
    Ok(Compiled {
        code: Code(code),
        log,
    })
}

/// The options that decide what the code is. No `fast-math`: exponentials and divisions stay exact ones.
fn options(dtype: Dtype, architecture: &Architecture) -> Vec<String> {
    let mut options = vec![
        format!("--gpu-architecture={}", architecture.name()),
        "--std=c++17".to_owned(),
        format!("-DELEMENT={}", element(dtype)),
    ];
    if architecture.native {
        options.push("--ptxas-options=-v".to_owned());
    }
    options
}

/// `ELEMENT` in common.cuh.
pub fn element(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "f32",
        Dtype::F16 => "f16",
        Dtype::Bf16 => "bf16",
        Dtype::F64 => "f64",
    }
}

/// NVRTC's version, and its architecture for a device: what a cached file depends on besides the source.
pub fn key(capability: (i32, i32)) -> Result<String> {
    let architecture = Architecture::of(capability)?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: it writes two numbers.
    unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) }
        .result()
        .map_err(reason)?;
    Ok(format!("{}-nvrtc{major}.{minor}", architecture.name()))
}

struct Architecture {
    number: i32,
    /// Whether it is the device's own. An older one is compiled to PTX.
    native: bool,
}

impl Architecture {
    /// The newest that NVRTC knows and the device runs.
    fn of((major, minor): (i32, i32)) -> Result<Self> {
        let wanted = 10 * major + minor;
        let known = supported()?;
        let best = known.iter().copied().filter(|&n| n <= wanted).max();
        let number = best.ok_or_else(|| {
            failed(&format!(
                "NVRTC compiles for {known:?}, and the device is sm_{wanted}"
            ))
        })?;
        Ok(Self {
            number,
            native: number == wanted,
        })
    }

    fn name(&self) -> String {
        let kind = if self.native { "sm" } else { "compute" };
        format!("{kind}_{}", self.number)
    }
}

fn supported() -> Result<Vec<i32>> {
    load()?;
    let mut count: c_int = 0;
    // SAFETY: it writes one number.
    unsafe { sys::nvrtcGetNumSupportedArchs(&raw mut count) }
        .result()
        .map_err(reason)?;
    let mut known = vec![0; count.max(0) as usize];
    // SAFETY: there is room for as many numbers as NVRTC said.
    unsafe { sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) }
        .result()
        .map_err(reason)?;
    Ok(known)
}

/// Makes sure that NVRTC can be called: the one that torch's wheels bring, or the system's.
fn load() -> Result<()> {
    static LOADED: OnceLock<bool> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| {
        for path in beside_torch() {
            let Ok(path) = CString::new(path.into_os_string().into_encoded_bytes()) else {
                continue;
            };
            // SAFETY: NVIDIA's library, which runs nothing when it is loaded. It stays loaded, and what
            // asks for it by its name finds this one where the system has none.
            if !unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) }.is_null()
            {
                break;
            }
        }
        // SAFETY: as above.
        unsafe { sys::is_culib_present() }
    });
    if *loaded {
        return Ok(());
    }
    Err(failed(
        "NVRTC cannot be loaded; CUDA builds of torch bring it as a package of their own",
    ))
}

/// Where pip puts the NVRTC of CUDA 13 and of CUDA 12.
fn beside_torch() -> Vec<PathBuf> {
    let Some(folder) = library_folder() else {
        return Vec::new();
    };
    ["cu13/lib/libnvrtc.so.13", "cuda_nvrtc/lib/libnvrtc.so.12"]
        .iter()
        .map(|file| folder.join("../../nvidia").join(file))
        .filter(|path| path.exists())
        .collect()
}

struct Program(sys::nvrtcProgram);

impl Program {
    fn cubin(&self) -> Result<Vec<u8>> {
        let mut size = 0;
        // SAFETY: a compiled program; it writes one number.
        unsafe { sys::nvrtcGetCUBINSize(self.0, &raw mut size) }
            .result()
            .map_err(reason)?;
        let mut code = vec![0u8; size];
        // SAFETY: there is room for as many bytes as NVRTC said.
        unsafe { sys::nvrtcGetCUBIN(self.0, code.as_mut_ptr().cast()) }
            .result()
            .map_err(reason)?;
        Ok(code)
    }

    fn ptx(&self) -> Result<Vec<u8>> {
        // SAFETY: a compiled program. What it returns ends with a NUL, as the driver wants it.
        let ptx = unsafe { result::get_ptx(self.0) }.map_err(reason)?;
        Ok(ptx.into_iter().map(|c| c as u8).collect())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: it was created by NVRTC and is destroyed once. There is nothing to do about a failure.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

fn reason(error: result::NvrtcError) -> crate::error::Error {
    // SAFETY: NVRTC returns the address of a constant string for any result.
    let text = unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(error.0)) };
    failed(&format!("NVRTC: {}", text.to_string_lossy()))
}
