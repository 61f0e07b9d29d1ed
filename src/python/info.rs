use crate::cuda;
use crate::kernels::isa;
use crate::torch::{built_for, composites_only, product};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// What this extension was built with and runs with.
#[pyfunction]
pub fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("torch", built_for())?;
    info.set_item("rustc", env!("TLLIB_RS_RUSTC"))?;
    info.set_item("target", env!("TLLIB_RS_TARGET"))?;
    info.set_item("profile", env!("TLLIB_RS_PROFILE"))?;
    info.set_item("isa", isa::level().name())?;
    info.set_item("products", product::provider())?;
    Ok(info)
}

/// Whether there are kernels for tensors on this type of device, by torch's name for it.
#[pyfunction]
pub fn has_kernels(device: &str) -> bool {
    let here = match device {
        "cpu" => true,
        "cuda" => cuda::enabled(),
        _ => false,
    };
    here && !composites_only()
}
