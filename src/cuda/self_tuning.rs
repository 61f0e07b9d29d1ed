//! Launches of `self_tuning.cu`.

use super::args::{self, Labels, Matrix};
use super::device::{Launch, Stream};
use super::inverse;
use super::plan::{FEW_ROWS, over_rows};
use crate::error::Result;
use crate::kernels::self_tuning::Shape;
use crate::torch::Dtype;
use crate::torch::input::Input;
use std::ffi::c_void;
use tch::{Kind, Tensor};

const STEM: &str = "self_tuning";
const THREADS: u32 = 256;
const CLASS: &str = "SelfTuning";

#[repr(C)]
struct Forward {
    queries: Matrix,
    keys: Matrix,
    rows: i64,
    dim: i32,
    products: Matrix,
    cols: i32,
    of_class: i32,
    labels: Labels,
    inverse_t: f32,
    out: *mut c_void,
    kept_keys: *mut c_void,
    kept_labels: *mut c_void,
}

// SAFETY: the fields of `Forward` in self_tuning.cu.
unsafe impl args::Args for Forward {}

/// Queries and keys of one dtype and their classes (int64), all on one device.
pub struct Rows<'a, 'b> {
    /// (minibatch, D)
    pub queries: &'a Input<'b>,
    /// (minibatch, D)
    pub keys: &'a Input<'b>,
    /// (minibatch,)
    pub labels: &'a Tensor,
    /// Of queries and keys.
    pub dtype: Dtype,
}

/// Log-probabilities, and what backward needs.
pub struct Scored {
    /// (minibatch, 1 + K C), float32.
    pub out: Tensor,
    /// Copies of keys and labels, where they are wanted.
    pub kept: Option<(Tensor, Tensor)>,
}

/// One product with the float32 `queue` (D, K C), and one launch.
pub fn forward(rows: &Rows<'_, '_>, queue: &Tensor, shape: Shape, keep: bool) -> Result<Scored> {
    let (count, dim) = rows.queries.matrix()?;
    let stream = Stream::current(rows.queries.device())?;
    let (n, columns) = (count as i64, queue.size2()?.1);
    let queries = rows.queries.tensor.f_detach()?.f_to_kind(Kind::Float)?;
    // With an output given, autocast leaves the product alone.
    let products = stream.empty(&[n, columns], Kind::Float)?;
    let products = queries.f_mm_out(&products, &queue.f_detach()?)?;
    let out = stream.empty(&[n, 1 + columns], Kind::Float)?;
    let kept = keep
        .then(|| -> Result<_> {
            let keys = stream.empty(&[n, dim as i64], rows.dtype.kind())?;
            Ok((keys, stream.empty(&[n], Kind::Int64)?))
        })
        .transpose()?;
    let args = Forward {
        queries: Matrix::of(rows.queries)?,
        keys: Matrix::of(rows.keys)?,
        rows: n,
        dim: dim as i32,
        products: Matrix::of(&Input::new(CLASS, "products", &products)?)?,
        cols: columns as i32,
        of_class: shape.keys as i32,
        labels: Labels::of(&Input::new(CLASS, "labels", rows.labels)?)?,
        inverse_t: inverse(shape.temperature),
        out: out.data_ptr(),
        kept_keys: args::pointer(kept.as_ref().map(|(keys, _)| keys)),
        kept_labels: args::pointer(kept.as_ref().map(|(_, labels)| labels)),
    };
    let shape = (count, columns as usize);
    let launch = over_rows(&stream, (STEM, "forward"), &FEW_ROWS, rows.dtype, shape)?;
    // SAFETY: matrices and labels of these shapes and this dtype on this device, results as large as the kernel
    // writes them; all are alive.
    unsafe { stream.launch(launch, &args)? };
    Ok(Scored { out, kept })
}

#[repr(C)]
struct Backward {
    incoming: Matrix,
    out: *const c_void,
    rows: i64,
    cols: i32,
    of_class: i32,
    labels: Labels,
    inverse_t: f32,
    keys: Matrix,
    dim: i32,
    products: *mut c_void,
    grad: *mut c_void,
}

// SAFETY: the fields of `Backward` in self_tuning.cu.
unsafe impl args::Args for Backward {}

/// The float32 gradient of the queries: one launch, and one product with the `queue` as forward saw it.
/// `incoming` is float32, `out` what [`forward`] returned.
pub fn backward(
    incoming: &Input<'_>,
    out: &Tensor,
    (keys, labels): (&Input<'_>, &Tensor),
    queue: &Tensor,
    shape: Shape,
) -> Result<Tensor> {
    let (rows, cols) = incoming.matrix()?;
    let (_, dim) = keys.matrix()?;
    let stream = Stream::current(incoming.device())?;
    let products = stream.empty(&[rows as i64, cols as i64 - 1], Kind::Float)?;
    let mut grad = stream.empty(&[rows as i64, dim as i64], Kind::Float)?;
    let args = Backward {
        incoming: Matrix::of(incoming)?,
        out: out.data_ptr(),
        rows: rows as i64,
        cols: cols as i32,
        of_class: shape.keys as i32,
        labels: Labels::of(&Input::new(CLASS, "labels", labels)?)?,
        inverse_t: inverse(shape.temperature),
        keys: Matrix::of(keys)?,
        dim: dim as i32,
        products: products.data_ptr(),
        grad: grad.data_ptr(),
    };
    let launch = over_rows(
        &stream,
        (STEM, "backward"),
        &FEW_ROWS,
        keys.floating()?,
        (rows, cols),
    )?;
    // SAFETY: `out` is contiguous with the shape of `incoming`, keys have as many rows as labels; all are on this
    // device and alive.
    unsafe { stream.launch(launch, &args)? };
    let _ = grad.f_addmm_(&products, &queue.f_tr()?)?;
    Ok(grad)
}

#[repr(C)]
struct Enqueue {
    keys: Matrix,
    labels: Labels,
    rows: i64,
    of_class: i64,
    classes: i64,
    dim: i32,
    queue: *mut c_void,
    row: i64,
    col: i64,
    pointers: *mut c_void,
    stride: i64,
    moved: *mut c_void,
    done: *mut c_void,
}

// SAFETY: the fields of `Enqueue` in self_tuning.cu.
unsafe impl args::Args for Enqueue {}

/// Writes `keys` (rows, D) of the classes `labels` (int64) into the float32 `queue` (D, K C) and moves the
/// `pointers` (C). One launch.
pub fn enqueue(
    keys: &Input<'_>,
    labels: &Tensor,
    (queue, pointers): (&Input<'_>, &Input<'_>),
    shape: Shape,
) -> Result<()> {
    let (rows, dim) = keys.matrix()?;
    let &[row, col] = queue.strides() else {
        return Err(queue.wrong("have two dimensions"));
    };
    let stream = Stream::current(keys.device())?;
    let moved = stream.empty(&[rows as i64], Kind::Int64)?;
    let done = stream.counter()?;
    let args = Enqueue {
        keys: Matrix::of(keys)?,
        labels: Labels::of(&Input::new(CLASS, "labels", labels)?)?,
        rows: rows as i64,
        of_class: shape.keys as i64,
        classes: pointers.vector()? as i64,
        dim: dim as i32,
        queue: queue.data(),
        row,
        col,
        pointers: pointers.data(),
        stride: pointers.strides().first().copied().unwrap_or(1),
        moved: moved.data_ptr(),
        done: done.place(),
    };
    let launch = Launch::of(STEM, keys.floating()?, ("enqueue", ""), THREADS);
    let launch = stream.sized(launch, rows)?;
    // SAFETY: the queue has D rows and K columns for each of the pointers; labels beyond these abort the kernel
    // before anything is written for them. All tensors are on this device and alive.
    unsafe { stream.launch(launch, &args)? };
    crate::torch::bump_version(queue.tensor);
    crate::torch::bump_version(pointers.tensor);
    Ok(())
}
