//! The Python module `tllib_rs._core`: extract the arguments, release the GIL, call, wrap. The only logic here is
//! about Python's own objects, such as the walk over the parameters of two modules.

mod cc_loss;
mod cuda;
mod dst;
mod entropy;
mod flexmatch;
mod gradients;
mod info;
mod mcc;
mod mean_teacher;
mod pi_model;
mod pseudo_label;
mod reid_loss;
mod self_ensemble;
mod self_tuning;
mod uda;

use crate::error::{Error, Result, silence_libtorchs_panics};
use crate::ops::Reduction;
use crate::torch::input::Input;
use crate::torch::team;
use pyo3::exceptions::{PyIndexError, PyOverflowError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyFloat, PyInt};
use pyo3_tch::PyTensor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tch::Tensor;

/// Elements below which a kernel is done before another thread could use the GIL.
const GIL_WORTH: usize = 1 << 14;
/// More than any kernel is worth the GIL for, and sums of it are numbers too.
const MANY: usize = usize::MAX >> 8;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match error {
            Error::Type(_) => PyTypeError::new_err(text),
            Error::Value(_) => PyValueError::new_err(text),
            Error::Index(_) => PyIndexError::new_err(text),
            Error::Device(_) | Error::Memory(_) | Error::Reentered(_) | Error::Cuda(_) => {
                PyRuntimeError::new_err(text)
            }
            Error::Torch(_) | Error::Bridge(_) => {
                raised_inside().unwrap_or_else(|| PyRuntimeError::new_err(text))
            }
        }
    }
}

/// The exception of Python code that libtorch called on our behalf, such as a saved-tensor hook.
/// libtorch leaves it set and throws one of its own without text; callers, torch's own activation
/// checkpointing among them, expect exactly the original one.
fn raised_inside() -> Option<PyErr> {
    Python::with_gil(PyErr::take)
}

/// The tensor behind `object`, or a `TypeError` that names the argument.
fn tensor(class: &str, name: &str, object: &Bound<'_, PyAny>) -> PyResult<Tensor> {
    match object.extract::<PyTensor>() {
        Ok(tensor) => Ok(tensor.0),
        Err(_) => Err(must_be(class, name, "a torch.Tensor", object)),
    }
}

/// The `TypeError` about an argument of another type.
fn must_be(class: &str, name: &str, expected: &str, object: &Bound<'_, PyAny>) -> PyErr {
    let kind = object.get_type().name();
    let kind = kind.map_or_else(|_| "?".to_owned(), |kind| kind.to_string());
    PyTypeError::new_err(format!("{class}: {name} must be {expected}, got {kind}"))
}

/// The number behind `object`, or a `TypeError` that names the argument. A tensor that requires a gradient would get
/// none, and is refused.
fn number(class: &str, name: &str, object: &Bound<'_, PyAny>) -> PyResult<f64> {
    let plain = object.is_instance_of::<PyFloat>() || object.is_instance_of::<PyInt>();
    let trained = |object: &Bound<'_, PyAny>| object.getattr("requires_grad")?.is_truthy();
    if !plain && trained(object).unwrap_or(false) {
        return Err(PyTypeError::new_err(format!(
            "{class}: {name} must be a number, got a tensor that requires a gradient: it is a constant here"
        )));
    }
    object
        .extract()
        .map_err(|error| unusable(class, name, "a number", object, &error))
}

/// The integer behind `object`, or a `TypeError` that names the argument.
fn integer(class: &str, name: &str, object: &Bound<'_, PyAny>) -> PyResult<i64> {
    object
        .extract()
        .map_err(|error| unusable(class, name, "an integer", object, &error))
}

/// The error about an argument that is not `expected`, or too large.
fn unusable(
    class: &str,
    name: &str,
    expected: &str,
    object: &Bound<'_, PyAny>,
    error: &PyErr,
) -> PyErr {
    if error.is_instance_of::<PyOverflowError>(object.py()) {
        return PyValueError::new_err(format!("{class}: {name} must fit into 64 bits"));
    }
    must_be(class, name, expected, object)
}

/// The reduction that `name` names, or an error of the class.
fn reduction_named(class: &str, name: &Bound<'_, PyAny>) -> PyResult<Reduction> {
    let text: Option<String> = name
        .extract()
        .map_err(|_| must_be(class, "reduction", "a str", name))?;
    Ok(Reduction::parse(class, text.as_deref())?)
}

/// Runs `body`; a panic becomes an error.
fn caught<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| Err(Error::panicked(&*panic)))
}

/// Runs `body` without the GIL if it touches enough `elements` to be worth it.
fn without_gil<T: Send>(
    py: Python<'_>,
    elements: usize,
    body: impl FnOnce() -> Result<T> + Send,
) -> PyResult<T> {
    Ok(if elements >= GIL_WORTH {
        py.allow_threads(|| caught(body))?
    } else {
        caught(body)?
    })
}

/// The number of elements; 0 for a tensor that is not dense, which the checks will refuse. [`MANY`] on a device: a
/// first launch compiles, and operations may wait.
fn elements(tensor: &Tensor) -> usize {
    Input::new("", "", tensor).map_or(0, |input| if input.is_cpu() { input.numel() } else { MANY })
}

#[pymodule]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    team::install();
    silence_libtorchs_panics();
    m.add_class::<flexmatch::FlexMatch>()?;
    m.add_function(wrap_pyfunction!(dst::check_eta_prime, m)?)?;
    m.add_function(wrap_pyfunction!(dst::dst, m)?)?;
    m.add_function(wrap_pyfunction!(cc_loss::cc_loss, m)?)?;
    m.add_function(wrap_pyfunction!(cc_loss::check_cc_loss, m)?)?;
    m.add_class::<self_tuning::SelfTuningHistory>()?;
    m.add_class::<self_tuning::SelfTuningSettings>()?;
    m.add_function(wrap_pyfunction!(cuda::cuda_compile, m)?)?;
    m.add_function(wrap_pyfunction!(cuda::cuda_sources, m)?)?;
    m.add_function(wrap_pyfunction!(entropy::entropy, m)?)?;
    m.add_function(wrap_pyfunction!(mcc::check_temperature, m)?)?;
    m.add_function(wrap_pyfunction!(pseudo_label::check_threshold, m)?)?;
    m.add_function(wrap_pyfunction!(mean_teacher::check_alpha, m)?)?;
    m.add_function(wrap_pyfunction!(info::build_info, m)?)?;
    m.add_function(wrap_pyfunction!(info::has_kernels, m)?)?;
    m.add_function(wrap_pyfunction!(gradients::gradients, m)?)?;
    m.add_function(wrap_pyfunction!(mcc::confusion_matrix, m)?)?;
    m.add_function(wrap_pyfunction!(mcc::mcc, m)?)?;
    m.add_class::<mcc::MccPart>()?;
    m.add_function(wrap_pyfunction!(mean_teacher::ema_update, m)?)?;
    m.add_function(wrap_pyfunction!(mean_teacher::ema_update_parameters, m)?)?;
    m.add_function(wrap_pyfunction!(pi_model::check_reduction, m)?)?;
    m.add_function(wrap_pyfunction!(pi_model::pi_model, m)?)?;
    m.add_function(wrap_pyfunction!(pseudo_label::pseudo_label, m)?)?;
    m.add_function(wrap_pyfunction!(uda::check_uda, m)?)?;
    m.add_function(wrap_pyfunction!(uda::uda, m)?)?;
    m.add_function(wrap_pyfunction!(self_ensemble::check_num_classes, m)?)?;
    m.add_function(wrap_pyfunction!(self_ensemble::class_balance, m)?)?;
    m.add_function(wrap_pyfunction!(self_ensemble::class_balance_of_sums, m)?)?;
    m.add_function(wrap_pyfunction!(self_ensemble::class_balance_sums, m)?)?;
    m.add_function(wrap_pyfunction!(reid_loss::check_margin, m)?)?;
    m.add_function(wrap_pyfunction!(reid_loss::check_smoothing, m)?)?;
    m.add_function(wrap_pyfunction!(reid_loss::check_soft_triplet, m)?)?;
    m.add_function(wrap_pyfunction!(reid_loss::distances, m)?)?;
    m.add_function(wrap_pyfunction!(reid_loss::distances_backward, m)?)?;
    m.add_function(wrap_pyfunction!(reid_loss::hardest, m)?)?;
    m.add_function(wrap_pyfunction!(reid_loss::label_smooth, m)?)?;
    m.add_function(wrap_pyfunction!(reid_loss::soft_cross_entropy, m)?)?;
    m.add_function(wrap_pyfunction!(reid_loss::soft_triplet, m)?)?;
    m.add_function(wrap_pyfunction!(reid_loss::triplet, m)?)?;
    m.add_function(wrap_pyfunction!(reid_loss::triplet_xbm, m)?)?;
    Ok(())
}
