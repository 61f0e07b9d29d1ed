//! The CUDA sources, to be compiled and inspected without a device.

use crate::cuda::{SOURCES, Source, compile};
use crate::error::Error;
use crate::torch::Dtype;
use pyo3::prelude::*;

/// The methods that have CUDA kernels.
#[pyfunction]
pub fn cuda_sources() -> Vec<&'static str> {
    SOURCES.iter().map(|source| source.stem).collect()
}

/// Compiles one for a compute capability, and returns the compiler's log: registers, spills, shared memory.
#[pyfunction]
pub fn cuda_compile(
    py: Python<'_>,
    stem: &str,
    dtype: &str,
    capability: (i32, i32),
) -> PyResult<String> {
    let source = Source::of(stem)
        .ok_or_else(|| Error::Value(format!("cuda_compile: there is no source {stem:?}")))?;
    let dtype = match dtype {
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::Bf16,
        _ => return Err(Error::Value(format!("cuda_compile: no kernels for {dtype:?}")).into()),
    };
    Ok(py.allow_threads(|| compile(source, dtype, capability))?.log)
}
