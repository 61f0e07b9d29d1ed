//! Compiled kernels: in this process, on disk, or compiled now.

use super::compile::{Code, compile, element, key};
use super::device::Launch;
use super::driver::{Context, Handle};
use super::failed;
use super::sources::Source;
use crate::error::Result;
use crate::torch::Dtype;
use std::collections::HashMap;
use std::fs::File;
use std::hash::{BuildHasher, DefaultHasher, Hash, Hasher, RandomState};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

type Name = (&'static str, &'static str);

/// A kernel that is loaded.
#[derive(Clone, Copy)]
pub struct Function {
    /// What the driver launches.
    pub handle: Handle,
    /// How many of its blocks, of the size that the first launch had, the device holds at once.
    pub resident: u32,
}

/// What is loaded.
#[derive(Default)]
struct Loaded {
    modules: HashMap<(i32, &'static str, &'static str), Handle>,
    functions: HashMap<(i32, &'static str, &'static str, Name), Function>,
}

/// The kernel of a launch, compiled for the device at first use.
pub fn function(context: &Context, launch: &Launch) -> Result<Function> {
    static LOADED: Mutex<Option<Loaded>> = Mutex::new(None);
    let device = context.ordinal();
    let dtype = element(launch.dtype);
    // Held while compiling: another thread that wants the same kernel should wait for it.
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = loaded.get_or_insert_default();
    let name = (device, launch.stem, dtype, launch.kernel);
    if let Some(&function) = loaded.functions.get(&name) {
        return Ok(function);
    }
    let module = match loaded.modules.get(&(device, launch.stem, dtype)) {
        Some(&module) => module,
        None => module(context, launch.stem, launch.dtype)?,
    };
    loaded.modules.insert((device, launch.stem, dtype), module);
    let handle = context.function(module, &kernel_name(launch.kernel))?;
    let function = Function {
        handle,
        resident: context.resident(handle, launch.block)?,
    };
    loaded.functions.insert(name, function);
    Ok(function)
}

/// `uda_1024` of `("uda", "1024")`, `scale` of `("scale", "")`.
pub fn kernel_name((kernel, suffix): Name) -> String {
    if suffix.is_empty() {
        return kernel.to_owned();
    }
    format!("{kernel}_{suffix}")
}

/// Loads a module from disk, or compiles it and keeps it there.
fn module(context: &Context, stem: &str, dtype: Dtype) -> Result<Handle> {
    let source = Source::of(stem).ok_or_else(|| failed(&format!("there is no {stem}.cu")))?;
    let file = cache_folder()
        .map(|folder| cached(&folder, source, dtype, context))
        .transpose()?;
    // A file that is truncated or for another device is written again.
    let kept = file.as_ref().and_then(|file| std::fs::read(file).ok());
    let code = kept.and_then(|file| Code::from_file(&file));
    if let Some(code) = code
        && let Some(module) = context.load(&code)?
    {
        return Ok(module);
    }
    let compiled = compile(source, dtype, context.capability())?;
    let module = context.load(&compiled.code)?.ok_or_else(|| {
        failed("the driver takes no code of this NVRTC, which may be of a later CUDA version")
    })?;
    if let Some(file) = file {
        // A cache that cannot be written costs time at the next start, no more.
        let _ = keep(&file, &compiled.code.to_file());
    }
    Ok(module)
}

/// The file of this source for this device.
fn cached(folder: &Path, source: Source, dtype: Dtype, context: &Context) -> Result<PathBuf> {
    let mut hash = DefaultHasher::new();
    source.text().hash(&mut hash);
    let (stem, element, hash) = (source.stem, element(dtype), hash.finish());
    let key = key(context.capability())?;
    let version = env!("CARGO_PKG_VERSION");
    Ok(folder.join(format!("{stem}-{element}-{key}-{version}-{hash:016x}.bin")))
}

/// Writes the file atomically: other processes see all of it or none.
fn keep(file: &Path, bytes: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder)?;
    }
    // Processes in containers that share the folder may have equal PIDs: a random number distinguishes them.
    let random = RandomState::new().build_hasher().finish();
    let own = file.with_extension(format!("{random:016x}.tmp"));
    let mut to = File::create_new(&own)?;
    let written = to.write_all(bytes).and_then(|()| to.sync_all());
    let kept = written.and_then(|()| std::fs::rename(&own, file));
    if kept.is_err() {
        let _ = std::fs::remove_file(&own);
    }
    kept
}

/// `TLLIB_RS_CACHE`, or the user's folder for caches.
fn cache_folder() -> Option<PathBuf> {
    let folder = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    folder("TLLIB_RS_CACHE")
        .or_else(|| folder("XDG_CACHE_HOME").map(|cache| cache.join("tllib_rs")))
        .or_else(|| folder("HOME").map(|home| home.join(".cache/tllib_rs")))
}
