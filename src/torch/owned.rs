//! New tensors of our own.

use super::{Dtype, Stored, Without, by_dtype};
use crate::error::Result;
use crate::kernels::element::Element;
use crate::kernels::real::Real;
use crate::kernels::rows;
use std::marker::PhantomData;
use tch::{Device, Tensor};

/// A contiguous CPU tensor that was just allocated and that nobody else has seen, so that its
/// memory may be written through a slice.
pub struct Owned<T> {
    tensor: Tensor,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Stored> Owned<T> {
    /// Allocates. The contents are arbitrary until written.
    pub fn new(shape: &[i64]) -> Result<Self> {
        let _guard = Without::transforms();
        let tensor = Tensor::f_empty(shape, (T::KIND, Device::Cpu))?;
        let len = shape.iter().map(|&n| n as usize).product();
        Ok(Self {
            tensor,
            len,
            element: PhantomData,
        })
    }

    /// Allocates and lets libtorch write the contents.
    ///
    /// # Safety
    /// `write` keeps no other tensor of the same memory.
    pub unsafe fn written_by(
        shape: &[i64],
        write: impl FnOnce(&Tensor) -> Result<()>,
    ) -> Result<Self> {
        let owned = Self::new(shape)?;
        write(&owned.tensor)?;
        Ok(owned)
    }

    /// The elements.
    pub fn slice(&mut self) -> &mut [T] {
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: the tensor is contiguous, has `len` elements of `T` (any bits are a valid T), and
        // is not shared: `self` is its only owner until `into_tensor`.
        unsafe { std::slice::from_raw_parts_mut(self.tensor.data_ptr().cast(), self.len) }
    }

    /// The tensor, to be given away.
    pub fn into_tensor(self) -> Tensor {
        self.tensor
    }
}

/// A CPU tensor of no dimensions.
pub fn scalar(value: f64, dtype: Dtype) -> Result<Tensor> {
    by_dtype!(dtype, E => {
        let mut out = Owned::<E>::new(&[])?;
        out.slice()[0] = E::store(<E as Element>::Acc::of(value));
        Ok(out.into_tensor())
    })
}

/// A CPU tensor of one dimension.
pub fn vector(values: &[f64], dtype: Dtype) -> Result<Tensor> {
    by_dtype!(dtype, E => {
        let mut out = Owned::<E>::new(&[values.len() as i64])?;
        rows::round(values, out.slice());
        Ok(out.into_tensor())
    })
}
