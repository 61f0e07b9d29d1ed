use super::{elements, number, tensor, without_gil};
use crate::ops::mean_teacher as ops;
use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::GILOnceCell;
use pyo3::types::{PyDict, PyType};
use std::collections::HashSet;
use tch::Tensor;

const CLASS: &str = "EMATeacher";

/// `teacher <- alpha * teacher + (1 - alpha) * student` over all parameters, in place. The
/// parameters are the ones of this moment.
#[pyfunction]
pub fn ema_update(
    py: Python<'_>,
    teacher: &Bound<'_, PyAny>,
    student: &Bound<'_, PyAny>,
    alpha: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let alpha = number(CLASS, "alpha", alpha)?;
    update(py, parameters(teacher)?, parameters(student)?, alpha)
}

/// The same over parameters that are given one by one.
#[pyfunction]
pub fn ema_update_parameters(
    py: Python<'_>,
    teachers: Vec<Bound<'_, PyAny>>,
    students: Vec<Bound<'_, PyAny>>,
    alpha: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let alpha = number(CLASS, "alpha", alpha)?;
    let tensors = |given: Vec<Bound<'_, PyAny>>| {
        given
            .iter()
            .map(|parameter| tensor(CLASS, "parameter", parameter))
            .collect::<PyResult<Vec<_>>>()
    };
    update(py, tensors(teachers)?, tensors(students)?, alpha)
}

fn update(
    py: Python<'_>,
    teachers: Vec<Tensor>,
    students: Vec<Tensor>,
    alpha: f64,
) -> PyResult<()> {
    let work = teachers.iter().map(elements).sum();
    without_gil(py, work, move || ops::update(&teachers, &students, alpha))
}

/// `list(module.parameters())`, walked here: each parameter once, in the order of definition. A
/// module that brings its own `parameters` is asked instead.
fn parameters(module: &Bound<'_, PyAny>) -> PyResult<Vec<Tensor>> {
    let mut walk = Walk::default();
    if uses_own_walk(module)? || !walk.module(module)? {
        walk = Walk::default();
        for parameter in module.call_method0("parameters")?.try_iter()? {
            walk.parameter(&parameter?)?;
        }
    }
    Ok(walk.found)
}

fn uses_own_walk(module: &Bound<'_, PyAny>) -> PyResult<bool> {
    static BASE: GILOnceCell<Py<PyType>> = GILOnceCell::new();
    let py = module.py();
    let base = BASE.import(py, "torch.nn", "Module")?;
    if !module.is_instance(base)? {
        return Err(PyTypeError::new_err(format!(
            "{CLASS}: model must be a torch.nn.Module, got {}",
            module.get_type().name()?
        )));
    }
    for name in [
        intern!(py, "parameters"),
        intern!(py, "named_parameters"),
        intern!(py, "_named_members"),
        intern!(py, "named_modules"),
    ] {
        if !module.get_type().getattr(name)?.is(&base.getattr(name)?) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[derive(Default)]
struct Walk {
    modules: HashSet<usize>,
    parameters: HashSet<usize>,
    found: Vec<Tensor>,
}

impl Walk {
    /// False where a container is not a plain dictionary (TorchScript): the module must be asked.
    fn module(&mut self, module: &Bound<'_, PyAny>) -> PyResult<bool> {
        if !self.modules.insert(module.as_ptr() as usize) {
            return Ok(true);
        }
        let py = module.py();
        let own = module.getattr(intern!(py, "_parameters"))?;
        let children = module.getattr(intern!(py, "_modules"))?;
        let (Ok(own), Ok(children)) = (own.downcast::<PyDict>(), children.downcast::<PyDict>())
        else {
            return Ok(false);
        };
        for (_, parameter) in own {
            self.parameter(&parameter)?;
        }
        for (_, child) in children {
            if !child.is_none() && !self.module(&child)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn parameter(&mut self, parameter: &Bound<'_, PyAny>) -> PyResult<()> {
        if !parameter.is_none() && self.parameters.insert(parameter.as_ptr() as usize) {
            self.found.push(tensor(CLASS, "parameter", parameter)?);
        }
        Ok(())
    }
}

/// Raises unless `alpha` is one that the class accepts.
#[pyfunction]
pub fn check_alpha(alpha: &Bound<'_, PyAny>) -> PyResult<()> {
    Ok(ops::check_alpha(number(CLASS, "alpha", alpha)?)?)
}
