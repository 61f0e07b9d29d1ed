//! Launches of `triplet.cu`: features, mining, loss.

use super::args::{self, Gathering, Labels, Matrix, Partials, Scalar};
use super::device::{Launch, Stream};
use super::plan::plan;
use crate::error::Result;
use crate::kernels::reid_loss::mining::ERROR;
use crate::kernels::reid_loss::triplet::Objective;
use crate::torch::Dtype;
use crate::torch::device::allows_tf32;
use crate::torch::input::Input;
use std::ffi::c_void;
use tch::{Kind, Tensor};

const CLASS: &str = "triplet";
const THREADS: u32 = 256;
/// Products that are kept at a time, for each thread that the device holds: the cache has most of them when
/// they are scanned, and no matrix of N x N is ever held.
const KEPT: usize = 64;
/// Most rows and columns of features: indices are 32-bit.
pub const LARGEST: i64 = 1 << 30;
/// The error of a key of mining in units of the squared norms where products are computed in TF32: each
/// factor may be off by 2^-10 of itself, twice the product by 2^-9 of the norms' mean square, and two keys are
/// compared.
const TF32_ERROR: f64 = 1.0 / 256.0;

#[repr(C)]
struct Prepare {
    x: Matrix,
    rows: i64,
    cols: i32,
    out: *mut c_void,
    squares: *mut c_void,
    norms: *mut c_void,
}

// SAFETY: the fields of `Prepare` in triplet.cu.
unsafe impl args::Args for Prepare {}

/// Features as the kernels take them.
pub struct Features {
    /// (N, F), float32, contiguous, outside any graph.
    pub tensor: Tensor,
    /// The squares of its rows, float32.
    squares: Tensor,
    /// What the rows were divided by, float64; negative where the norm was raised.
    pub norms: Option<Tensor>,
}

impl Features {
    /// Of float32, float16 or bfloat16 features. One launch.
    pub fn of(stream: &Stream, input: &Input<'_>, dtype: Dtype, normalize: bool) -> Result<Self> {
        let (rows, cols) = input.matrix()?;
        let itself = dtype == Dtype::F32 && input.contiguous() && !normalize;
        let tensor = if itself {
            input.tensor.f_detach()?
        } else {
            stream.empty(input.shape(), Kind::Float)?
        };
        let squares = stream.empty(&[rows as i64], Kind::Float)?;
        let norms = normalize
            .then(|| stream.empty(&[rows as i64], Kind::Double))
            .transpose()?;
        let args = Prepare {
            x: Matrix::of(input)?,
            rows: rows as i64,
            cols: cols as i32,
            out: args::pointer((!itself).then_some(&tensor)),
            squares: squares.data_ptr(),
            norms: args::pointer(norms.as_ref()),
        };
        let launch = plan(stream, rows, cols).launch("triplet", "prepare", dtype);
        // SAFETY: a matrix of this shape and dtype on this device, the results have as many rows, and all
        // tensors are alive.
        unsafe { stream.launch(launch, &args)? };
        Ok(Self {
            tensor,
            squares,
            norms,
        })
    }
}

#[repr(C)]
struct Mine {
    products: *const c_void,
    first: i64,
    rows: i64,
    anchors: i64,
    candidates: i32,
    dim: i32,
    teacher_dim: i32,
    u: *const c_void,
    v: *const c_void,
    u_squares: *const c_void,
    v_squares: *const c_void,
    u_labels: Labels,
    v_labels: Labels,
    teacher: *const c_void,
    error: f32,
    objective: i32,
    margin: f64,
    found: *mut c_void,
    offsets: *mut c_void,
    weights: *mut c_void,
    references: *mut c_void,
    total: *mut c_void,
    loss: Scalar,
    gathering: Gathering,
}

// SAFETY: the fields of `Mine` in triplet.cu.
unsafe impl args::Args for Mine {}

/// What is mined, and from what.
pub struct Mining<'a> {
    /// Features of the anchors.
    pub u: &'a Features,
    /// Features of the candidates, of which there is at least one.
    pub v: &'a Features,
    /// Identities of both, int64.
    pub labels: (&'a Tensor, &'a Tensor),
    /// Features of a teacher, for [`Objective::Taught`].
    pub teacher: Option<&'a Features>,
    /// The loss of a pair of distances.
    pub objective: Objective,
}

/// The pairs and their loss. Tensors of two rows: the positives, the negatives.
pub struct Mined {
    /// float32, no dimensions.
    pub loss: Tensor,
    /// Indices of candidates, int32.
    pub found: Tensor,
    /// What tllib adds to the distances, float32.
    pub offsets: Tensor,
    /// Of the pairs in the gradient, float64.
    pub weights: Tensor,
    /// The teacher's references, float32.
    pub references: Option<Tensor>,
}

/// Products, mining and loss, so many anchors at a time; `dtype` is that of the call's features.
pub fn mine(stream: &Stream, mining: &Mining<'_>, dtype: Dtype) -> Result<Mined> {
    let ((n, dim), (m, _)) = (mining.u.tensor.size2()?, mining.v.tensor.size2()?);
    let (rows, candidates) = (n as usize, m as usize);
    let block = (KEPT * stream.threads_at_once() as usize / candidates).clamp(1, rows.max(1));
    let products = stream.empty(&[block as i64, m], Kind::Float)?;
    let transposed = mining.v.tensor.f_tr()?;
    let mined = Mined {
        loss: stream.empty(&[], Kind::Float)?,
        found: stream.empty(&[2, n], Kind::Int)?,
        offsets: stream.empty(&[2, n], Kind::Float)?,
        weights: stream.empty(&[2, n], Kind::Double)?,
        references: mining
            .teacher
            .map(|_| stream.empty(&[n], Kind::Float))
            .transpose()?,
    };
    let grid = stream.blocks(block, THREADS);
    let partials = Partials::new(stream, grid, 1)?;
    let total = stream.empty(&[], Kind::Double)?;
    let labels = |tensor| Labels::of(&Input::new(CLASS, "labels", tensor)?);
    let (objective, margin) = match mining.objective {
        Objective::Hinge(margin) => (0, margin),
        Objective::Margin(margin) => (1, margin),
        Objective::Taught => (2, 0.0),
    };
    let rounding = ERROR * f64::from(f32::EPSILON);
    let mut args = Mine {
        products: products.data_ptr(),
        first: 0,
        rows: 0,
        anchors: n,
        candidates: m as i32,
        dim: dim as i32,
        teacher_dim: mining
            .teacher
            .map_or(Ok(0), |t| t.tensor.size2().map(|s| s.1))? as i32,
        u: mining.u.tensor.data_ptr(),
        v: mining.v.tensor.data_ptr(),
        u_squares: mining.u.squares.data_ptr(),
        v_squares: mining.v.squares.data_ptr(),
        u_labels: labels(mining.labels.0)?,
        v_labels: labels(mining.labels.1)?,
        teacher: args::pointer(mining.teacher.map(|teacher| &teacher.tensor)),
        error: (if allows_tf32() { TF32_ERROR } else { rounding }) as f32,
        objective,
        margin,
        found: mined.found.data_ptr(),
        offsets: mined.offsets.data_ptr(),
        weights: mined.weights.data_ptr(),
        references: args::pointer(mined.references.as_ref()),
        total: total.data_ptr(),
        loss: Scalar::of(&mined.loss, Dtype::F32),
        gathering: partials.args(),
    };
    // Once without anchors too, for the loss.
    for first in (0..rows.max(1)).step_by(block) {
        let count = block.min(rows - first);
        (args.first, args.rows) = (first as i64, count as i64);
        if count > 0 {
            let factor = mining.u.tensor.f_narrow(0, first as i64, args.rows)?;
            // With an output given, autocast leaves the product alone.
            let _ = factor.f_mm_out(&products.f_narrow(0, 0, args.rows)?, &transposed)?;
        }
        let launch = Launch {
            stem: "triplet",
            dtype,
            kernel: ("mine", ""),
            grid,
            block: THREADS,
        };
        // SAFETY: all tensors are alive, on this device and of the shapes that the fields say; the launches
        // follow each other on one stream and use `products` in turn.
        unsafe { stream.launch(launch, &args)? };
    }
    Ok(mined)
}
