//! Class confusion consistency on tensors. The mathematics is in [`crate::kernels::cc_loss`].

mod operations;

use super::{Place, not_nan, place, positive, room_for, threads, widened_on_devices};
use crate::error::Result;
use crate::kernels::Loss;
use crate::kernels::cc_loss::{FEW, Pairs, choose, gram, gram_room, matrix};
use crate::kernels::element::Element;
use crate::kernels::product::{Alone, Multiply};
use crate::kernels::real::Real;
use crate::torch::autograd::{Room, StoredGrad, attach};
use crate::torch::input::Input;
use crate::torch::product::Together;
use crate::torch::saved::Saved;
use crate::torch::{Dtype, Stored, by_dtype, scalar};
use operations::{Call, composite, operations};
use tch::Tensor;

/// The class, for messages.
pub const CLASS: &str = "CCConsistency";
/// Multiplications, when the C x C matrix is formed, up to which f64 costs no significant time. It keeps the
/// digits that the sum over a batch of unrelated predictions loses in f32, as in tllib.
const EXACT: usize = 3 << 20;
/// Multiplications up to which this thread does them alone: that takes less time than a library's threads may
/// need to synchronize when other threads occupy the processors.
const ALONE: usize = 1 << 22;

/// What the method returns.
pub struct Output {
    /// Scalar, differentiable with respect to the strong logits.
    pub loss: Tensor,
    /// Scalar, float32: the fraction of rows that are selected.
    pub fraction: Tensor,
    /// Whether no rows are selected; false if the host would have to wait to know.
    pub nothing: bool,
}

/// `ValueError` for a temperature that is not above 0 or a threshold that is NaN.
pub fn check_cc_loss(temperature: f64, thr: f64) -> Result<()> {
    positive(CLASS, "temperature", temperature)?;
    not_nan(CLASS, "thr", thr)
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
    check_cc_loss(temperature, thr)?;
    let dtype = weak.floating()?;
    strong.floating()?;
    let (rows, _) = weak.matrix()?;
    strong.matrix()?;
    strong.like(&weak)?;
    let call = Call {
        temperature,
        thr,
        selecting: widened_on_devices(&weak, dtype).kind(),
    };
    let output = |(loss, fraction): (Tensor, Tensor)| -> Result<Output> {
        let facts = Input::new(CLASS, "fraction", &fraction)?;
        let known = facts.is_cpu() && facts.readable();
        Ok(Output {
            nothing: rows == 0 || (known && fraction.f_double_value(&[])? == 0.0),
            loss,
            fraction,
        })
    };
    let (output, grad) = match place(&[&weak, &strong]) {
        Place::Cpu => fused(&weak, &strong, dtype, (temperature, thr))?,
        // There is no CUDA kernel.
        Place::Operations | Place::Cuda => {
            let (outputs, grad) = operations(&weak, &strong, call)?;
            (output(outputs)?, grad)
        }
        Place::Composite => return output(composite(logits, logits_strong, call)?),
    };
    attach(
        c"CcLossBackward",
        &output.loss,
        &[logits_strong],
        [grad],
        || {
            let weak = Saved::of(logits, "CCConsistency's logits")?;
            Ok(move |t: &[Tensor]| Ok(composite(weak.get()?, &t[0], call)?.0))
        },
    )?;
    Ok(output)
}

fn fused(
    weak: &Input<'_>,
    strong: &Input<'_>,
    dtype: Dtype,
    (temperature, thr): (f64, f64),
) -> Result<(Output, Option<StoredGrad>)> {
    by_dtype!(dtype, E => {
        let (w, s) = (weak.dense_rows::<E>()?, strong.dense_rows::<E>()?);
        let chosen = choose(w, temperature, thr, threads(weak.numel()));
        let rows = w.rows();
        let fraction = if rows == 0 { 0.0 } else { chosen.len() as f64 / rows as f64 };
        let pairs = Pairs {
            weak: w,
            strong: s,
            temperature,
            chosen: &chosen,
            // Exponentials and logarithms of both sides, in f64.
            threads: threads(4 * chosen.len() * w.cols()),
        };
        let (loss, grad) = measure(pairs, strong, dtype)?;
        let output = Output {
            // The number of selected rows is float32, and so promotes a half matrix, in tllib too.
            loss: scalar(loss, dtype.at_least_f32())?,
            fraction: scalar(fraction, Dtype::F32)?,
            nothing: chosen.is_empty(),
        };
        Ok((output, grad))
    })
}

/// The loss and, where the strong logits want one, the gradient.
fn measure<E: Element + Stored>(
    pairs: Pairs<'_, E>,
    strong: &Input<'_>,
    dtype: Dtype,
) -> Result<(f64, Option<StoredGrad>)> {
    let mut grad = Room::<E>::of(strong)?;
    let out = grad.slice();
    let (count, cols) = (pairs.chosen.len(), pairs.weak.cols());
    let loss = if count == 0 {
        if let Some(out) = out {
            out.fill(E::store(E::Acc::ZERO));
        }
        Loss {
            value: 0.0,
            scale: 1.0,
        }
    } else {
        let way = Way::of(count, cols, dtype);
        way.room(count, cols)?;
        if way.alone {
            let Ok(loss) = way.go(pairs, out, &Alone);
            loss
        } else {
            way.go(pairs, out, &Together)?
        }
    };
    Ok((loss.value, grad.stored(loss.scale)))
}

/// How the loss is computed.
struct Way {
    /// Without forming the C x C matrix; always in f64.
    around: bool,
    /// In f64.
    exact: bool,
    /// On this thread alone.
    alone: bool,
}

impl Way {
    /// The fastest for `rows` rows.
    fn of(rows: usize, cols: usize, dtype: Dtype) -> Self {
        // Multiplications.
        let (around, through) = (12 * rows * rows * cols, 3 * rows * cols * cols);
        let exact = through <= EXACT || dtype == Dtype::F64;
        // f32 is twice as fast.
        let through_time = if exact { through } else { through / 2 };
        if around <= through_time {
            return Self {
                around: true,
                exact: true,
                alone: around <= ALONE || rows <= FEW,
            };
        }
        Self {
            around: false,
            exact,
            alone: through <= ALONE,
        }
    }

    /// An error if there is no memory for its matrices of rows or of classes.
    fn room(&self, rows: usize, cols: usize) -> Result<()> {
        let count = 2 * cols * cols;
        match self {
            Self { around: true, .. } => room_for::<f64>(gram_room(rows)),
            Self { exact: true, .. } => room_for::<f64>(count),
            _ => room_for::<f32>(count),
        }
    }

    fn go<E: Element, M, X>(
        &self,
        pairs: Pairs<'_, E>,
        mut grad: Option<&mut [E]>,
        products: &M,
    ) -> std::result::Result<Loss, X>
    where
        M: Multiply<f32, Error = X> + Multiply<f64, Error = X> + Sync,
        X: Send,
    {
        if self.around {
            return gram(pairs, grad, products);
        }
        if !self.exact
            && let Some(loss) = matrix::<E, f32, _>(pairs, grad.as_deref_mut(), products)?
        {
            return Ok(loss);
        }
        let loss = matrix::<E, f64, _>(pairs, grad, products)?;
        // Never used: the range of f64 suffices for all classes that are not treated as absent.
        Ok(loss.unwrap_or(Loss {
            value: f64::NAN,
            scale: 1.0,
        }))
    }
}
