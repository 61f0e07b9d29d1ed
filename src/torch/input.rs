//! A tensor argument of a method, and the checks of it.

use super::facts::Facts;
use super::{Dtype, ScalarType, Stored};
use crate::error::{Error, Result};
use crate::kernels::element::Element;
use crate::kernels::rows::Rows;
use tch::{Kind, Tensor};

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
        if !facts.strided() {
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
        self.of_type(ScalarType::INT64)
    }

    /// `TypeError` unless this is the tensor's dtype.
    pub fn of_type(&self, scalar_type: ScalarType) -> Result<()> {
        if self.scalar_type() == scalar_type {
            return Ok(());
        }
        Err(self.unsupported(scalar_type.name()))
    }

    /// A [`Error::Type`] about this argument's dtype.
    pub fn unsupported(&self, expected: &str) -> Error {
        Error::Type(format!(
            "{}: {} must be {expected}, got {}",
            self.class,
            self.name,
            self.dtype_name()
        ))
    }

    /// `TypeError` unless the tensor holds real numbers, integers or booleans.
    pub fn real(&self) -> Result<()> {
        if self.scalar_type().real() {
            return Ok(());
        }
        Err(Error::Type(format!(
            "{}: {} must hold real numbers or booleans, got {}",
            self.class,
            self.name,
            self.dtype_name()
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
        match self.scalar_type() {
            ScalarType::INT32 | ScalarType::INT64 => Ok(()),
            _ => Err(self.unsupported("int64 or int32")),
        }
    }

    /// The tensor as int64: the tensor itself if that is its dtype.
    pub fn to_int64(&self) -> Result<Tensor> {
        if self.scalar_type() == ScalarType::INT64 {
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
        if !self.on_known_device() {
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
            match self.scalar_type() {
                ScalarType::UINT8 => widened::<u8>(data, self.numel()),
                ScalarType::INT8 => widened::<i8>(data, self.numel()),
                ScalarType::INT16 => widened::<i16>(data, self.numel()),
                ScalarType::INT32 => widened::<i32>(data, self.numel()),
                ScalarType::INT64 => widened::<i64>(data, self.numel()),
                ScalarType::BOOL => {
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
        if self.beside(other) {
            return Ok(());
        }
        Err(Error::Device(format!(
            "{}: {} must be on the device of {}, {}, got {}",
            self.class,
            self.name,
            other.name,
            other.device_name(),
            self.device_name()
        )))
    }

    /// [`Input::rows`], or a [`Error::Value`] about this argument.
    pub fn dense_rows<E: Element + Stored>(&self) -> Result<Rows<'_, E>> {
        self.rows::<E>()
            .ok_or_else(|| self.wrong("be a dense matrix"))
    }

    /// All elements of a contiguous matrix, or a [`Error::Value`] about this argument.
    pub fn whole<E: Element + Stored>(&self) -> Result<&[E]> {
        self.rows::<E>()
            .and_then(|rows| rows.whole())
            .ok_or_else(|| self.wrong("be contiguous"))
    }

    /// A view of a two-dimensional CPU tensor. `None` unless [`Input::on_cpu`], of type `E`, and of
    /// two dimensions.
    pub fn rows<E: Element + Stored>(&self) -> Option<Rows<'_, E>> {
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
        Some(unsafe { Rows::strided(self.data().cast_const().cast(), shape, strides) })
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
