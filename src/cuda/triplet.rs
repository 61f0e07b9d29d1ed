//! Launches of `triplet.cu`: features, mining, loss.

use super::args::{self, Gathering, Labels, Matrix, Scalar};
use super::device::{Launch, Stream};
use super::plan::{FEW_ROWS, over_rows};
use crate::error::Result;
use crate::kernels::reid_loss::mining::ERROR;
use crate::kernels::reid_loss::triplet::Objective;
use crate::torch::Dtype;
use crate::torch::autograd::Constant;
use crate::torch::device::allows_tf32;
use crate::torch::input::Input;
use std::ffi::c_void;
use tch::{Kind, Tensor};

const CLASS: &str = "triplet";
const THREADS: u32 = 256;
/// Products that are kept at a time, for each thread that the device holds: most of them are still cached when
/// they are scanned, and no matrix of N x N is ever held.
const KEPT: usize = 64;
/// Maximum number of rows and of columns of features: indices are 32-bit.
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
    /// The squared norms of its rows, float32; none for a teacher.
    squares: Option<Tensor>,
    /// What the rows were divided by, float64; negative where the norm was raised.
    pub norms: Option<Tensor>,
}

impl Features {
    /// Of float32, float16 or bfloat16 features, with `squares` where they are mined. One launch at most.
    pub fn of(
        stream: &Stream,
        (input, dtype): (&Input<'_>, Dtype),
        normalize: bool,
        squares: bool,
    ) -> Result<Self> {
        let (rows, cols) = input.matrix()?;
        let itself = dtype == Dtype::F32 && input.contiguous() && !normalize;
        let tensor = if itself {
            input.tensor.f_detach()?
        } else {
            stream.empty(input.shape(), Kind::Float)?
        };
        let each = |kind| stream.empty(&[rows as i64], kind);
        let squares = squares.then(|| each(Kind::Float)).transpose()?;
        let norms = normalize.then(|| each(Kind::Double)).transpose()?;
        let features = Self {
            tensor,
            squares,
            norms,
        };
        if itself && features.squares.is_none() {
            return Ok(features);
        }
        let args = Prepare {
            x: Matrix::of(input)?,
            rows: rows as i64,
            cols: cols as i32,
            out: args::pointer((!itself).then_some(&features.tensor)),
            squares: args::pointer(features.squares.as_ref()),
            norms: args::pointer(features.norms.as_ref()),
        };
        let launch = over_rows(
            stream,
            ("triplet", "prepare"),
            &FEW_ROWS,
            dtype,
            (rows, cols),
        )?;
        // SAFETY: a matrix of this shape and dtype on this device, the results have as many rows, and all
        // tensors are alive.
        unsafe { stream.launch(launch, &args)? };
        Ok(features)
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

/// The pairs and their loss.
pub struct Mined {
    /// float32, no dimensions.
    pub loss: Tensor,
    /// What else the launches leave.
    pub pairs: Pairs,
}

/// A positive and a negative of each anchor. In one piece of memory, so that it is allocated only once.
pub struct Pairs {
    /// In float64 a total, the weights of the pairs (of the positives, then of the negatives) and the sums of
    /// blocks. Then 32-bit numbers: the candidates of the pairs, what tllib adds to their distances, the
    /// teacher's references.
    work: Constant,
    anchors: usize,
    /// Where the 32-bit numbers begin, in units of float64.
    narrow: usize,
}

/// Offsets among the 32-bit numbers of [`Pairs`], in multiples of the number of anchors: two candidates and two
/// offsets for each, and a reference.
const FOUND: usize = 0;
const OFFSETS: usize = FOUND + 2;
const REFERENCES: usize = OFFSETS + 2;

impl Pairs {
    fn new(stream: &Stream, anchors: usize, blocks: usize) -> Result<Self> {
        let narrow = 1 + 2 * anchors + blocks;
        let len = narrow + ((REFERENCES + 1) * anchors).div_ceil(2);
        Ok(Self {
            work: Constant(stream.empty(&[len as i64], Kind::Double)?),
            anchors,
            narrow,
        })
    }

    fn total(&self) -> *mut c_void {
        self.work.get().data_ptr()
    }

    /// Of the pairs in the gradient, float64.
    pub fn weights(&self) -> *mut c_void {
        args::place::<f64>(self.work.get(), 1)
    }

    /// Indices of candidates, int32.
    pub fn found(&self) -> *mut c_void {
        self.numbers(FOUND)
    }

    /// How many pairs there are.
    pub fn count(&self) -> usize {
        2 * self.anchors
    }

    fn sums_of_blocks(&self) -> *mut c_void {
        args::place::<f64>(self.work.get(), 1 + 2 * self.anchors)
    }

    fn offsets(&self) -> *mut c_void {
        self.numbers(OFFSETS)
    }

    fn references(&self) -> *mut c_void {
        self.numbers(REFERENCES)
    }

    /// The 32-bit numbers at the offset `times` the number of anchors.
    fn numbers(&self, times: usize) -> *mut c_void {
        args::place::<f32>(self.work.get(), 2 * self.narrow + times * self.anchors)
    }

    /// The candidates of the positives, then of the negatives (int64), and what tllib's offsets add to the
    /// differences of their distances. Then the teacher's references, arbitrary numbers without a teacher.
    pub fn parts(&self) -> Result<([Tensor; 2], Tensor)> {
        let n = self.anchors as i64;
        let behind = self.work.get().size1()? - self.narrow as i64;
        let numbers = self.work.get().f_narrow(0, self.narrow as i64, behind)?;
        let part = |times: usize, len: usize, kind| {
            let numbers = numbers.f_view_dtype(kind)?;
            numbers.f_narrow(0, times as i64 * n, len as i64 * n)
        };
        let index = part(FOUND, 2, Kind::Int)?.f_to_kind(Kind::Int64)?;
        let offset = |k: usize| part(OFFSETS + k, 1, Kind::Float);
        let offset = offset(0)?.f_sub(&offset(1)?)?;
        Ok(([index, offset], part(REFERENCES, 1, Kind::Float)?))
    }
}

/// Products, mining and loss, a block of anchors at a time; `dtype` is that of the call's features.
pub fn mine(stream: &Stream, mining: &Mining<'_>, dtype: Dtype) -> Result<Mined> {
    let ((n, dim), (m, _)) = (mining.u.tensor.size2()?, mining.v.tensor.size2()?);
    let (rows, candidates) = (n as usize, m as usize);
    let block = (KEPT * stream.threads_at_once() as usize / candidates).clamp(1, rows.max(1));
    let products = stream.empty(&[block as i64, m], Kind::Float)?;
    let transposed = mining.v.tensor.f_tr()?;
    let launch = Launch::of("triplet", dtype, ("mine", ""), THREADS);
    let launch = stream.sized(launch, block)?;
    let loss = stream.empty(&[], Kind::Float)?;
    let pairs = Pairs::new(stream, rows, launch.grid as usize)?;
    let done = stream.counter()?;
    let labels = |tensor| Labels::of(&Input::new(CLASS, "labels", tensor)?);
    let (objective, margin) = match mining.objective {
        Objective::Hinge(margin) => (0, margin),
        Objective::Margin(margin) => (1, margin),
        Objective::Taught => (2, 0.0),
    };
    // cuBLAS may sum a pair's products sequentially.
    let rounding = ERROR.max((dim as f64).sqrt()) * f64::from(f32::EPSILON);
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
        u_squares: args::pointer(mining.u.squares.as_ref()),
        v_squares: args::pointer(mining.v.squares.as_ref()),
        u_labels: labels(mining.labels.0)?,
        v_labels: labels(mining.labels.1)?,
        teacher: args::pointer(mining.teacher.map(|teacher| &teacher.tensor)),
        error: (if allows_tf32() { TF32_ERROR } else { rounding }) as f32,
        objective,
        margin,
        found: pairs.found(),
        offsets: pairs.offsets(),
        weights: pairs.weights(),
        references: mining
            .teacher
            .map_or(std::ptr::null_mut(), |_| pairs.references()),
        total: pairs.total(),
        loss: Scalar::of(&loss, Dtype::F32),
        gathering: Gathering::of(pairs.sums_of_blocks(), &done),
    };
    // Runs once even without anchors, for the loss.
    for first in (0..rows.max(1)).step_by(block) {
        let count = block.min(rows - first);
        (args.first, args.rows) = (first as i64, count as i64);
        // With an output given, autocast leaves the product alone.
        if count == rows && rows > 0 {
            let _ = mining.u.tensor.f_mm_out(&products, &transposed)?;
        } else if count > 0 {
            let factor = mining.u.tensor.f_narrow(0, first as i64, args.rows)?;
            let _ = factor.f_mm_out(&products.f_narrow(0, 0, args.rows)?, &transposed)?;
        }
        // SAFETY: all tensors are alive, on this device and of the shapes that the fields say; the launches
        // follow each other on one stream and use `products` in turn.
        unsafe { stream.launch(launch, &args)? };
    }
    Ok(Mined { loss, pairs })
}
