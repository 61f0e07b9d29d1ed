//! The autograd node that all fused operations share.
//!
//! Its backward pass is a [`Backward`] object. For a loss that is [`StoredGrads`]: forward stores the
//! gradient with respect to each input, and backward multiplies it by the incoming one. An operation
//! with too many outputs to store a gradient for each has its own. Under `create_graph` the results of
//! both would be constants to autograd, so the bridge evaluates the composite instead and lets autograd
//! differentiate it.

use super::input::Input;
use super::{Dtype, Owned, Stored, by_dtype, check, max_threads};
use crate::cuda;
use crate::error::{Error, Result};
use crate::kernels::element::Element;
use crate::kernels::parallel::threads_for;
use crate::kernels::real::Real;
use crate::kernels::rows::Rows;
use crate::kernels::scale::{Factors, scale};
use std::ffi::{CStr, CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use tch::{Kind, Tensor};
use torch_sys::C_tensor;

/// Elements that one thread scales in the time it takes to start another.
const GRAIN: usize = 1 << 18;

/// A loss in differentiable operations, as a function of the node's inputs.
pub type Composite = Box<dyn Fn(&[Tensor]) -> Result<Tensor> + Send + Sync>;

/// A tensor that a [`Composite`] owns and does not differentiate.
pub struct Constant(pub Tensor);

// SAFETY: at::Tensor's reference count is atomic, and nothing writes the metadata of a tensor that
// only the composite holds.
unsafe impl Sync for Constant {}

impl Constant {
    /// The tensor. A method, so that a closure captures the whole struct and not the field.
    pub fn get(&self) -> &Tensor {
        &self.0
    }
}

/// A gradient as forward stored it: contiguous, and times `scale` and the divisor.
pub struct StoredGrad {
    /// The gradient times `scale` and `divisor`.
    pub tensor: Tensor,
    /// Positive; what [`crate::kernels::Loss::scale`] says.
    pub scale: f64,
    /// A further divisor, a zero-dimensional float32 tensor, if forward computed it on a device and did not wait.
    pub divisor: Option<Tensor>,
    /// The CUDA graph that forward was captured into, if any.
    pub capture: Option<u64>,
    /// On a device, where the gradient is large: a byte for each row, 0 where the row is 0 or NaN throughout.
    pub chosen: Option<Tensor>,
    /// Whether the tensor is transposed: laid out like an input whose columns are contiguous.
    pub by_columns: bool,
}

impl StoredGrad {
    /// Without a divisor on a device.
    pub fn new(tensor: Tensor, scale: f64) -> Self {
        Self {
            tensor,
            scale,
            divisor: None,
            capture: None,
            chosen: None,
            by_columns: false,
        }
    }

    /// See [`Backward::widen`].
    pub fn widen(&mut self) -> Result<()> {
        if self.tensor.f_kind()? == Kind::Half {
            self.tensor = self.tensor.f_to_kind(Kind::Float)?;
        }
        Ok(())
    }

    /// The same tensors.
    fn shallow_clone(&self) -> Self {
        Self {
            tensor: self.tensor.shallow_clone(),
            scale: self.scale,
            divisor: self.divisor.as_ref().map(Tensor::shallow_clone),
            capture: self.capture,
            chosen: self.chosen.as_ref().map(Tensor::shallow_clone),
            by_columns: self.by_columns,
        }
    }
}

/// Room for the gradient with respect to an input, where one is wanted.
pub struct Room<E> {
    room: Option<Owned<E>>,
    by_columns: bool,
}

impl<E: Element + Stored> Room<E> {
    /// In the shape of `input`.
    pub fn of(input: &Input<'_>) -> Result<Self> {
        Self::laid_out(input, false)
    }

    /// Contiguous row by row, or column by column.
    pub fn laid_out(input: &Input<'_>, by_columns: bool) -> Result<Self> {
        let mut shape = input.shape().to_vec();
        if by_columns {
            shape.reverse();
        }
        let room = input.wants_grad().then(|| Owned::new(&shape));
        Ok(Self {
            room: room.transpose()?,
            by_columns,
        })
    }

    /// None, although one is wanted.
    pub fn left_out() -> Self {
        Self {
            room: None,
            by_columns: false,
        }
    }

    /// Where a kernel writes it.
    pub fn slice(&mut self) -> Option<&mut [E]> {
        self.room.as_mut().map(Owned::slice)
    }

    /// The gradient that a kernel wrote, multiplied by `scale`.
    pub fn stored(self, scale: f64) -> Option<StoredGrad> {
        let by_columns = self.by_columns;
        self.room.map(|grad| StoredGrad {
            by_columns,
            ..StoredGrad::new(grad.into_tensor(), scale)
        })
    }
}

/// The backward pass of a node.
pub trait Backward: Send {
    /// The gradient with respect to each input of the node, `None` for one that wants none. `last`
    /// says that the object is released after this call, so that its tensors may be moved out.
    fn grads(&mut self, incoming: &Tensor, last: bool) -> Result<Vec<Option<Tensor>>>;

    /// Makes float16 gradients float32 from now on: without the scale that they are stored with, many would
    /// underflow to 0.
    fn widen(&mut self) -> Result<()> {
        Ok(())
    }
}

/// One stored gradient for each input, `None` for an input that wants none.
struct StoredGrads(Vec<Option<StoredGrad>>);

impl Backward for StoredGrads {
    fn grads(&mut self, incoming: &Tensor, last: bool) -> Result<Vec<Option<Tensor>>> {
        let incoming = Input::new("backward", "grad_output", incoming)?;
        self.0
            .iter_mut()
            .map(|slot| scaled(slot, &incoming, last))
            .collect()
    }

    fn widen(&mut self) -> Result<()> {
        self.0.iter_mut().flatten().try_for_each(StoredGrad::widen)
    }
}

/// The gradient in `slot` times `incoming`, if there is one. The `last` pass moves it out of `slot`.
pub fn scaled(
    slot: &mut Option<StoredGrad>,
    incoming: &Input<'_>,
    last: bool,
) -> Result<Option<Tensor>> {
    let grad = if last {
        slot.take()
    } else {
        slot.as_ref().map(StoredGrad::shallow_clone)
    };
    grad.map(|grad| times(grad, incoming, last)).transpose()
}

struct State {
    inputs: usize,
    /// `None` once released.
    passes: Option<(Box<dyn Backward>, Composite)>,
}

/// Mirror of `tllib_vtable` in node.cpp.
#[repr(C)]
struct Vtable {
    backward:
        unsafe extern "C" fn(*mut c_void, *const C_tensor, bool, *mut *mut C_tensor) -> *mut c_char,
    composite:
        unsafe extern "C" fn(*mut c_void, *const *mut C_tensor, *mut *mut C_tensor) -> *mut c_char,
    widen: unsafe extern "C" fn(*mut c_void) -> *mut c_char,
    release: unsafe extern "C" fn(*mut c_void),
    drop: unsafe extern "C" fn(*mut c_void),
}

static VTABLE: Vtable = Vtable {
    backward,
    composite,
    widen,
    release,
    drop: drop_state,
};

unsafe extern "C" {
    fn tllib_attach(
        loss: *const C_tensor,
        inputs: *const *const C_tensor,
        count: usize,
        state: *mut c_void,
        vtable: *const Vtable,
        label: *const c_char,
    ) -> *mut c_char;
    fn tllib_gradients(
        loss: *const C_tensor,
        grads: *mut *mut C_tensor,
        count: usize,
        found: *mut bool,
    ) -> *mut c_char;
}

/// Makes `loss` differentiable with respect to `inputs`, with one stored gradient each (`None` for
/// an input that wants none). If none wants one, nothing happens, and no composite is made. `label` is the node's
/// name, as in `MccBackward`.
pub fn attach<F>(
    label: &'static CStr,
    loss: &Tensor,
    inputs: &[&Tensor],
    grads: impl Into<Vec<Option<StoredGrad>>> + AsRef<[Option<StoredGrad>]>,
    composite: impl FnOnce() -> Result<F>,
) -> Result<()>
where
    F: Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static,
{
    debug_assert_eq!(inputs.len(), grads.as_ref().len());
    if grads.as_ref().iter().all(Option::is_none) {
        return Ok(());
    }
    let stored = Box::new(StoredGrads(grads.into()));
    attach_with(label, loss, inputs, stored, Box::new(composite()?))
}

/// Makes `output` differentiable with respect to `inputs`, with a backward pass of its own.
pub fn attach_with(
    label: &'static CStr,
    output: &Tensor,
    inputs: &[&Tensor],
    backward: Box<dyn Backward>,
    composite: Composite,
) -> Result<()> {
    let pointers: Vec<_> = inputs.iter().map(|t| t.as_ptr()).collect();
    let state = State {
        inputs: inputs.len(),
        passes: Some((backward, composite)),
    };
    let state = Box::into_raw(Box::new(state));
    // SAFETY: all tensors are live; the bridge takes ownership of the state and passes it only to
    // `VTABLE`'s functions, `drop` last and once.
    check(unsafe {
        tllib_attach(
            output.as_ptr(),
            pointers.as_ptr(),
            pointers.len(),
            state.cast(),
            &raw const VTABLE,
            label.as_ptr(),
        )
    })
}

/// The gradients of `loss` with respect to the first `count` inputs of its node, which it releases; float16 ones as
/// float32. `None` if the node is not ours, was released or has fewer inputs.
pub fn gradients(loss: &Tensor, count: usize) -> Result<Option<Vec<Option<Tensor>>>> {
    let mut raw = vec![std::ptr::null_mut(); count];
    let mut found = false;
    // SAFETY: the loss is live; there is room for `count` tensors, which are ours afterwards.
    check(unsafe { tllib_gradients(loss.as_ptr(), raw.as_mut_ptr(), count, &raw mut found) })?;
    let grads = raw
        .into_iter()
        // SAFETY: null, or a tensor whose ownership the bridge has passed on.
        .map(|grad| (!grad.is_null()).then(|| unsafe { Tensor::from_ptr(grad) }));
    Ok(found.then(|| grads.collect()))
}

/// Runs `body`; an error or a panic becomes a message that the bridge throws and frees.
fn guarded(body: impl FnOnce() -> Result<()>) -> *mut c_char {
    let done =
        catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| Err(Error::panicked(&*panic)));
    let Err(error) = done else {
        return std::ptr::null_mut();
    };
    let text = CString::new(error.to_string().replace('\0', " ")).unwrap_or_default();
    // SAFETY: strdup copies a valid NUL-terminated string into memory that free() can release.
    unsafe { strdup(text.as_ptr()) }
}

unsafe extern "C" {
    fn strdup(text: *const c_char) -> *mut c_char;
}

/// # Safety
/// `state` comes from `attach`; `incoming` is a live tensor; `out` has a place for each input.
unsafe extern "C" fn backward(
    state: *mut c_void,
    incoming: *const C_tensor,
    last: bool,
    out: *mut *mut C_tensor,
) -> *mut c_char {
    guarded(|| {
        // SAFETY: per contract; the bridge holds the node's mutex, so the borrow is exclusive.
        let state = unsafe { &mut *state.cast::<State>() };
        // SAFETY: per contract; this adds a reference, so dropping it is balanced.
        let incoming = unsafe { Tensor::clone_from_ptr(incoming.cast_mut()) };
        let Some((pass, _)) = &mut state.passes else {
            return Ok(());
        };
        let grads = pass.grads(&incoming, last)?;
        for (k, grad) in grads.into_iter().take(state.inputs).enumerate() {
            if let Some(grad) = grad {
                let leaked = std::mem::ManuallyDrop::new(grad);
                // SAFETY: `out` has a place for each input, and the bridge deletes the tensor.
                unsafe { *out.add(k) = leaked.as_ptr().cast_mut() };
            }
        }
        Ok(())
    })
}

/// `grad * incoming / (scale * divisor)`. `own` says that the memory of `grad` may be reused.
fn times(stored: StoredGrad, incoming: &Input<'_>, own: bool) -> Result<Tensor> {
    let by_columns = stored.by_columns;
    let scaled = as_it_lies(stored, incoming, own)?;
    Ok(if by_columns { scaled.f_tr()? } else { scaled })
}

/// Like [`times`], without transposing a gradient that is laid out by columns.
fn as_it_lies(stored: StoredGrad, incoming: &Input<'_>, own: bool) -> Result<Tensor> {
    if let Some(out) = cuda::scale::scale(&stored, incoming, own)? {
        return Ok(out);
    }
    let StoredGrad {
        tensor: mut grad,
        scale,
        divisor,
        by_columns,
        ..
    } = stored;
    let on_cpu = Input::new("backward", "gradient", &grad)?;
    // Those of the input.
    let rows = if by_columns {
        on_cpu.shape().last()
    } else {
        on_cpu.shape().first()
    };
    let factors = numbers(incoming, rows.copied().unwrap_or(1));
    if let (Some(dtype), Some(mut factors), true) = (on_cpu.dtype(), factors, on_cpu.on_cpu()) {
        for factor in &mut factors {
            *factor /= scale;
        }
        return multiplied(grad, dtype, &factors, by_columns, own);
    }
    let kind = grad.f_kind()?;
    let mut incoming = incoming.tensor.shallow_clone();
    // With a loss for each row, one incoming value scales all of dimension 1.
    if !by_columns && (1..grad.dim()).contains(&incoming.dim()) {
        incoming = incoming.f_unsqueeze(1)?;
    }
    if matches!(kind, Kind::Half | Kind::BFloat16) {
        grad = grad.f_to_kind(Kind::Float)?;
    }
    let mut out = grad.f_mul(&incoming)?;
    #[allow(clippy::float_cmp, reason = "exactly one changes nothing")]
    if scale != 1.0 {
        out = out.f_mul_scalar(1.0 / scale)?;
    }
    if let Some(divisor) = divisor {
        out = out.f_div(&divisor)?;
    }
    Ok(out.f_to_kind(kind)?)
}

/// `grad`, on the CPU, times one factor for all or one for each row of the input.
fn multiplied(
    grad: Tensor,
    dtype: Dtype,
    factors: &[f64],
    by_columns: bool,
    own: bool,
) -> Result<Tensor> {
    let input = Input::new("backward", "gradient", &grad)?;
    let (data, len) = (input.data(), input.numel());
    let each = if by_columns && factors.len() > 1 {
        Factors::Columns(factors)
    } else {
        Factors::Rows(factors)
    };
    let threads = threads_for(len, GRAIN, max_threads());
    by_dtype!(dtype, E => {
        if own {
            #[allow(clippy::float_cmp, reason = "exactly one changes nothing")]
            if factors.iter().any(|&factor| factor != 1.0) && len > 0 {
                // SAFETY: a stored gradient is contiguous with `len` elements of `E`, and
                // `own` says that the node, which moved it out, was its only holder.
                let slice = unsafe { std::slice::from_raw_parts_mut(data.cast::<E>(), len) };
                scale(None, each, slice, threads);
            }
            Ok(grad)
        } else {
            let mut out = Owned::<E>::new(input.shape())?;
            // SAFETY: as above, and only read.
            let values = unsafe { if len == 0 { &[][..] } else { std::slice::from_raw_parts(data.cast::<E>(), len) } };
            scale(Some(values), each, out.slice(), threads);
            Ok(out.into_tensor())
        }
    })
}

/// The values of an ordinary CPU tensor that is zero-dimensional, or has one dimension of `rows` elements; a single
/// value if its stride is 0, as in the gradient of a sum.
fn numbers(input: &Input<'_>, rows: i64) -> Option<Vec<f64>> {
    let (count, stride) = match (input.shape(), input.strides()) {
        ([], _) => (1, 0),
        (&[n], &[0]) if n > 0 => (1, 0),
        (&[n], &[stride]) if n == rows => (n as usize, stride as isize),
        _ => return None,
    };
    let dtype = input.dtype().filter(|_| input.on_cpu())?;
    if count == 0 {
        return Some(Vec::new()); // the address may be null
    }
    by_dtype!(dtype, E => {
        let data = input.data().cast_const().cast::<E>();
        // SAFETY: an ordinary tensor of `count` elements of type `E`, `stride` apart.
        let values = unsafe { Rows::strided(data, (1, count), (0, stride)) };
        let mut scratch = values.scratch();
        Some(values.in_turn(0, &mut scratch).iter().map(|value| value.to_f64()).collect())
    })
}

/// # Safety
/// `state` comes from `attach`; `inputs` holds as many live tensors as `attach` was given; `out` is
/// writable.
unsafe extern "C" fn composite(
    state: *mut c_void,
    inputs: *const *mut C_tensor,
    out: *mut *mut C_tensor,
) -> *mut c_char {
    guarded(|| {
        // SAFETY: per contract; the bridge holds the node's mutex.
        let state = unsafe { &*state.cast::<State>() };
        let inputs: Vec<_> = (0..state.inputs)
            // SAFETY: per contract; each clone adds a reference.
            .map(|k| unsafe { Tensor::clone_from_ptr(*inputs.add(k)) })
            .collect();
        let Some((_, formula)) = &state.passes else {
            return Ok(());
        };
        let loss = std::mem::ManuallyDrop::new(formula(&inputs)?);
        // SAFETY: per contract; the bridge deletes the tensor.
        unsafe { *out = loss.as_ptr().cast_mut() };
        Ok(())
    })
}

/// # Safety
/// `state` comes from `attach` and was not dropped.
unsafe extern "C" fn widen(state: *mut c_void) -> *mut c_char {
    guarded(|| {
        // SAFETY: per contract; the bridge holds the node's mutex.
        let state = unsafe { &mut *state.cast::<State>() };
        match &mut state.passes {
            Some((pass, _)) => pass.widen(),
            None => Ok(()),
        }
    })
}

/// # Safety
/// `state` comes from `attach` and was not dropped.
unsafe extern "C" fn release(state: *mut c_void) {
    // SAFETY: per contract; the bridge holds the node's mutex.
    let state = unsafe { &mut *state.cast::<State>() };
    state.passes = None;
}

/// # Safety
/// `state` comes from `attach` and is not used afterwards.
unsafe extern "C" fn drop_state(state: *mut c_void) {
    // SAFETY: per contract.
    drop(unsafe { Box::from_raw(state.cast::<State>()) });
}
