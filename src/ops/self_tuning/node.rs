//! The backward pass of self-tuning's log-probabilities.

use super::queue::{Past, Snapshot};
use super::{CLASS, Settings, formula, order};
use crate::error::Result;
use crate::kernels::element::Element;
use crate::kernels::real::Real;
use crate::kernels::rows::Rows;
use crate::kernels::self_tuning::log_probabilities_backward;
use crate::ops::threads;
use crate::torch::autograd::{Backward, attach_with};
use crate::torch::input::Input;
use crate::torch::saved::Saved;
use crate::torch::{Owned, Stored};
use std::marker::PhantomData;
use std::sync::Arc;
use tch::{Kind, Tensor};

/// What forward saw besides the queries.
#[derive(Clone)]
pub struct Held(Arc<Parts>);

struct Parts {
    queue: Past,
    /// (minibatch, D), in a type that promotes to the computing type.
    keys: Tensor,
    /// int64
    labels: Tensor,
    settings: Settings,
}

// SAFETY: at::Tensor's reference count is atomic, and nothing writes these tensors' metadata.
unsafe impl Sync for Parts {}

impl Held {
    /// Keys and labels (int64) are copied: the caller may write theirs before backward.
    pub fn new(
        queue: Arc<Snapshot>,
        keys: &Tensor,
        labels: &Tensor,
        settings: Settings,
    ) -> Result<Self> {
        let (keys, labels) = (keys.f_detach_copy()?, labels.f_detach_copy()?);
        Ok(Self::kept(Past::Changed(queue), keys, labels, settings))
    }

    /// From tensors that nobody else holds.
    pub fn kept(queue: Past, keys: Tensor, labels: Tensor, settings: Settings) -> Self {
        Self(Arc::new(Parts {
            queue,
            keys,
            labels,
            settings,
        }))
    }

    /// The gradient of the queries in libtorch operations, for incoming gradients that no kernel may read
    /// (as under `torch.func.vmap`).
    pub fn gradient(&self, incoming: &Tensor, out: &Tensor) -> Result<Tensor> {
        let (keys, labels, queue) = self.parts()?;
        gradient(incoming, out, (keys, labels, &queue), self.0.settings)
    }

    /// Keys, labels and the queue.
    pub fn parts(&self) -> Result<(&Tensor, &Tensor, Tensor)> {
        let Parts { keys, labels, .. } = &*self.0;
        Ok((keys, labels, self.0.queue.restored()?))
    }

    /// Recomputes the log-probabilities, in operations that autograd can differentiate.
    pub fn formula(&self, h_q: &Tensor, kind: Kind) -> Result<Tensor> {
        let (keys, labels, queue) = self.parts()?;
        formula(h_q, keys, labels, &queue, self.0.settings, kind)
    }

    /// Makes `out` differentiable with respect to `h_q`, by `backward` or, for second derivatives, by the formula in
    /// `kind`.
    pub fn attach(
        self,
        out: &Tensor,
        h_q: &Tensor,
        backward: impl Backward + 'static,
        kind: Kind,
    ) -> Result<()> {
        let formula = Box::new(move |t: &[Tensor]| self.formula(&t[0], kind));
        let backward = Box::new(backward);
        attach_with(c"SelfTuningBackward", out, &[h_q], backward, formula)
    }
}

/// The log-probabilities that the user gets, saved as torch's own log-softmax saves its result.
pub fn saved(out: &Tensor) -> Result<Saved> {
    Saved::of(out, "SelfTuning's pgc_logits")
}

/// The node's state.
pub struct Node<E> {
    held: Held,
    queue: Arc<Snapshot>,
    out: Saved,
    labels: Vec<usize>,
    /// The dtype of the queries.
    kind: Kind,
    element: PhantomData<E>,
}

impl<E> Node<E> {
    /// `out` is contiguous and of type `E`.
    pub fn new(
        held: &Held,
        queue: Arc<Snapshot>,
        out: &Tensor,
        labels: Vec<usize>,
        kind: Kind,
    ) -> Result<Self> {
        Ok(Self {
            held: held.clone(),
            queue,
            out: saved(out)?,
            labels,
            kind,
            element: PhantomData,
        })
    }
}

impl<E: Element<Acc = E> + Real + Stored> Backward for Node<E> {
    fn grads(&mut self, incoming: &Tensor, _last: bool) -> Result<Vec<Option<Tensor>>> {
        let out = self.out.get()?;
        let input = Input::new(CLASS, "grad_output", incoming)?;
        let grad = match input.rows::<E>() {
            Some(rows) => {
                let Parts { keys, settings, .. } = &*self.held.0;
                let product = |scores: &mut Tensor| self.queue.times_transposed(scores);
                fused(rows, out, (keys, &self.labels), *settings, product)?
            }
            None => self.held.gradient(incoming, out)?,
        };
        Ok(vec![Some(grad.f_to_kind(self.kind)?)])
    }
}

/// The gradient of the queries. `times_transposed` multiplies that of the queue's scores, which it may overwrite, by
/// the transposed queue. `out` is contiguous and of type `E`, as are the keys.
pub fn fused<E: Element<Acc = E> + Real + Stored>(
    incoming: Rows<'_, E>,
    out: &Tensor,
    (keys, labels): (&Tensor, &[usize]),
    settings: Settings,
    times_transposed: impl FnOnce(&mut Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let scores = scores_gradient(incoming, out, labels, settings)?;
    let width = scores.size2()?.1;
    let mut grad = times_transposed(&mut scores.f_narrow(1, 1, width - 1)?)?;
    let _ = grad.f_addcmul_(&scores.f_narrow(1, 0, 1)?, keys)?;
    Ok(grad)
}

/// The gradient of the scores: of the own key, then of the queue in the order of its columns.
/// `out` is contiguous and of type `E`.
fn scores_gradient<E: Element<Acc = E> + Real + Stored>(
    incoming: Rows<'_, E>,
    out: &Tensor,
    labels: &[usize],
    settings: Settings,
) -> Result<Tensor> {
    let mut scores = Owned::<E>::new(&[incoming.rows() as i64, incoming.cols() as i64])?;
    let out = Input::new(CLASS, "pgc_logits", out)?;
    let values = out.whole::<E>()?;
    log_probabilities_backward(
        incoming,
        values,
        labels,
        settings.shape(),
        scores.slice(),
        threads(values.len()),
    );
    Ok(scores.into_tensor())
}

/// The gradient of the queries in libtorch operations, from keys, labels (int64) and queue, all of
/// the computing type.
pub fn gradient(
    incoming: &Tensor,
    out: &Tensor,
    (keys, labels, queue): (&Tensor, &Tensor, &Tensor),
    settings: Settings,
) -> Result<Tensor> {
    let total = incoming.f_sum_dim_intlist(1, true, None::<Kind>)?;
    let scores = incoming.f_sub(&out.f_exp()?.f_mul(&total)?)?;
    let scores = scores.f_div_scalar(settings.temperature)?;
    let columns = scores.f_narrow(1, 1, settings.keys * settings.classes)?;
    // The argsort of a permutation is its inverse.
    let inverse = order(labels, settings)?.f_argsort(1, false)?;
    let columns = columns.f_gather(1, &inverse, false)?;
    let own = scores.f_narrow(1, 0, 1)?.f_mul(keys)?;
    Ok(columns.f_mm(&queue.f_tr()?)?.f_add(&own)?)
}
