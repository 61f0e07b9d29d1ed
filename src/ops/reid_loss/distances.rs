//! All distances between the rows of two matrices, on tensors.

use super::mining::Squares;
use crate::error::{Error, Result};
use crate::kernels::element::Element;
use crate::kernels::real::Real;
use crate::kernels::reid_loss::distances::{
    distances as finish, factors, multiples, own_distances, own_factors,
};
use crate::kernels::reid_loss::{CLAMP, RAISED};
use crate::kernels::rows::Rows;
use crate::ops::{Place, place, threads};
use crate::torch::autograd::{Backward, attach_with};
use crate::torch::input::Input;
use crate::torch::product::{How, multiply, multiply_bf16, symmetric};
use crate::torch::saved::Saved;
use crate::torch::{Dtype, Owned, Stored, Without, by_dtype, same};
use std::marker::PhantomData;
use tch::{Kind, Tensor};

const CLASS: &str = "pairwise_euclidean_distance";
/// Distances, a root or a division each, that take the time of one element with an exponential.
const CHEAP: usize = 2;
/// Features with which half of a symmetric product takes longer than copying it into the other half.
const HALVED: usize = 160;

/// The arguments, checked.
struct Pair<'a> {
    x: Input<'a>,
    y: Input<'a>,
    /// The dtype of both.
    dtype: Dtype,
}

impl<'a> Pair<'a> {
    fn check(x: &'a Tensor, y: &'a Tensor) -> Result<Self> {
        let (x, y) = (Input::new(CLASS, "x", x)?, Input::new(CLASS, "y", y)?);
        let (dtype, other) = (x.floating()?, y.floating()?);
        if dtype != other {
            return Err(Error::Type(format!(
                "{CLASS}: y must have the dtype of x, {}, got {}",
                x.dtype_name(),
                y.dtype_name()
            )));
        }
        y.same_device(&x)?;
        match (x.shape(), y.shape()) {
            (&[_, f], &[_, g]) if f == g => Ok(Self { x, y, dtype }),
            (of_x, of_y) => Err(Error::Value(format!(
                "{CLASS}: x and y must have shapes (N, F) and (M, F), got {of_x:?} and {of_y:?}"
            ))),
        }
    }

    /// The dtype of distances and intermediate gradients.
    fn kind(&self) -> Kind {
        self.dtype.at_least_f32().kind()
    }

    fn wanted(&self) -> [bool; 2] {
        [self.x.wants_grad(), self.y.wants_grad()]
    }
}

/// The distances between all rows of `x` (N, F) and `y` (M, F), (N, M), in float64 for float64 and else in
/// float32; differentiable with respect to both.
pub fn distances(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let pair = Pair::check(x, y)?;
    if place(&[&pair.x, &pair.y]) != Place::Cpu {
        return formula(x, y, pair.kind());
    }
    by_dtype!(pair.dtype, E => fused::<E>(&pair))
}

/// The gradients of `x` and `y`, if wanted, from that of the distances `out`.
pub fn distances_backward(
    incoming: &Tensor,
    x: &Tensor,
    y: &Tensor,
    out: &Tensor,
    wanted: [bool; 2],
) -> Result<[Option<Tensor>; 2]> {
    let pair = Pair::check(x, y)?;
    let kind = pair.kind();
    let (u, v) = (computed(x, kind)?, computed(y, kind)?);
    let of = [&u, &v, &out.f_contiguous()?];
    let [of_x, of_y] = match pair.dtype {
        Dtype::F64 => gradients::<f64>(incoming, of, wanted)?,
        _ => gradients::<f32>(incoming, of, wanted)?,
    };
    let kind = pair.dtype.kind();
    Ok([stored(of_x, kind)?, stored(of_y, kind)?])
}

/// A gradient in the dtype of the features.
fn stored(grad: Option<Tensor>, kind: Kind) -> Result<Option<Tensor>> {
    Ok(grad.map(|grad| grad.f_to_kind(kind)).transpose()?)
}

/// The same in libtorch operations.
fn formula(x: &Tensor, y: &Tensor, kind: Kind) -> Result<Tensor> {
    let _guard = Without::autocast();
    let (u, v) = (x.f_to_kind(kind)?, y.f_to_kind(kind)?);
    let squares = |x: &Tensor| x.f_square()?.f_sum_dim_intlist(1, true, kind);
    let sums = squares(&u)?.f_add(&squares(&v)?.f_transpose(0, 1)?)?;
    let squares = sums.f_addmm(&u.f_mul_scalar(-2.0)?, &v.f_transpose(0, 1)?)?;
    Ok(squares.f_clamp_min(CLAMP)?.f_sqrt()?)
}

/// The features outside any graph. They are only copied where their columns are apart: unless their rows are adjacent,
/// which products of float32 and float64 take too. (In half types a result does not depend on the layout, and they are
/// converted anyway or multiplied row by row.)
fn readable(x: &Tensor) -> Result<Tensor> {
    let x = x.f_detach()?;
    let read = match *Input::new(CLASS, "features", &x)?.strides() {
        [_, 1] => true,
        [1, _] => matches!(x.kind(), Kind::Float | Kind::Double),
        _ => false,
    };
    Ok(if read { x } else { x.f_contiguous()? })
}

/// The same in the dtype that distances are computed in.
fn computed(x: &Tensor, kind: Kind) -> Result<Tensor> {
    Ok(readable(x)?.f_to_kind(kind)?)
}

/// `out = x y^T`, in the dtype of `out`; `x` and `y` are [`readable`].
fn products(x: &Tensor, y: &Tensor, out: &Tensor, kind: Kind, how: How) -> Result<()> {
    if x.kind() == Kind::BFloat16 && multiply_bf16(x, &y.f_tr()?, out, how)? {
        return Ok(());
    }
    let u = x.f_to_kind(kind)?;
    let v = if same(x, y) {
        u.shallow_clone()
    } else {
        y.f_to_kind(kind)?
    };
    multiply(&u, &v.f_tr()?, out, how)
}

fn fused<E>(pair: &Pair<'_>) -> Result<Tensor>
where
    E: Element<Acc: Element<Acc = E::Acc> + Stored> + Stored,
{
    let kind = <E::Acc as Stored>::KIND;
    let same_rows = pair.x.same(&pair.y);
    let u = readable(pair.x.tensor)?;
    let v = if same_rows {
        u.shallow_clone()
    } else {
        readable(pair.y.tensor)?
    };
    let (of_u, of_v) = (Input::new(CLASS, "x", &u)?, Input::new(CLASS, "y", &v)?);
    let (x, y) = (of_u.dense_rows::<E>()?, of_v.dense_rows::<E>()?);
    let shape = [x.rows() as i64, y.rows() as i64];
    let own = same_rows && (x.cols() >= HALVED || !symmetric(x.rows()));
    let how = How {
        add: false,
        upper: own,
    };
    let write = |out: &Tensor| products(&u, &v, out, kind, how);
    // SAFETY: the products keep nothing.
    let mut out = unsafe { Owned::<E::Acc>::written_by(&shape, write)? };
    let squares = Squares::of(x, y);
    let work = threads(x.rows() * y.rows() / CHEAP);
    if own {
        own_distances(out.slice(), squares.y(), work);
    } else {
        finish(out.slice(), squares.x(), squares.y(), work);
    }
    let out = out.into_tensor();
    let wanted = pair.wanted();
    if wanted.contains(&true) {
        attach_with(
            c"PairwiseEuclideanDistanceBackward",
            &out,
            &[pair.x.tensor, pair.y.tensor],
            Box::new(Node::<E::Acc> {
                x: Saved::of(pair.x.tensor, "pairwise_euclidean_distance's x")?,
                y: Saved::of(pair.y.tensor, "pairwise_euclidean_distance's y")?,
                out: Saved::of(&out, "the output of pairwise_euclidean_distance")?,
                wanted,
                own: same(pair.x.tensor, pair.y.tensor),
                kind: pair.dtype.kind(),
                element: PhantomData,
            }),
            Box::new(move |t| formula(&t[0], &t[1], kind)),
        )?;
    }
    Ok(out)
}

/// The node's state.
struct Node<F> {
    x: Saved,
    y: Saved,
    out: Saved,
    wanted: [bool; 2],
    /// Whether they are one tensor, whose whole gradient is then that of `x`.
    own: bool,
    /// The dtype of the inputs.
    kind: Kind,
    element: PhantomData<F>,
}

impl<F: Element<Acc = F> + Real + Stored> Backward for Node<F> {
    fn grads(&mut self, incoming: &Tensor, _last: bool) -> Result<Vec<Option<Tensor>>> {
        let out = self.out.get()?;
        let x = computed(self.x.get()?, F::KIND)?;
        if self.own
            && let Some(grad) = own_gradient::<F>(incoming, &x, out)?
        {
            return Ok(vec![stored(Some(grad), self.kind)?, None]);
        }
        let y = computed(self.y.get()?, F::KIND)?;
        gradients::<F>(incoming, [&x, &y, out], self.wanted)?
            .into_iter()
            .map(|grad| stored(grad, self.kind))
            .collect()
    }
}

/// The elements of a contiguous matrix on the CPU.
fn whole<'a, F: Element + Stored>(input: &'a Input<'_>) -> Option<&'a [F]> {
    input.rows::<F>()?.whole()
}

/// The gradients of `x` and `y`, if wanted. All tensors are in the computing type, and the distances contiguous.
fn gradients<F: Element<Acc = F> + Real + Stored>(
    incoming: &Tensor,
    [x, y, out]: [&Tensor; 3],
    wanted: [bool; 2],
) -> Result<[Option<Tensor>; 2]> {
    let grad = Input::new(CLASS, "grad_output", incoming)?;
    let (of_x, of_y) = (Input::new(CLASS, "x", x)?, Input::new(CLASS, "y", y)?);
    let of_out = Input::new(CLASS, "distances", out)?;
    let (Some(g), Some(u), Some(v), Some(d)) = (
        grad.rows::<F>(),
        of_x.rows::<F>(),
        of_y.rows::<F>(),
        whole(&of_out),
    ) else {
        return by_operations(incoming, [x, y, out], wanted);
    };
    let work = threads(g.rows() * g.cols() / CHEAP);
    let mut negative = Owned::<F>::new(&incoming.size())?;
    let (of_rows, of_columns) = factors(d, g, negative.slice(), wanted[1], work);
    let negative = negative.into_tensor();
    Ok([
        wanted[0]
            .then(|| sum(u, &of_rows, (&negative, y)))
            .transpose()?,
        wanted[1]
            .then(|| sum(v, &of_columns, (&negative.f_tr()?, x)))
            .transpose()?,
    ])
}

/// The whole gradient of `x` from that of the distances `out` of its rows from each other; `None` if kernels may not
/// read it.
fn own_gradient<F: Element<Acc = F> + Real + Stored>(
    incoming: &Tensor,
    x: &Tensor,
    out: &Tensor,
) -> Result<Option<Tensor>> {
    let grad = Input::new(CLASS, "grad_output", incoming)?;
    let (of_x, of_out) = (
        Input::new(CLASS, "x", x)?,
        Input::new(CLASS, "distances", out)?,
    );
    let (Some(g), Some(u), Some(d)) = (grad.rows::<F>(), of_x.rows::<F>(), whole(&of_out)) else {
        return Ok(None);
    };
    let mut negative = Owned::<F>::new(&incoming.size())?;
    let work = threads(g.rows() * g.cols() / CHEAP);
    let sums = own_factors(d, g, negative.slice(), work);
    sum(u, &sums, (&negative.into_tensor(), x)).map(Some)
}

/// A side times its own factors, plus the other side times the matrix of factors.
fn sum<F: Element<Acc = F> + Real + Stored>(
    side: Rows<'_, F>,
    own: &[F],
    (factors, other): (&Tensor, &Tensor),
) -> Result<Tensor> {
    let (rows, cols) = (side.rows(), side.cols());
    let mut grad = Owned::<F>::new(&[rows as i64, cols as i64])?;
    multiples(side, own, grad.slice(), threads(rows * cols / CHEAP));
    let grad = grad.into_tensor();
    multiply(factors, other, &grad, How::ADDED)?;
    Ok(grad)
}

/// [`gradients`] of tensors that no kernel may read: on other devices, or under `torch.func`.
fn by_operations(
    incoming: &Tensor,
    [x, y, out]: [&Tensor; 3],
    wanted: [bool; 2],
) -> Result<[Option<Tensor>; 2]> {
    let _guard = Without::autocast();
    let raised = out.f_gt(RAISED)?.f_logical_not()?;
    let factors = incoming.f_div(out)?.f_masked_fill(&raised, 0.0)?;
    let of = |side: &Tensor, factors: &Tensor, other: &Tensor| -> Result<Tensor> {
        let own = factors.f_sum_dim_intlist(1, true, None::<Kind>)?;
        Ok(side.f_mul(&own)?.f_sub(&factors.f_mm(other)?)?)
    };
    Ok([
        wanted[0].then(|| of(x, &factors, y)).transpose()?,
        wanted[1]
            .then(|| of(y, &factors.f_transpose(0, 1)?, x))
            .transpose()?,
    ])
}
