//! The sources, compiled for one device and one element type.

use super::failed;
use super::nvrtc::{Nvrtc, Program};
use super::sources::Source;
use crate::error::Result;
use crate::torch::Dtype;
use std::hash::{DefaultHasher, Hash, Hasher};

/// What the driver loads: a cubin where NVRTC knows the device, otherwise PTX, which the driver compiles and
/// which ends with a NUL. The driver is not given its length: it must be complete.
pub struct Code(Vec<u8>);

impl Code {
    /// The code in a cache file, which begins with a hash of the code; `None` if the file is truncated or damaged.
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
    let program = Program::new(&source.text(), &format!("{}.cu", source.stem))?;
    let done = program.compile(&options(dtype, &architecture))?;
    let log = program.log()?;
    if !done {
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

/// The options that decide what the code is. No `fast-math`: exponentials and divisions stay accurate.
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
    let (major, minor) = Nvrtc::get()?.version()?;
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
        let known = Nvrtc::get()?.architectures()?;
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
