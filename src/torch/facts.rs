//! Everything that the checks and kernels ask of a tensor, read in one call.

use super::{Dtype, ScalarType, check, tllib_bump_version};
use crate::error::Result;
use std::ffi::{c_char, c_void};
use tch::{Device, Tensor};
use torch_sys::C_tensor;

/// `c10::DeviceType`
const CPU: i32 = 0;
const CUDA: i32 = 1;
const META: i32 = 14;

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
    data: *mut c_void,
    sizes: *const i64,
    strides: *const i64,
    ndim: i64,
    scalar_type: ScalarType,
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
    fn tllib_unpack(object: *mut c_void) -> *const C_tensor;
}

impl Facts {
    /// Of a tensor that the caller keeps for as long as the facts.
    pub(super) fn of(tensor: &Tensor) -> Result<Self> {
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
        // SAFETY: the bridge returned the address of `ndim` values that live as long as the tensor. Who calls
        // `Facts::of`, `Input` alone, borrows it; who calls `Borrowed::facts` promised to keep it.
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
        Dtype::of(self.scalar_type)
    }

    /// Whether it holds integers that fit into 64 bits, or booleans.
    pub fn integral(&self) -> bool {
        self.scalar_type.integral()
    }

    /// The dtype as torch numbers it.
    pub fn scalar_type(&self) -> ScalarType {
        self.scalar_type
    }

    /// The memory, null where it cannot be read.
    pub fn data(&self) -> *mut c_void {
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

    /// Whether it is on the CPU or on CUDA: of tensors on other devices it is not known whether they have memory.
    pub fn on_known_device(&self) -> bool {
        matches!(self.device_type, CPU | CUDA)
    }

    /// Whether both are on one device.
    pub fn beside(&self, other: &Self) -> bool {
        (self.device_type, self.device_index) == (other.device_type, other.device_index)
    }

    /// The device as torch spells it; tch panics for those it does not know.
    pub fn device_name(&self) -> String {
        let name = match self.device_type {
            CPU => "cpu",
            CUDA => "cuda",
            12 => "xpu",
            13 => "mps",
            META => "meta",
            _ => "another device",
        };
        if self.device_index < 0 {
            name.to_owned()
        } else {
            format!("{name}:{}", self.device_index)
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
        self.scalar_type.name()
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
    pub unsafe fn of(object: *mut c_void) -> Option<Self> {
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
        unsafe { tllib_bump_version(self.0) }
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
