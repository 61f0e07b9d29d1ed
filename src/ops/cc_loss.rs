//! Class confusion consistency on tensors. The mathematics is in [`crate::kernels::cc_loss`].

use super::mcc::{confusion, weighted};
use super::{positive, threads};
use crate::error::{Error, Result};
use crate::kernels::cc_loss::{Factors, Selected, inner, select};
use crate::kernels::element::Element;
use crate::kernels::real::Real;
use crate::torch::autograd::{StoredGrad, attach};
use crate::torch::input::Input;
use crate::torch::{Dtype, Owned, Stored, by_dtype, scalar, version};
use tch::{Kind, Tensor};

const CLASS: &str = "CCConsistency";
/// Selected rows below C / `GRAM` make the way around the C x C matrix the shorter one, in f64.
const GRAM: usize = 4;
/// Multiplications (`n C^2`) up to which f64 costs no time that matters. It keeps the digits that the
/// sum over a batch of unrelated predictions loses in f32, as tllib's does.
const EXACT: usize = 1 << 20;

/// What the method returns.
pub struct Output {
    /// Scalar, differentiable with respect to the strong logits.
    pub loss: Tensor,
    /// Scalar, float32: the fraction of rows that are selected.
    pub fraction: Tensor,
    /// Their number, where the host knows it without waiting.
    pub count: Option<usize>,
}

/// `ValueError` for a temperature that is not above 0 or a threshold that is NaN.
pub fn check_arguments(temperature: f64, thr: f64) -> Result<()> {
    positive(CLASS, "temperature", temperature)?;
    if thr.is_nan() {
        return Err(Error::Value(format!(
            "{CLASS}: thr must be a number, got {thr}"
        )));
    }
    Ok(())
}

/// The loss between weakly and strongly augmented logits, both (minibatch, C).
pub fn cc_loss(
    logits: &Tensor,
    logits_strong: &Tensor,
    temperature: f64,
    thr: f64,
) -> Result<Output> {
    let weak = Input::new(CLASS, "logits", logits)?;
    let strong = Input::new(CLASS, "logits_strong", logits_strong)?;
    check_arguments(temperature, thr)?;
    let (dtype, strong_dtype) = (weak.floating()?, strong.floating()?);
    let (rows, _) = weak.matrix()?;
    strong.matrix()?;
    strong.same_device(&weak)?;
    if weak.shape() != strong.shape() {
        return Err(strong.wrong(&format!("have the shape of logits, {:?}", weak.shape())));
    }
    if !weak.on_cpu() || !strong.on_cpu() || dtype != strong_dtype {
        let (loss, fraction) = composite(logits, logits_strong, temperature, thr)?;
        return Ok(Output {
            loss,
            fraction,
            count: (rows == 0).then_some(0),
        });
    }
    let (output, grad) = fused(&weak, &strong, dtype, (temperature, thr))?;
    if let Some(grad) = grad {
        let held = Held {
            logits: logits.f_detach()?,
            version: version(logits),
        };
        let formula = Box::new(move |t: &[Tensor]| held.loss(&t[0], temperature, thr));
        attach(
            c"CcLossBackward",
            &output.loss,
            &[logits_strong],
            vec![Some(grad)],
            formula,
        )?;
    }
    Ok(output)
}

fn fused(
    weak: &Input<'_>,
    strong: &Input<'_>,
    dtype: Dtype,
    (temperature, thr): (f64, f64),
) -> Result<(Output, Option<StoredGrad>)> {
    by_dtype!(dtype, E => {
        let dense = |input: &Input<'_>| input.wrong("be a dense matrix");
        let (w, s) = (
            weak.rows::<E>().ok_or_else(|| dense(weak))?,
            strong.rows::<E>().ok_or_else(|| dense(strong))?,
        );
        let (rows, cols) = (w.rows(), w.cols());
        let found = select(w, s, temperature, thr, threads(2 * weak.numel()));
        let count = found.count();
        let fraction = if rows == 0 { 0.0 } else { count as f64 / rows as f64 };
        let factor = fraction / cols as f64;
        let around = GRAM * count <= cols;
        let small = count * cols * cols <= EXACT;
        let (square, grad) = if around || small || dtype == Dtype::F64 {
            measure::<E, f64>(&found, strong, factor, around)
        } else {
            measure::<E, f32>(&found, strong, factor, around)
        }?;
        // The number of selected rows is float32, and so promotes a half matrix, in tllib too.
        let output = Output {
            loss: scalar(factor * square, dtype.at_least_f32())?,
            fraction: scalar(fraction, Dtype::F32)?,
            count: Some(count),
        };
        Ok((output, grad))
    })
}

/// `sum D^2` and, where the strong logits want one, the gradient; with products in `F`, and
/// without the C x C matrix where `around`.
fn measure<E: Element + Stored, F: Real + Stored>(
    found: &Selected,
    strong: &Input<'_>,
    factor: f64,
    around: bool,
) -> Result<(f64, Option<StoredGrad>)> {
    let (n, cols) = (found.count() as i64, strong.shape()[1]);
    let (mut u, mut v) = (
        Owned::<F>::new(&[2 * n, cols])?,
        Owned::<F>::new(&[2 * n, cols])?,
    );
    let mut p = Owned::<F>::new(&[n, cols])?;
    found.factors(Factors {
        u: u.slice(),
        v: v.slice(),
        strong: p.slice(),
    });
    let (u, v, p) = (u.into_tensor(), v.into_tensor(), p.into_tensor());
    let (square, products) = if around {
        let (mut uu, mut vv) = (product::<F>(&u, &u.f_tr()?)?, product::<F>(&v, &v.f_tr()?)?);
        let square = inner(uu.slice(), vv.slice());
        let products = strong.wants_grad().then(|| -> Result<_> {
            let (qv, pu) = (
                vv.tensor().f_narrow(0, 0, n)?,
                product::<F>(&p, &u.f_tr()?)?,
            );
            Ok((product::<F>(&qv, &u)?, product::<F>(pu.tensor(), &v)?))
        });
        (square, products)
    } else {
        let mut d = product::<F>(&u.f_tr()?, &v)?;
        let entries = &*d.slice();
        let square = inner(entries, entries);
        let products = strong.wants_grad().then(|| -> Result<_> {
            let d = d.tensor();
            Ok((
                product::<F>(&v.f_narrow(0, 0, n)?, &d.f_tr()?)?,
                product::<F>(&p, d)?,
            ))
        });
        (square, products)
    };
    let Some((mut x, mut y)) = products.transpose()? else {
        return Ok((square, None));
    };
    let mut grad = Owned::<E>::new(strong.shape())?;
    let scale = found.gradient(x.slice(), y.slice(), factor, grad.slice());
    Ok((square, Some(StoredGrad::new(grad.into_tensor(), scale))))
}

/// `a b` in new memory. (The form with an output is not subject to autocast.)
fn product<F: Stored>(a: &Tensor, b: &Tensor) -> Result<Owned<F>> {
    let out = Owned::<F>::new(&[a.size()[0], b.size()[1]])?;
    let _ = a.f_mm_out(out.tensor(), b)?;
    Ok(out)
}

/// The weak logits, for second derivatives.
struct Held {
    logits: Tensor,
    version: i64,
}

// SAFETY: at::Tensor's reference count is atomic, and nothing writes this tensor's metadata.
unsafe impl Sync for Held {}

impl Held {
    fn loss(&self, strong: &Tensor, temperature: f64, thr: f64) -> Result<Tensor> {
        if version(&self.logits) != self.version {
            return Err(Error::Bridge(format!(
                "{CLASS}: logits were modified in place after the loss was computed, so that its second \
                 derivatives are lost"
            )));
        }
        Ok(composite(&self.logits, strong, temperature, thr)?.0)
    }
}

/// Loss and fraction in libtorch operations. The rows stay where they are and weigh 0 unless
/// selected, because to take them out would wait for the device.
fn composite(
    logits: &Tensor,
    logits_strong: &Tensor,
    temperature: f64,
    thr: f64,
) -> Result<(Tensor, Tensor)> {
    let wide = |t: &Tensor| -> Result<bool> { Ok(t.f_kind()? == Kind::Double) };
    let inside = if wide(logits)? || wide(logits_strong)? {
        Kind::Double
    } else {
        Kind::Float
    };
    let (rows, cols) = (logits.size()[0], logits.size()[1]);
    let weak = logits.f_detach()?;
    let q = weak
        .f_div_scalar(temperature)?
        .f_softmax(1, weak.f_kind()?)?;
    let selected = q.f_amax([1].as_slice(), true)?.f_ge(thr)?;
    let others = selected.f_logical_not()?;
    let matrix = |z: &Tensor| -> Result<Tensor> {
        let z = z.f_to_kind(inside)?.f_masked_fill(&others, 0.0)?;
        let (p, wp) = weighted(&z, temperature, inside)?;
        confusion(&p, &wp.f_masked_fill(&others, 0.0)?)
    };
    let count = selected.f_to_kind(Kind::Float)?.f_sum(Kind::Float)?;
    let square = matrix(&weak)?
        .f_sub(&matrix(logits_strong)?)?
        .f_square()?
        .f_sum(inside)?;
    // The count, and not the rounded fraction, goes into the loss.
    let rows = rows.max(1);
    let loss = square
        .f_mul(&count)?
        .f_div_scalar(cols as f64 * rows as f64)?;
    Ok((loss, count.f_div_scalar(rows)?))
}
