//! Hard example mining on tensors.

use super::composite::Search;
use crate::cuda::{self, triplet::LARGEST};
use crate::error::Result;
use crate::kernels::element::Element;
use crate::kernels::mirror::mirror;
use crate::kernels::real::Real;
use crate::kernels::reduce::max;
use crate::kernels::reid_loss::OFFSET;
use crate::kernels::reid_loss::matrix::hardest as kernel;
use crate::kernels::reid_loss::mining::{Hardest, Identities, Mining, Tile, squares};
use crate::kernels::rows::Rows;
use crate::ops::{Place, place, threads};
use crate::torch::input::Input;
use crate::torch::product::{How, halved, multiply, panel_height};
use crate::torch::{Dtype, Owned, Stored};
use tch::Tensor;

const CLASS: &str = "hard_examples_mining";
/// Elements of the products that are kept at a time: they stay in the cache until they are scanned,
/// and no matrix of N x N is ever held.
const BLOCK: usize = 1 << 20;
/// Anchors of a tile, if they are not the candidates.
const HEIGHT: usize = 512;

/// Indices of the hardest positive and negative of each row of `dist_mat` (N, M), where
/// `identity_mat` is 1 for pairs of one identity and 0 for others.
pub fn hardest(dist_mat: &Tensor, identity_mat: &Tensor) -> Result<(Tensor, Tensor)> {
    let distances = Input::new(CLASS, "dist_mat", dist_mat)?;
    let identity = Input::new(CLASS, "identity_mat", identity_mat)?;
    let dtype = distances.floating()?;
    let cols = match *distances.shape() {
        [_, cols] if cols > 0 => cols,
        _ => return Err(distances.wrong("have shape (N, M) with M > 0")),
    };
    identity.like(&distances)?;
    let place = place(&[&distances, &identity]);
    if place == Place::Cuda && cols <= LARGEST {
        return cuda::hardest::hardest(&distances, &identity, dtype);
    }
    let found = match dtype {
        Dtype::F32 => scan::<f32>(&distances, &identity)?,
        _ => scan::<f64>(&distances, &identity)?,
    };
    match found {
        Some(found) => Ok(found),
        None if place == Place::Composite => {
            composite(dist_mat, identity_mat, dtype, Search::Compiled)
        }
        None => composite(dist_mat, identity_mat, dtype, Search::Direct),
    }
}

/// By one scan of every row; `None` unless both are matrices of `F` on the CPU.
fn scan<F: Element<Acc = F> + Real + Stored>(
    distances: &Input<'_>,
    identity: &Input<'_>,
) -> Result<Option<(Tensor, Tensor)>> {
    let (Some(d), Some(s)) = (distances.rows::<F>(), identity.rows::<F>()) else {
        return Ok(None);
    };
    let rows = [d.rows() as i64];
    let (mut positive, mut negative) = (Owned::<i64>::new(&rows)?, Owned::<i64>::new(&rows)?);
    let threads = threads(distances.numel());
    kernel(d, s, positive.slice(), negative.slice(), threads);
    Ok(Some((positive.into_tensor(), negative.into_tensor())))
}

/// The same in libtorch operations.
fn composite(
    dist_mat: &Tensor,
    identity_mat: &Tensor,
    dtype: Dtype,
    search: Search,
) -> Result<(Tensor, Tensor)> {
    let (d, s) = (dist_mat.f_detach()?, identity_mat.f_detach()?);
    let s = if s.is_floating_point() {
        s
    } else {
        s.f_to_kind(dtype.at_least_f32().kind())?
    };
    let positive = s.f_sub_scalar(1.0)?.f_mul_scalar(OFFSET)?.f_add(&d)?;
    let negative = s.f_mul_scalar(OFFSET)?.f_add(&d)?;
    // tllib sorts, which puts NaN last, and takes the first.
    let negative = negative.f_masked_fill(&negative.f_isnan()?, f64::INFINITY)?;
    Ok((search.largest(&positive)?, search.smallest(&negative)?))
}

/// Features as the kernels take them: contiguous, in the computing type, outside any graph.
pub struct Features<'a, F> {
    /// (N, F)
    pub tensor: &'a Tensor,
    /// The same memory.
    pub rows: Rows<'a, F>,
}

impl<'a, F: Element + Stored> Features<'a, F> {
    /// Of a matrix that is as described.
    pub fn of(input: &'a Input<'_>) -> Result<Self> {
        Ok(Self {
            tensor: input.tensor,
            rows: input.dense_rows::<F>()?,
        })
    }
}

/// The squared norms of the rows of two matrices in the computing type, computed once if the two are one.
pub struct Squares<F> {
    x: Option<Vec<F>>,
    y: Vec<F>,
}

impl<F: Real> Squares<F> {
    /// Of the rows of both.
    pub fn of<E: Element<Acc = F>>(x: Rows<'_, E>, y: Rows<'_, E>) -> Self {
        let of = |rows: Rows<'_, E>| squares(rows, threads(2 * rows.rows() * rows.cols()));
        Self {
            x: (!x.same(&y)).then(|| of(x)),
            y: of(y),
        }
    }

    /// Of the rows of the first.
    pub fn x(&self) -> &[F] {
        self.x.as_ref().unwrap_or(&self.y)
    }

    /// Of the rows of the second.
    pub fn y(&self) -> &[F] {
        &self.y
    }
}

/// Mines `anchors` among `candidates`, a tile of products at a time.
pub fn mine<F: Element<Acc = F> + Real + Stored>(
    anchors: &Features<'_, F>,
    candidates: &Features<'_, F>,
    identities: &Identities,
) -> Result<Vec<Hardest>> {
    let (n, m, dim) = (
        anchors.rows.rows(),
        candidates.rows.rows(),
        anchors.rows.cols(),
    );
    let squares = Squares::of(anchors.rows, candidates.rows);
    let mining = Mining {
        anchors: anchors.rows,
        candidates: candidates.rows,
        identities,
        anchor_squares: squares.x(),
        squares: squares.y(),
        largest_square: max(squares.y()),
    };
    let mirrored = anchors.rows.same(&candidates.rows);
    let mut seen = mining.start();
    // Besides the last products, two distances or more of each anchor.
    let last = |keys: usize| threads(keys + 2 * n * dim);
    if mirrored && halved(n) {
        let products = with_each_other(anchors)?;
        let view = Input::new(CLASS, "products", &products)?;
        let tile = Tile {
            products: view.dense_rows::<F>()?,
            first: (0, 0),
            mirrored: false,
        };
        return Ok(mining.finish(tile, &mut seen, last(n * n)));
    }
    let height = if mirrored {
        panel_height(n, dim)
    } else {
        n.clamp(1, HEIGHT)
    };
    let width = (BLOCK / height).min(m).max(1);
    let buffer = Owned::<F>::new(&[height as i64, width as i64])?.into_tensor();
    for top in (0..n).step_by(height) {
        for left in (if mirrored { top } else { 0 }..m).step_by(width) {
            let (high, wide) = (height.min(n - top), width.min(m - left));
            let products = if (high, wide) == (height, width) {
                buffer.shallow_clone()
            } else {
                buffer.f_as_strided([high as i64, wide as i64], [wide as i64, 1], 0)?
            };
            let (u, v) = (
                rows(anchors, top, high)?,
                rows(candidates, left, wide)?.f_tr()?,
            );
            multiply(&u, &v, &products, How::default())?;
            let view = Input::new(CLASS, "products", &products)?;
            let tile = Tile {
                products: view.dense_rows::<F>()?,
                first: (top, left),
                mirrored,
            };
            let keys = products.numel();
            if (top + high, left + wide) == (n, m) {
                return Ok(mining.finish(tile, &mut seen, last(keys)));
            }
            mining.look(tile, &mut seen, threads(keys));
        }
    }
    Ok(Vec::new())
}

/// The products of all rows with each other, of which those above the diagonal are computed and copied below it.
fn with_each_other<F: Element + Real + Stored>(of: &Features<'_, F>) -> Result<Tensor> {
    let n = of.rows.rows();
    let how = How {
        add: false,
        upper: true,
    };
    let write = |out: &Tensor| multiply(of.tensor, &of.tensor.f_tr()?, out, how);
    // SAFETY: the product keeps nothing.
    let mut products = unsafe { Owned::<F>::written_by(&[n as i64; 2], write)? };
    mirror(products.slice(), n, threads(n * n / 2));
    Ok(products.into_tensor())
}

/// Some of the rows.
fn rows<F: Element>(of: &Features<'_, F>, first: usize, count: usize) -> Result<Tensor> {
    if count == of.rows.rows() {
        return Ok(of.tensor.shallow_clone());
    }
    Ok(of.tensor.f_narrow(0, first as i64, count as i64)?)
}
