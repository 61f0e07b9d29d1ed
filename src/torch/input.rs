//! A tensor argument and everything the checks ask of it, read once.

use super::{Dtype, check};
use crate::error::{Error, Result};
use crate::kernels::element::Element;
use crate::kernels::rows::Rows;
use std::ffi::c_char;
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

const CPU: i32 = 0;
const CUDA: i32 = 1;
const META: i32 = 14;
/// `c10::ScalarType::Int`
const INT32: i32 = 3;
const INT64: i32 = 4;
const BOOL: i32 = 11;

/// What may be done with a tensor: each kind allows what the previous ones do. Mirror of the enumeration in
/// bridge.cpp.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
#[allow(dead_code, reason = "constructed by the bridge")]
enum Access {
    /// Its memory cannot be read.
    Hidden,
    /// Its memory holds the values as they are, aligned. A dispatch mode intercepts operations on it.
    Observed,
    /// Operations on it return wrappers of `torch.func`.
    Transformed,
    /// Operations on it return such tensors.
    Plain,
    /// Kernels may read it.
    Ordinary,
}

/// Mirror of `tllib_facts` in bridge.cpp: what the checks and kernels ask of a tensor. The pointers
/// borrow from the tensor, for as long as nobody resizes it.
#[repr(C)]
pub struct Facts {
    data: *mut std::ffi::c_void,
    sizes: *const i64,
    strides: *const i64,
    ndim: i64,
    kind: i32,
    device_type: i32,
    device_index: i32,
    strided: bool,
    access: Access,
    contiguous: bool,
    wants_grad: bool,
    autocast: bool,
}

unsafe extern "C" {
    fn tllib_describe(
        tensors: *const *const C_tensor,
        count: usize,
        out: *mut Facts,
    ) -> *mut c_char;
    fn tllib_unpack(object: *mut std::ffi::c_void) -> *const C_tensor;
}

impl Facts {
    /// Of a live tensor.
    fn of(tensor: &Tensor) -> Result<Self> {
        let mut facts = std::mem::MaybeUninit::<Self>::zeroed();
        // SAFETY: the tensor is live, and the bridge writes nothing but `facts`.
        check(unsafe { tllib_describe(&tensor.as_ptr(), 1, facts.as_mut_ptr()) })?;
        // SAFETY: no failure was reported, and all bits that may be left unset are valid.
        Ok(unsafe { facts.assume_init() })
    }

    /// The sizes.
    pub fn shape(&self) -> &[i64] {
        self.per_dimension(self.sizes)
    }

    /// The strides, in elements; empty where the memory cannot be read.
    pub fn strides(&self) -> &[i64] {
        self.per_dimension(self.strides)
    }

    fn per_dimension(&self, values: *const i64) -> &[i64] {
        if values.is_null() || self.ndim == 0 {
            return &[];
        }
        // SAFETY: the bridge returned the address of `ndim` values that live as long as the tensor.
        // Facts stay private to `Input`, which borrows it, and to `Borrowed::facts`, whose caller
        // promised the same.
        unsafe { std::slice::from_raw_parts(values, self.ndim as usize) }
    }

    /// Whether both are the same memory, read the same way.
    pub fn same(&self, other: &Self) -> bool {
        self.data() == other.data()
            && (self.shape(), self.strides()) == (other.shape(), other.strides())
            && self.scalar_type() == other.scalar_type()
    }

    /// The number of elements.
    pub fn numel(&self) -> usize {
        self.shape().iter().map(|&n| n as usize).product()
    }

    /// The dtype, where it has kernels.
    pub fn dtype(&self) -> Option<Dtype> {
        Dtype::of(self.kind)
    }

    /// Whether it holds integers that fit into 64 bits, or booleans.
    pub fn integral(&self) -> bool {
        matches!(self.kind, 0..=INT64 | BOOL)
    }

    /// Its `c10::ScalarType`.
    pub fn scalar_type(&self) -> i32 {
        self.kind
    }

    /// The memory, null where it cannot be read.
    pub fn data(&self) -> *mut std::ffi::c_void {
        self.data
    }

    /// Whether it is an ordinary dense CPU tensor, which kernels may read directly. Never true inside a transform
    /// of `torch.func`, where operations on it return wrappers.
    pub fn on_cpu(&self) -> bool {
        self.access >= Access::Ordinary && self.device_type == CPU
    }

    /// Whether its memory can be read and written.
    pub fn readable(&self) -> bool {
        self.access >= Access::Observed
    }

    /// Whether its memory can be read and written, and no dispatch mode waits for operations on it.
    pub fn unobserved(&self) -> bool {
        self.access >= Access::Transformed
    }

    /// Whether it is a dense tensor on the CPU or CUDA, and operations on it return such tensors. A kernel may
    /// read it unless `TLLIB_RS_COMPOSITE=1` rules kernels out.
    pub fn plain(&self) -> bool {
        self.access >= Access::Plain
    }

    /// Whether it is an ordinary dense CUDA tensor, which kernels there may read directly.
    pub fn on_cuda(&self) -> bool {
        self.access >= Access::Ordinary && self.device_type == CUDA
    }

    /// The device of a tensor that is on the CPU or on CUDA.
    pub fn device(&self) -> Device {
        if self.device_type == CUDA {
            Device::Cuda(self.device_index.max(0) as usize)
        } else {
            Device::Cpu
        }
    }

    /// Whether its memory can be read, and the elements follow each other there in order.
    pub fn contiguous(&self) -> bool {
        self.contiguous
    }

    /// Whether a gradient with respect to it is wanted: grad mode is on and it requires one.
    pub fn wants_grad(&self) -> bool {
        self.wants_grad
    }

    /// Whether an autocast region is active for its device.
    pub fn autocast(&self) -> bool {
        self.autocast
    }

    /// Whether it is on the CPU, whatever kind of tensor it is.
    pub fn is_cpu(&self) -> bool {
        self.device_type == CPU
    }

    /// Whether it is on the meta device, and has no values.
    pub fn is_meta(&self) -> bool {
        self.device_type == META
    }

    /// Whether it is strided: a sparse, mkldnn or nested tensor has no other facts.
    pub fn strided(&self) -> bool {
        self.strided
    }

    /// Its dtype, as torch spells it.
    pub fn dtype_name(&self) -> &'static str {
        scalar_type_name(self.kind)
    }
}

/// A tensor that a Python object holds.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Borrowed(*const C_tensor);

// SAFETY: as for a `Tensor`: the reference count is atomic, and the rest is only read.
unsafe impl Send for Borrowed {}
// SAFETY: as above.
unsafe impl Sync for Borrowed {}

impl Borrowed {
    /// The tensor of a Python object, `None` for any other object.
    ///
    /// # Safety
    /// `object` is a live Python object, the caller holds the GIL, and keeps the object for as long
    /// as it uses the result and what comes from it.
    pub unsafe fn of(object: *mut std::ffi::c_void) -> Option<Self> {
        // SAFETY: per contract.
        let tensor = unsafe { tllib_unpack(object) };
        (!tensor.is_null()).then_some(Self(tensor))
    }

    /// An owned reference to it.
    pub fn tensor(self) -> Tensor {
        // SAFETY: it points to a live tensor, whose reference count this increases.
        unsafe { Tensor::clone_from_ptr(self.0.cast_mut()) }
    }

    /// Tells autograd that it was written.
    pub fn bump_version(self) {
        // SAFETY: it points to a live tensor.
        unsafe { super::tllib_bump_version(self.0) }
    }

    /// The facts of many, in one call.
    pub fn facts(tensors: &[Self]) -> Result<Vec<Facts>> {
        let mut facts = Vec::<Facts>::with_capacity(tensors.len());
        // SAFETY: a `Borrowed` is a pointer to a live tensor; there is room for the facts of each,
        // and the bridge writes nothing else.
        let failure = unsafe {
            facts.as_mut_ptr().write_bytes(0, tensors.len());
            tllib_describe(tensors.as_ptr().cast(), tensors.len(), facts.as_mut_ptr())
        };
        check(failure)?;
        // SAFETY: zeroed memory is a valid `Facts`, written over or not.
        unsafe { facts.set_len(tensors.len()) };
        Ok(facts)
    }
}

/// An argument `name` of the class `class`. Every check mentions both in its error.
pub struct Input<'a> {
    /// The tensor itself.
    pub tensor: &'a Tensor,
    class: &'static str,
    name: &'static str,
    facts: Facts,
}

impl std::ops::Deref for Input<'_> {
    type Target = Facts;

    fn deref(&self) -> &Facts {
        &self.facts
    }
}

impl<'a> Input<'a> {
    /// Reads the facts. They hold as long as nobody resizes the tensor.
    pub fn new(class: &'static str, name: &'static str, tensor: &'a Tensor) -> Result<Self> {
        let facts = Facts::of(tensor)?;
        if !facts.strided {
            return Err(sparse(class, name));
        }
        Ok(Self {
            tensor,
            class,
            name,
            facts,
        })
    }

    /// A [`Error::Value`] about this argument.
    pub fn wrong(&self, expected: &str) -> Error {
        Error::Value(format!(
            "{}: {} must {expected}, got shape {:?}",
            self.class,
            self.name,
            self.shape()
        ))
    }

    /// The dtype, or a `TypeError` that lists the supported ones.
    pub fn floating(&self) -> Result<Dtype> {
        self.dtype()
            .ok_or_else(|| self.unsupported("float32, float64, float16 or bfloat16"))
    }

    /// `TypeError` unless the tensor holds integers of 64 bits.
    pub fn int64(&self) -> Result<()> {
        self.of_type(INT64)
    }

    /// `TypeError` unless the tensor's dtype is this `c10::ScalarType`.
    pub fn of_type(&self, scalar_type: i32) -> Result<()> {
        if self.facts.kind == scalar_type {
            return Ok(());
        }
        Err(self.unsupported(scalar_type_name(scalar_type)))
    }

    /// A [`Error::Type`] about this argument's dtype.
    pub fn unsupported(&self, expected: &str) -> Error {
        Error::Type(format!(
            "{}: {} must be {expected}, got {}",
            self.class,
            self.name,
            scalar_type_name(self.facts.kind)
        ))
    }

    /// `TypeError` unless the tensor holds real numbers, integers or booleans.
    pub fn real(&self) -> Result<()> {
        if matches!(self.facts.kind, 0..=7 | 11 | 15) {
            return Ok(());
        }
        Err(Error::Type(format!(
            "{}: {} must hold real numbers or booleans, got {}",
            self.class,
            self.name,
            scalar_type_name(self.facts.kind)
        )))
    }

    /// `ValueError` unless it broadcasts to exactly `shape`.
    pub fn broadcasts_to(&self, shape: &[i64]) -> Result<()> {
        let fits = |(own, other): (&i64, &i64)| *own == 1 || own == other;
        let own = self.shape();
        if own.len() <= shape.len() && own.iter().rev().zip(shape.iter().rev()).all(fits) {
            return Ok(());
        }
        Err(self.wrong(&format!("broadcast to the shape of the rows, {shape:?}")))
    }

    /// Labels and indices: `TypeError` unless the tensor holds integers of 64 or 32 bits.
    pub fn integer(&self) -> Result<()> {
        match self.facts.kind {
            INT32 | INT64 => Ok(()),
            _ => Err(self.unsupported("int64 or int32")),
        }
    }

    /// The tensor as int64: the tensor itself if that is its dtype.
    pub fn to_int64(&self) -> Result<Tensor> {
        if self.facts.kind == INT64 {
            return Ok(self.tensor.shallow_clone());
        }
        Ok(self.tensor.f_to_kind(Kind::Int64)?)
    }

    /// The same values in memory that may be read directly: contiguous, aligned, and without the pending
    /// negation or conjugation that a view may carry. `TypeError` for a tensor without memory on the CPU.
    pub fn in_memory(&self) -> Result<Tensor> {
        let here = |facts: &Facts| facts.contiguous() && facts.is_cpu();
        self.resolved(here, "an ordinary tensor on the CPU")
    }

    /// The same in the memory of its device. Of devices other than the CPU and CUDA it is not known whether a tensor
    /// has any.
    pub fn in_its_memory(&self) -> Result<Tensor> {
        if !matches!(self.facts.device_type, CPU | CUDA) {
            return Ok(self.tensor.f_contiguous()?);
        }
        self.resolved(Facts::contiguous, "an ordinary tensor")
    }

    /// The tensor or a copy, whichever is `here` first; `TypeError` if neither is.
    fn resolved(&self, here: impl Fn(&Facts) -> bool, expected: &str) -> Result<Tensor> {
        // No operation where none is needed: under `torch.func` its result would be a wrapper.
        if here(&self.facts) {
            return Ok(self.tensor.shallow_clone());
        }
        let plain = self
            .tensor
            .f_resolve_conj()?
            .f_resolve_neg()?
            .f_contiguous()?;
        if here(&Facts::of(&plain)?) {
            return Ok(plain);
        }
        let mut aligned = plain.f_empty_like()?;
        aligned.f_copy_(&plain)?;
        if here(&Facts::of(&aligned)?) {
            return Ok(aligned);
        }
        Err(Error::Type(format!(
            "{}: {} must be {expected}",
            self.class, self.name
        )))
    }

    /// The values of a CPU tensor of [`Facts::integral`] type, in order.
    pub fn integers(&self) -> Result<Vec<i64>> {
        let plain = self.in_memory()?;
        let data = plain.data_ptr();
        // SAFETY: contiguous and aligned, with as many elements of the type that is named as `self` has, and alive
        // until the copy is made. torch stores a bool as one byte.
        Ok(unsafe {
            match self.facts.kind {
                0 => widened::<u8>(data, self.numel()),
                1 => widened::<i8>(data, self.numel()),
                2 => widened::<i16>(data, self.numel()),
                INT32 => widened::<i32>(data, self.numel()),
                INT64 => widened::<i64>(data, self.numel()),
                BOOL => {
                    let bytes = widened::<u8>(data, self.numel());
                    bytes.into_iter().map(|byte| i64::from(byte != 0)).collect()
                }
                _ => return Err(self.unsupported("an integer or boolean dtype")),
            }
        })
    }

    /// (minibatch, C, ...) with at least one class.
    pub fn classes(&self) -> Result<()> {
        match *self.shape() {
            [_, cols, ..] if cols > 0 => Ok(()),
            _ => Err(self.wrong("have shape (minibatch, C, ...) with C > 0")),
        }
    }

    /// (minibatch, C) with at least one class.
    pub fn matrix(&self) -> Result<(usize, usize)> {
        match *self.shape() {
            [rows, cols] if cols > 0 => Ok((rows as usize, cols as usize)),
            _ => Err(self.wrong("have shape (minibatch, C) with C > 0")),
        }
    }

    /// One dimension.
    pub fn vector(&self) -> Result<usize> {
        match *self.shape() {
            [n] => Ok(n as usize),
            _ => Err(self.wrong("have one dimension")),
        }
    }

    /// `RuntimeError` and [`Error::Value`] unless both have one device and one shape.
    pub fn like(&self, other: &Input<'_>) -> Result<()> {
        self.same_device(other)?;
        if self.shape() == other.shape() {
            return Ok(());
        }
        Err(self.wrong(&format!(
            "have the shape of {}, {:?}",
            other.name,
            other.shape()
        )))
    }

    /// `RuntimeError` unless both are on one device.
    pub fn same_device(&self, other: &Input<'_>) -> Result<()> {
        let of = |i: &Input<'_>| (i.facts.device_type, i.facts.device_index);
        let device = |i: &Input<'_>| device_name(i.facts.device_type, i.facts.device_index);
        if of(self) == of(other) {
            return Ok(());
        }
        Err(Error::Device(format!(
            "{}: {} must be on the device of {}, {}, got {}",
            self.class,
            self.name,
            other.name,
            device(other),
            device(self)
        )))
    }

    /// [`Input::rows`], or a [`Error::Value`] about this argument.
    pub fn dense_rows<E: Element + super::Stored>(&self) -> Result<Rows<'_, E>> {
        self.rows::<E>()
            .ok_or_else(|| self.wrong("be a dense matrix"))
    }

    /// A view of a two-dimensional CPU tensor. `None` unless [`Input::on_cpu`], of type `E`, and of
    /// two dimensions.
    pub fn rows<E: Element + super::Stored>(&self) -> Option<Rows<'_, E>> {
        let ([rows, cols], [row, col]) = (self.shape(), self.strides()) else {
            return None;
        };
        if !self.on_cpu() || self.dtype().map(Dtype::kind) != Some(E::KIND) {
            return None;
        }
        let (shape, strides) = (
            (*rows as usize, *cols as usize),
            (*row as isize, *col as isize),
        );
        // SAFETY: an ordinary tensor addresses live, aligned storage at all its indices; it is
        // borrowed for the lifetime of the view. Writing to an argument from another thread during
        // the call is a race in torch itself and excluded there too.
        Some(unsafe { Rows::strided(self.facts.data.cast_const().cast(), shape, strides) })
    }
}

/// # Safety
/// `data` has `len` elements of type `T`.
unsafe fn widened<T: Copy + Into<i64>>(data: *const std::ffi::c_void, len: usize) -> Vec<i64> {
    if len == 0 {
        return Vec::new(); // the address may be null
    }
    // SAFETY: per contract.
    let values = unsafe { std::slice::from_raw_parts(data.cast::<T>(), len) };
    values.iter().map(|&value| value.into()).collect()
}

/// A `TypeError` about a tensor without strides.
pub fn sparse(class: &str, name: &str) -> Error {
    Error::Type(format!(
        "{class}: {name} must be a dense tensor, got a sparse, mkldnn or nested one"
    ))
}

/// As torch spells it; tch panics for the kinds it does not know.
fn device_name(kind: i32, index: i32) -> String {
    let name = match kind {
        0 => "cpu",
        1 => "cuda",
        12 => "xpu",
        13 => "mps",
        14 => "meta",
        _ => "another device",
    };
    if index < 0 {
        name.to_owned()
    } else {
        format!("{name}:{index}")
    }
}

fn scalar_type_name(kind: i32) -> &'static str {
    match kind {
        0 => "uint8",
        1 => "int8",
        2 => "int16",
        3 => "int32",
        4 => "int64",
        5 => "float16",
        6 => "float32",
        7 => "float64",
        8..=10 => "a complex dtype",
        11 => "bool",
        12..=14 | 16 | 17 => "a quantized dtype",
        15 => "bfloat16",
        _ => "an unsupported dtype",
    }
}
