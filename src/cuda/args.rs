//! Kernel arguments. A kernel takes one struct by value; its Rust mirror is `#[repr(C)]` and built of
//! these parts, which mirror those of common.cuh.

use super::device::{Counter, Stream};
use crate::error::Result;
use crate::torch::Dtype;
use crate::torch::facts::Facts;
use crate::torch::input::Input;
use std::ffi::c_void;
use tch::{Kind, Tensor};

/// A struct that a kernel takes by value.
///
/// # Safety
/// `#[repr(C)]`, and the fields are those of the struct in the kernel's source.
pub unsafe trait Args {}

/// `Matrix<T>`: memory and strides.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Matrix {
    data: *const c_void,
    row: i64,
    col: i64,
}

impl Matrix {
    /// Of a tensor of two dimensions.
    pub fn of(input: &Input<'_>) -> Result<Self> {
        let &[row, col] = input.strides() else {
            return Err(input.wrong("have two dimensions"));
        };
        Ok(Self {
            data: input.data(),
            row,
            col,
        })
    }
}

/// `Labels`: memory and stride of int64.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Labels {
    data: *const c_void,
    stride: i64,
}

impl Labels {
    /// Of an int64 tensor of one dimension.
    pub fn of(input: &Input<'_>) -> Result<Self> {
        input.int64()?;
        let &[stride] = input.strides() else {
            return Err(input.wrong("have one dimension"));
        };
        Ok(Self {
            data: input.data(),
            stride,
        })
    }
}

/// `Scalar`: one number, or numbers that follow each other, in a dtype that the source does not fix.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Scalar {
    to: *mut c_void,
    dtype: i32,
}

impl Scalar {
    /// The first element of a tensor of this launch.
    pub fn of(tensor: &Tensor, dtype: Dtype) -> Self {
        Self {
            to: tensor.data_ptr(),
            dtype: code(dtype),
        }
    }
}

/// `Numbers`: numbers to be read, of a dtype that the source does not fix.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Numbers {
    data: *const c_void,
    stride: i64,
    dtype: i32,
}

impl Numbers {
    /// No numbers.
    pub const NONE: Self = Self {
        data: std::ptr::null(),
        stride: 0,
        dtype: 0,
    };

    /// Of at most one dimension. A single number is broadcast to as many as the kernel reads.
    pub fn broadcast(input: &Input<'_>) -> Result<Self> {
        let dtype = kernel_dtype(input).ok_or_else(|| input.unsupported("a dtype of kernels"))?;
        let stride = match (input.shape(), input.strides()) {
            ([] | [1], _) => 0,
            (_, &[stride]) => stride,
            _ => return Err(input.wrong("have at most one dimension")),
        };
        Ok(Self {
            data: input.data(),
            stride,
            dtype: code(dtype),
        })
    }
}

/// How the sources number dtypes; float64 has no kernels.
pub fn code(dtype: Dtype) -> i32 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::Bf16 => 2,
        Dtype::F64 => -1,
    }
}

/// The memory of an optional tensor, or null.
pub fn pointer(tensor: Option<&Tensor>) -> *mut c_void {
    tensor.map_or(std::ptr::null_mut(), Tensor::data_ptr)
}

/// The address of an element in memory that holds several arrays.
pub fn place<T>(work: &Tensor, element: usize) -> *mut c_void {
    let first = work.data_ptr().cast::<T>();
    first.wrapping_add(element).cast::<c_void>()
}

/// `Gathering`: where the blocks of a grid leave their sums.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Gathering {
    partials: *mut c_void,
    done: *mut c_void,
}

impl Gathering {
    /// For a launch that gathers nothing.
    pub const NONE: Self = Self {
        partials: std::ptr::null_mut(),
        done: std::ptr::null_mut(),
    };

    /// Sums at `partials`, a place for each block and sum, float64.
    pub fn of(partials: *mut c_void, done: &Counter) -> Self {
        Self {
            partials,
            done: done.place(),
        }
    }
}

/// The memory of a [`Gathering`], to be kept until the launch.
pub struct Partials {
    sums: Tensor,
    done: Counter,
}

impl Partials {
    /// For `blocks` blocks with `each` sums.
    pub fn new(stream: &Stream, blocks: u32, each: i64) -> Result<Self> {
        Ok(Self {
            sums: stream.empty(&[i64::from(blocks) * each], Kind::Double)?,
            done: stream.counter()?,
        })
    }

    /// As the kernel takes it.
    pub fn args(&self) -> Gathering {
        Gathering::of(self.sums.data_ptr(), &self.done)
    }
}

/// The dtype of a tensor with these facts, if it has kernels: float64 has none.
pub fn kernel_dtype(facts: &Facts) -> Option<Dtype> {
    facts.dtype().filter(|&dtype| dtype != Dtype::F64)
}
