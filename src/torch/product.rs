//! Matrix products of tensors on the CPU: by our own kernels on processors where these are faster, else by libtorch.
//! Of a symmetric product only what is on and above the diagonal is computed.

#[cfg(target_arch = "x86_64")]
use super::{Dtype, input::Input};
use super::{Stored, max_threads};
use crate::error::{Error, Result};
use crate::kernels::mirror::mirror;
use crate::kernels::parallel::threads_for;
use crate::kernels::product::Multiply;
use crate::kernels::real::Real;
#[cfg(target_arch = "x86_64")]
use crate::kernels::{
    element::{Bf16, Element},
    product::blocked::{Dot, Faster, Product, Target, Tiles, WIDE, faster},
};
use tch::{Device, Tensor};

/// What becomes of a product.
#[derive(Clone, Copy, Default)]
pub struct How {
    /// It is added to what is there.
    pub add: bool,
    /// Only what is on and above the diagonal of a square matrix need be correct.
    pub upper: bool,
}

impl How {
    /// Added, and all of it is needed.
    pub const ADDED: Self = Self {
        add: true,
        upper: false,
    };
}

/// `out = x y`, of matrices of one floating dtype on the CPU. Autocast leaves it alone.
pub fn multiply(x: &Tensor, y: &Tensor, out: &Tensor, how: How) -> Result<()> {
    if ours(x, y, out, how)? {
        return Ok(());
    }
    // The variants with an output given, and those in place, are not subject to autocast.
    let write = |x: &Tensor, y: &Tensor, out: &mut Tensor| {
        let _ = if how.add {
            out.f_addmm_(x, y)?
        } else {
            x.f_mm_out(out, y)?
        };
        Ok(())
    };
    if how.upper {
        return upper_panels(x, y, out, write);
    }
    write(x, y, &mut out.shallow_clone())
}

/// Whose kernels [`multiply`] chooses.
pub fn provider() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    match faster() {
        Faster::All => return "tllib_rs",
        Faster::Small => return "libtorch, small ones tllib_rs",
        Faster::None => (),
    }
    "libtorch"
}

/// `out = x y` of bfloat16 matrices in float32, on processors that multiply them. False, and nothing is done, on others
/// and on those where libtorch multiplies, and unless both matrices are contiguous along long sums.
pub fn multiply_bf16(x: &Tensor, y: &Tensor, out: &Tensor, how: How) -> Result<bool> {
    #[cfg(target_arch = "x86_64")]
    if faster() == Faster::All {
        let [x, y, out] = matrices([x, y, out])?;
        let product = product::<Bf16>(&x, &y, &out, how);
        return Ok(product.is_some_and(|product| product.compute_dots(max_threads())));
    }
    let _ = (x, y, out, how);
    Ok(false)
}

/// Whether all of the product of so many rows with themselves is symmetric to the last bit: libtorch's need not be.
pub fn symmetric(rows: usize) -> bool {
    #[cfg(target_arch = "x86_64")]
    return faster() == Faster::All && rows >= WIDE;
    #[cfg(not(target_arch = "x86_64"))]
    return rows <= 1;
}

/// Rows of which our own kernels compute half of the products with each other faster at once than in panels.
#[cfg(target_arch = "x86_64")]
const MOST_HALVED: usize = 256;

/// Whether one call of [`multiply`] for all products of so many rows with each other is faster than one for each panel.
pub fn halved(rows: usize) -> bool {
    #[cfg(target_arch = "x86_64")]
    if (WIDE..=MOST_HALVED).contains(&rows) {
        return faster() != Faster::None;
    }
    let _ = rows;
    false
}

/// [`multiply`] by our own kernels. False, and nothing is done, where libtorch is as fast or they do not serve the
/// tensors.
fn ours(x: &Tensor, y: &Tensor, out: &Tensor, how: How) -> Result<bool> {
    #[cfg(target_arch = "x86_64")]
    if faster() != Faster::None {
        let [x, y, out] = matrices([x, y, out])?;
        return Ok(match x.dtype() {
            Some(Dtype::F32) => product::<f32>(&x, &y, &out, how).is_some_and(compute),
            Some(Dtype::F64) => product::<f64>(&x, &y, &out, how).is_some_and(compute),
            _ => false,
        });
    }
    let _ = (x, y, out, how);
    Ok(false)
}

/// Computes it, where that is faster than libtorch; false, and nothing is done, elsewhere.
#[cfg(target_arch = "x86_64")]
fn compute<F: Element<Acc = F> + Real + Tiles>(product: Product<'_, F>) -> bool {
    match faster() {
        Faster::All => product.compute(max_threads()),
        Faster::Small => product.small() && product.compute_dots(max_threads()),
        Faster::None => false,
    }
}

#[cfg(target_arch = "x86_64")]
fn matrices(all: [&Tensor; 3]) -> Result<[Input<'_>; 3]> {
    let [x, y, out] = all.map(|tensor| Input::new("a product", "a matrix", tensor));
    Ok([x?, y?, out?])
}

/// The product; `None` unless the tensors are ordinary ones of its types and shapes, and `out` of contiguous rows.
#[cfg(target_arch = "x86_64")]
fn product<'a, E: Element + Dot<Sum: Stored> + Stored>(
    x: &'a Input<'_>,
    y: &'a Input<'_>,
    out: &'a Input<'_>,
    how: How,
) -> Option<Product<'a, E>> {
    let (x, y, place) = (x.rows::<E>()?, y.rows::<E>()?, out.rows::<E::Sum>()?);
    let (stride, 1) = place.strides() else {
        return None;
    };
    let shape = (place.rows(), place.cols());
    if shape != (x.rows(), y.cols()) || x.cols() != y.rows() || stride < shape.1 as isize {
        return None;
    }
    // SAFETY: an ordinary tensor's memory, whose rows do not overlap; as in any operation that writes a tensor, whoever
    // calls sees to it that nobody else uses it meanwhile.
    let out = unsafe { Target::new(out.data().cast(), shape, stride as usize) };
    let How { add, upper } = how;
    Some(Product {
        x,
        y,
        out,
        add,
        upper,
    })
}

/// Multiplications that make it worthwhile for a thread to take part in a product.
const PANEL_GRAIN: usize = 1 << 21;
/// Rows of a panel, at least and at most: with fewer a product is slow, with more less of it is left out.
const HEIGHTS: (usize, usize) = (64, 256);

/// The height of the panels of `x x^T`, each of which begins at its block of the diagonal, for `x` of this shape.
/// Half of the products is left out as the panels get low, and all threads shall have enough to do in each.
pub fn panel_height(rows: usize, cols: usize) -> usize {
    let mut height = (rows / 8 / 32 * 32).clamp(HEIGHTS.0, HEIGHTS.1);
    // The average panel is (rows + height) / 2 wide.
    while height < rows && height * (rows + height) / 2 * cols < PANEL_GRAIN * max_threads() {
        height *= 2;
    }
    height.min(rows).max(1)
}

/// Elements that one thread copies in the time that makes another thread worthwhile.
const COPY_GRAIN: usize = 1 << 16;

/// All threads: [`multiply`].
pub struct Together;

impl<F: Stored + Real> Multiply<F> for Together {
    type Error = Error;

    fn dots(&self, x: &[F], y: &[F], width: usize, upper: bool, out: &mut [F]) -> Result<()> {
        let across = y.len() / width.max(1);
        let (x, y) = (view(x, width)?, view(y, width)?.f_tr()?);
        multiply(&x, &y, &place(out, across)?, How { add: true, upper })
    }

    fn combine(&self, f: &[F], x: &[F], width: usize, add: bool, out: &mut [F]) -> Result<()> {
        let (f, x) = (view(f, x.len() / width.max(1))?, view(x, width)?);
        let how = How { add, upper: false };
        multiply(&f, &x, &place(out, width)?, how)
    }

    fn outer(&self, x: &[F], width: usize, out: &mut [F]) -> Result<()> {
        let x = view(x, width)?;
        let how = How {
            add: true,
            upper: true,
        };
        multiply(&x.f_tr()?, &x, &place(out, width)?, how)
    }

    fn finish(&self, width: usize, out: &mut [F]) {
        let threads = threads_for(out.len() / 2, COPY_GRAIN, max_threads());
        mirror(out, width, threads);
    }
}

/// Calls `write` for every panel of `x y`, a square matrix, with its factors and its place in `out`: on and above the
/// diagonal all is covered.
fn upper_panels(
    x: &Tensor,
    y: &Tensor,
    out: &Tensor,
    write: impl Fn(&Tensor, &Tensor, &mut Tensor) -> Result<()>,
) -> Result<()> {
    let (rows, cols) = x.size2()?;
    let height = panel_height(rows as usize, cols as usize) as i64;
    if height >= rows {
        return write(x, y, &mut out.shallow_clone());
    }
    for top in (0..rows).step_by(height as usize) {
        let (high, wide) = (height.min(rows - top), rows - top);
        let (x, y) = (x.f_narrow(0, top, high)?, y.f_narrow(1, top, wide)?);
        let mut panel = out.f_narrow(0, top, high)?.f_narrow(1, top, wide)?;
        write(&x, &y, &mut panel)?;
    }
    Ok(())
}

/// A tensor over the same memory, which must only be read and not outlive it.
fn view<F: Stored>(rows: &[F], cols: usize) -> Result<Tensor> {
    let size = [(rows.len() / cols.max(1)) as i64, cols as i64];
    let data = rows.as_ptr().cast::<u8>();
    // SAFETY: the slice has at least as many elements of this type; the callers keep the tensor within its
    // borrow and do not write it.
    Ok(unsafe { Tensor::f_from_blob(data, &size, &[size[1], 1], F::KIND, Device::Cpu)? })
}

/// A tensor over the same memory, which is written through it; neither may outlive the borrow.
fn place<F: Stored>(out: &mut [F], cols: usize) -> Result<Tensor> {
    let size = [(out.len() / cols.max(1)) as i64, cols as i64];
    let data = out.as_mut_ptr().cast::<u8>();
    // SAFETY: the slice has at least as many elements of this type and is borrowed for this alone; the callers drop
    // the tensor within the borrow.
    Ok(unsafe { Tensor::f_from_blob(data, &size, &[size[1], 1], F::KIND, Device::Cpu)? })
}
