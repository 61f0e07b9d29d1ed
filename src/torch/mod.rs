//! What tch does not offer: tensor facts in one call, the autograd node of the fused losses, version
//! counters, and torch's threads. The C++ halves are `bridge.cpp`, `node.cpp`, `device.cpp`, `unpack.cpp`
//! (what needs torch's Python headers) and `team.cpp`.

pub mod autograd;
pub mod device;
pub mod input;
pub mod pages;
pub mod product;
pub mod saved;
pub mod team;

use crate::error::{Error, Result};
use crate::kernels::element::{Bf16, Element, F16};
use std::ffi::{CStr, c_char, c_void};
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

unsafe extern "C" {
    fn tllib_default_dtype() -> i32;
    fn tllib_composites_only() -> bool;
    fn tllib_torch_version() -> *const c_char;
    fn tllib_average(
        targets: *const *const C_tensor,
        sources: *const *const C_tensor,
        count: usize,
        keep: f64,
        take: f64,
    ) -> *mut c_char;
    fn tllib_bump_version(tensor: *const C_tensor);
    fn tllib_version(tensor: *const C_tensor) -> i64;
    fn tllib_aliased(tensor: *const C_tensor) -> bool;
    fn tllib_held(tensor: *const C_tensor) -> bool;
    fn tllib_same(a: *const C_tensor, b: *const C_tensor) -> bool;
    fn tllib_free(text: *mut c_char);
    fn tllib_without_autocast() -> *mut c_void;
    fn tllib_without_transforms() -> *mut c_void;
    fn tllib_without_inference() -> *mut c_void;
    fn tllib_drop_guard(guard: *mut c_void);
}

/// A failure reported by the bridge: null, or a message that is ours to free.
fn check(failure: *mut c_char) -> Result<()> {
    if failure.is_null() {
        return Ok(());
    }
    // SAFETY: the bridge returns null or a NUL-terminated string from malloc, owned by us.
    let text = unsafe { CStr::from_ptr(failure).to_string_lossy().into_owned() };
    // SAFETY: as above; it is not used after this.
    unsafe { tllib_free(failure) };
    Err(Error::Bridge(text))
}

/// Tells autograd that `tensor` was written.
pub fn bump_version(tensor: &Tensor) {
    // SAFETY: a `Tensor` always points to a live `at::Tensor`.
    unsafe { tllib_bump_version(tensor.as_ptr()) }
}

/// `target <- keep * target + take * source` for all pairs, in place and hidden from autograd, in two foreach
/// operations of torch. On a device these take few launches if all tensors have one dtype, and those of a pair
/// the same strides, without gaps.
pub fn average(
    targets: &[input::Borrowed],
    sources: &[input::Borrowed],
    keep: f64,
    take: f64,
) -> Result<()> {
    let count = targets.len().min(sources.len());
    // SAFETY: a `Borrowed` is a pointer to a live tensor, and there are at least `count` of each.
    check(unsafe {
        tllib_average(
            targets.as_ptr().cast(),
            sources.as_ptr().cast(),
            count,
            keep,
            take,
        )
    })
}

/// Whether `TLLIB_RS_COMPOSITE=1` asks for libtorch's operations in place of all kernels.
pub fn composites_only() -> bool {
    // SAFETY: it reads the environment once.
    unsafe { tllib_composites_only() }
}

/// The version of the torch that the C++ half was compiled against.
pub fn built_for() -> &'static str {
    // SAFETY: a constant text.
    unsafe { CStr::from_ptr(tllib_torch_version()) }
        .to_str()
        .unwrap_or("?")
}

/// How often `tensor` was written, as far as torch knows.
pub fn version(tensor: &Tensor) -> i64 {
    // SAFETY: as above.
    unsafe { tllib_version(tensor.as_ptr()) }
}

/// Whether anybody else can reach the memory of `tensor`: another tensor, a view, a numpy array, a
/// storage object. The caller holds the GIL.
pub fn aliased(tensor: &Tensor) -> bool {
    // SAFETY: as above.
    unsafe { tllib_aliased(tensor.as_ptr()) }
}

/// Whether both are one tensor, to autograd too.
pub fn same(a: &Tensor, b: &Tensor) -> bool {
    // SAFETY: as above.
    unsafe { tllib_same(a.as_ptr(), b.as_ptr()) }
}

/// Whether anybody but the caller, who has one reference, holds this very tensor. The caller holds the GIL.
pub fn held(tensor: &Tensor) -> bool {
    // SAFETY: as above.
    unsafe { tllib_held(tensor.as_ptr()) }
}

/// Runs `body` with grad mode off, and leaves it as it was even if `body` unwinds: tch's function of this name does not.
pub fn no_grad<T>(body: impl FnOnce() -> T) -> T {
    let _guard = tch::no_grad_guard();
    body()
}

/// Excludes a layer of torch's dispatch, or a mode, from this thread's operations until it is dropped, on the same
/// thread (it is not `Send`).
pub struct Without {
    guard: *mut c_void,
}

impl Without {
    /// Excludes autocast.
    pub fn autocast() -> Self {
        // SAFETY: it takes no arguments; the guard is freed once, in `drop`.
        let guard = unsafe { tllib_without_autocast() };
        Self { guard }
    }

    /// Leaves inference mode: tensors that are allocated may be written anywhere. Operations are recorded for autograd.
    pub fn inference() -> Self {
        // SAFETY: as above.
        let guard = unsafe { tllib_without_inference() };
        Self { guard }
    }

    /// Excludes the transforms of `torch.func`. No operation accepts tensors that they wrapped then.
    pub fn transforms() -> Self {
        // SAFETY: as above.
        let guard = unsafe { tllib_without_transforms() };
        Self { guard }
    }
}

impl Drop for Without {
    fn drop(&mut self) {
        // SAFETY: the guard comes from this thread, and may be null.
        unsafe { tllib_drop_guard(self.guard) }
    }
}

/// The element types that have kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// torch.float32
    F32,
    /// torch.float64
    F64,
    /// torch.float16
    F16,
    /// torch.bfloat16
    Bf16,
}

impl Dtype {
    /// From a `c10::ScalarType`.
    pub fn of(scalar_type: i32) -> Option<Self> {
        match scalar_type {
            5 => Some(Self::F16),
            6 => Some(Self::F32),
            7 => Some(Self::F64),
            15 => Some(Self::Bf16),
            _ => None,
        }
    }

    /// tch's name for it.
    pub fn kind(self) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::F64 => Kind::Double,
            Self::F16 => Kind::Half,
            Self::Bf16 => Kind::BFloat16,
        }
    }

    /// `torch.get_default_dtype()`.
    pub fn default() -> Self {
        // SAFETY: reads one global.
        Self::of(unsafe { tllib_default_dtype() }).unwrap_or(Self::F32)
    }

    /// What torch promotes a pair to.
    pub fn promote(self, other: Self) -> Self {
        match (self, other) {
            (a, b) if a == b => a,
            (Self::F64, _) | (_, Self::F64) => Self::F64,
            _ => Self::F32,
        }
    }

    /// What a float32 tensor promotes it to.
    pub fn at_least_f32(self) -> Self {
        if self == Self::F64 { self } else { Self::F32 }
    }
}

/// Names the [`Element`] of a [`Dtype`]: `by_dtype!(dtype, E => body)`.
macro_rules! by_dtype {
    ($dtype:expr, $e:ident => $body:expr) => {
        match $dtype {
            $crate::torch::Dtype::F32 => {
                type $e = f32;
                $body
            }
            $crate::torch::Dtype::F64 => {
                type $e = f64;
                $body
            }
            $crate::torch::Dtype::F16 => {
                type $e = $crate::kernels::element::F16;
                $body
            }
            $crate::torch::Dtype::Bf16 => {
                type $e = $crate::kernels::element::Bf16;
                $body
            }
        }
    };
}
pub(crate) use by_dtype;

/// Types that an [`Owned`] tensor can hold.
pub trait Stored: Copy {
    /// tch's name for the type.
    const KIND: Kind;
}
impl Stored for f32 {
    const KIND: Kind = Kind::Float;
}
impl Stored for f64 {
    const KIND: Kind = Kind::Double;
}
impl Stored for F16 {
    const KIND: Kind = Kind::Half;
}
impl Stored for Bf16 {
    const KIND: Kind = Kind::BFloat16;
}
impl Stored for i64 {
    const KIND: Kind = Kind::Int64;
}

/// A contiguous CPU tensor that was just allocated and that nobody else has seen, so that its
/// memory may be written through a slice.
pub struct Owned<T> {
    tensor: Tensor,
    len: usize,
    element: std::marker::PhantomData<T>,
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
            element: std::marker::PhantomData,
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

/// Elements that are copied to page-locked memory so that nobody waits; torch keeps such memory.
const UPLOADED: usize = 1 << 17;

/// `tensor` as `kind` on the device of `like`, of whatever type: tch has names for a few device types, and takes all
/// others for MPS. A copy of at most [`UPLOADED`] elements from the CPU to a CUDA device does not block.
pub fn beside(tensor: &Tensor, kind: Kind, like: &Tensor) -> Result<Tensor> {
    if let (Device::Cpu, Device::Cuda(index)) = (tensor.device(), like.device())
        && tensor.numel() <= UPLOADED
    {
        return device::upload(&tensor.f_to_kind(kind)?, index);
    }
    if let known @ (Device::Cpu | Device::Cuda(_)) = like.device() {
        return Ok(tensor.f_to_device_(known, kind, false, false)?);
    }
    let nothing = like.f_reshape([-1])?.f_narrow(0, 0, 0)?;
    Ok(tensor.f_type_as(&nothing.f_to_kind(kind)?)?)
}

/// `tensor` detached, as `kind` and contiguous; it shares the memory of `tensor` if that needs no copy.
pub fn dense(tensor: &Tensor, kind: Kind) -> Result<Tensor> {
    Ok(tensor.f_detach()?.f_to_kind(kind)?.f_contiguous()?)
}

/// A CPU tensor of no dimensions.
pub fn scalar(value: f64, dtype: Dtype) -> Result<Tensor> {
    by_dtype!(dtype, E => {
        use crate::kernels::real::Real;
        let mut out = Owned::<E>::new(&[])?;
        out.slice()[0] = E::store(<E as Element>::Acc::of(value));
        Ok(out.into_tensor())
    })
}

/// A CPU tensor of one dimension.
pub fn vector(values: &[f64], dtype: Dtype) -> Result<Tensor> {
    by_dtype!(dtype, E => {
        use crate::kernels::real::Real;
        let mut out = Owned::<E>::new(&[values.len() as i64])?;
        for (o, &value) in out.slice().iter_mut().zip(values) {
            *o = E::store(<E as Element>::Acc::of(value));
        }
        Ok(out.into_tensor())
    })
}

/// `torch.get_num_threads()`, the most threads that a kernel may use.
pub fn max_threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1)
}
