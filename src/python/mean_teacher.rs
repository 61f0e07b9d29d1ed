use super::{MANY, must_be, number, without_gil};
use crate::ops::mean_teacher::{self as ops, CLASS};
use crate::torch::facts::Borrowed;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::GILOnceCell;
use pyo3::types::{PyDict, PyString, PyType};
use std::collections::HashSet;
use std::hash::{BuildHasherDefault, Hasher};

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
    update(py, &parameters(teacher)?, &parameters(student)?, alpha)
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
    update(py, &Walk::over(&teachers)?, &Walk::over(&students)?, alpha)
}

/// The walks hold the objects until the update is done.
fn update(py: Python<'_>, teacher: &Walk<'_>, student: &Walk<'_>, alpha: f64) -> PyResult<()> {
    same_shards(teacher, student)?;
    let (teachers, students) = (&teacher.tensors[..], &student.tensors[..]);
    without_gil(py, MANY, || ops::update(teachers, students, alpha))
}

/// `list(module.parameters())`, walked here: each parameter once, in the order of definition. A
/// module that overrides `parameters` is asked instead.
fn parameters<'py>(module: &Bound<'py, PyAny>) -> PyResult<Walk<'py>> {
    let mut walk = Walk::default();
    if !uses_own_walk(module)? && walk.module(module)? {
        return Ok(walk);
    }
    let parameters = module.call_method0("parameters")?.try_iter()?;
    Walk::over(&parameters.collect::<PyResult<Vec<_>>>()?)
}

fn uses_own_walk(module: &Bound<'_, PyAny>) -> PyResult<bool> {
    let py = module.py();
    let base = MODULE.import(py, "torch.nn", "Module")?;
    if !module.is_instance(base)? {
        return Err(PyTypeError::new_err(format!(
            "{CLASS}: model must be a torch.nn.Module, got {}",
            module.get_type().name()?
        )));
    }
    let own = module.getattr(intern!(py, "__dict__"))?;
    for name in [
        intern!(py, "parameters"),
        intern!(py, "named_parameters"),
        intern!(py, "_named_members"),
        intern!(py, "named_modules"),
    ] {
        if overrides(&module.get_type(), base, name)? || own.contains(name)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether a class has a method of its own in place of that of `base`.
fn overrides(
    class: &Bound<'_, PyType>,
    base: &Bound<'_, PyType>,
    name: &Bound<'_, PyString>,
) -> PyResult<bool> {
    Ok(!class.getattr(name)?.is(&base.getattr(name)?))
}

static MODULE: GILOnceCell<Py<PyType>> = GILOnceCell::new();

/// Addresses of Python objects. One multiplication spreads them well; the standard hasher would
/// take longer than the rest of the walk.
type Addresses = HashSet<usize, BuildHasherDefault<Spread>>;

#[derive(Default)]
struct Spread(u64);

impl Hasher for Spread {
    #[inline]
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_usize(byte.into());
        }
    }
    #[inline]
    fn write_usize(&mut self, address: usize) {
        // 2^64 over the golden ratio; the table uses both the upper and the lower bits of the hash.
        let product = (self.0 ^ address as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ (product >> 32);
    }
}

struct Walk<'py> {
    modules: Addresses,
    /// The classes of modules that walk over their children as torch's does.
    classes: Addresses,
    parameters: Addresses,
    found: Vec<Bound<'py, PyAny>>,
    /// The tensors of `found`.
    tensors: Vec<Borrowed>,
    /// The parameters that are sharded over processes (`DTensor`), by their index in `found`, which
    /// holds the shard of this process.
    sharded: Vec<(usize, Bound<'py, PyAny>)>,
}

impl Default for Walk<'_> {
    fn default() -> Self {
        // Room for the parameters of common networks: growing costs as much as the rest of a walk.
        let set = || Addresses::with_capacity_and_hasher(512, BuildHasherDefault::default());
        Self {
            modules: set(),
            classes: Addresses::default(),
            parameters: set(),
            found: Vec::with_capacity(512),
            tensors: Vec::with_capacity(512),
            sharded: Vec::new(),
        }
    }
}

impl<'py> Walk<'py> {
    /// Over the given parameters.
    fn over(parameters: &[Bound<'py, PyAny>]) -> PyResult<Self> {
        let mut walk = Self::default();
        for parameter in parameters {
            walk.parameter(parameter.clone())?;
        }
        Ok(walk)
    }

    /// False if the outermost module must be asked: a module below chooses among its children, or a container is
    /// not a plain dictionary (TorchScript).
    fn module(&mut self, module: &Bound<'py, PyAny>) -> PyResult<bool> {
        if !self.modules.insert(module.as_ptr() as usize) {
            return Ok(true);
        }
        let py = module.py();
        let class = module.get_type();
        if self.classes.insert(class.as_ptr() as usize) {
            let base = MODULE.import(py, "torch.nn", "Module")?;
            if overrides(&class, base, intern!(py, "named_modules"))? {
                return Ok(false);
            }
        }
        let own = attribute(module, intern!(py, "_parameters"))?;
        let children = attribute(module, intern!(py, "_modules"))?;
        let (Ok(own), Ok(children)) = (own.downcast::<PyDict>(), children.downcast::<PyDict>())
        else {
            return Ok(false);
        };
        let mut place = 0;
        while let Some(parameter) = next_value(own, &mut place) {
            self.parameter(parameter)?;
        }
        place = 0;
        while let Some(child) = next_value(children, &mut place) {
            if !child.is_none() && !self.module(&child)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn parameter(&mut self, parameter: Bound<'py, PyAny>) -> PyResult<()> {
        if parameter.is_none() || !self.parameters.insert(parameter.as_ptr() as usize) {
            return Ok(());
        }
        let held = match local_part(&parameter)? {
            Some(local) => {
                self.sharded.push((self.found.len(), parameter));
                local
            }
            None => parameter,
        };
        // SAFETY: a live object, under the GIL; `found` keeps it alive as long as `tensors`.
        match unsafe { Borrowed::of(held.as_ptr().cast()) } {
            Some(tensor) => self.tensors.push(tensor),
            None => return Err(must_be(CLASS, "parameter", "a torch.Tensor", &held)),
        }
        self.found.push(held);
        Ok(())
    }
}

/// The next value of a dictionary; `place` starts at 0. Unlike `PyO3`'s iterator it does not touch the keys.
fn next_value<'py>(
    dict: &Bound<'py, PyDict>,
    place: &mut pyo3::ffi::Py_ssize_t,
) -> Option<Bound<'py, PyAny>> {
    let mut value = std::ptr::null_mut();
    // SAFETY: a live dictionary, under the GIL; the call checks `place` against the dictionary's current
    // size. The value is borrowed from it and gets a reference of its own before anything else runs.
    unsafe {
        let found =
            pyo3::ffi::PyDict_Next(dict.as_ptr(), place, std::ptr::null_mut(), &raw mut value);
        (found != 0).then(|| Bound::from_borrowed_ptr(dict.py(), value))
    }
}

/// `module.name`, for an attribute of the instance: bypasses `torch.nn.Module.__getattr__`, which only
/// serves what the normal lookup does not find, and makes Python look twice.
fn attribute<'py>(
    module: &Bound<'py, PyAny>,
    name: &Bound<'py, PyString>,
) -> PyResult<Bound<'py, PyAny>> {
    // SAFETY: two live objects, under the GIL; the result is null, with an exception set, or a
    // reference that is ours.
    let found = unsafe {
        let found = pyo3::ffi::PyObject_GenericGetAttr(module.as_ptr(), name.as_ptr());
        Bound::from_owned_ptr_or_err(module.py(), found)
    };
    found.or_else(|_| module.getattr(name))
}

/// The shard of a `DTensor` that this process holds; `None` for any other parameter.
fn local_part<'py>(parameter: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
    static PLAIN: GILOnceCell<Py<PyType>> = GILOnceCell::new();
    let py = parameter.py();
    let plain = PLAIN.import(py, "torch.nn", "Parameter")?;
    if parameter.get_type().is(plain) {
        return Ok(None);
    }
    parameter.getattr_opt(intern!(py, "_local_tensor"))
}

/// `ValueError` unless each parameter is sharded over the processes like its counterpart.
fn same_shards(teacher: &Walk<'_>, student: &Walk<'_>) -> PyResult<()> {
    let mut pairs = teacher.sharded.iter().zip(&student.sharded);
    let alike = teacher.sharded.len() == student.sharded.len()
        && pairs.try_fold(true, |alike, ((k, t), (l, s))| {
            Ok::<_, PyErr>(alike && k == l && same_layout(t, s)?)
        })?;
    if alike {
        return Ok(());
    }
    Err(PyValueError::new_err(format!(
        "{CLASS}: teacher and student must be sharded alike, got DTensors of other placements or meshes"
    )))
}

fn same_layout(a: &Bound<'_, PyAny>, b: &Bound<'_, PyAny>) -> PyResult<bool> {
    for name in [
        intern!(a.py(), "device_mesh"),
        intern!(a.py(), "placements"),
    ] {
        if !a.getattr(name)?.eq(b.getattr(name)?)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Raises unless `alpha` is one that the class accepts.
#[pyfunction]
pub fn check_alpha(alpha: &Bound<'_, PyAny>) -> PyResult<()> {
    Ok(ops::check_alpha(number(CLASS, "alpha", alpha)?)?)
}
