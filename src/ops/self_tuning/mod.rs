//! Self-tuning's contrastive log-probabilities and its queue, on tensors. The mathematics is in
//! [`crate::kernels::self_tuning`], the queue's past in [`queue`].

mod check;
mod device;
mod node;
pub mod parts;
mod plan;
mod queue;

use super::{counting, inside, threads};
use crate::error::Result;
use crate::kernels::element::Element;
use crate::kernels::real::Real;
use crate::kernels::self_tuning::{Shape, log_probabilities};
use crate::torch::input::Input;
use crate::torch::product::{How, multiply};
use crate::torch::{Dtype, Owned, Stored, Without, beside, no_grad};
use check::{Checked, Pointers};
use node::{Held, Node};
use plan::Plan;
pub use queue::History;
use std::sync::Arc;
use tch::{Kind, Tensor};

/// The class, for messages.
pub const CLASS: &str = "SelfTuning";

/// The hyper-parameters of the class.
#[derive(Clone, Copy)]
pub struct Settings {
    /// Number of classes.
    pub classes: i64,
    /// Keys per class.
    pub keys: i64,
    /// Momentum of the key encoder.
    pub momentum: f64,
    /// Divides the scores.
    pub temperature: f64,
}

impl Settings {
    /// What the kernels need to know.
    fn shape(self) -> Shape {
        Shape {
            keys: self.keys as usize,
            temperature: self.temperature,
        }
    }
}

/// What the log-probabilities depend on.
#[derive(Clone, Copy)]
pub struct Batch<'a> {
    /// (minibatch, D), the queries.
    pub h_q: &'a Tensor,
    /// (minibatch, D), their keys.
    pub h_k: &'a Tensor,
    /// (minibatch,)
    pub labels: &'a Tensor,
    /// (D, K C)
    pub queue_list: &'a Tensor,
    /// Keys (rows, D) and labels (rows,) to enqueue in place of `h_k` and `labels`: those of all
    /// ranks.
    pub enqueued: Option<(&'a Tensor, &'a Tensor)>,
}

impl Batch<'_> {
    /// The labels as int64 on the device of the queries.
    fn classes(&self) -> Result<Tensor> {
        beside(self.labels, Kind::Int64, self.h_q)
    }
}

/// The log-probabilities of a batch against the queue, (minibatch, 1 + K C), differentiable with
/// respect to the queries; then its keys are enqueued at `queue_ptr`, (C,).
pub fn self_tuning(
    batch: &Batch<'_>,
    queue_ptr: &Tensor,
    settings: Settings,
    history: &History,
) -> Result<Tensor> {
    let checked = Checked::new(batch, settings)?;
    let pointers = Pointers::new(queue_ptr, batch.queue_list, settings)?;
    if let Some(out) = device::step(batch, &checked, &pointers.queue_ptr, settings, history)? {
        return Ok(out);
    }
    let (Some(labels), Some(places)) = (checked.on_host(settings)?, pointers.on_host()?) else {
        let entering = batch.enqueued.map_or(batch.labels, |(_, all)| all);
        let entering = beside(entering, Kind::Int64, batch.h_q)?;
        let plan = Plan::on_device(&entering, queue_ptr, settings.keys)?;
        return composite(batch, queue_ptr, settings, checked.dtype, &plan);
    };
    let entering = checked.enqueued_on_host(settings)?;
    let entering = entering.as_ref().unwrap_or(&labels);
    let plan = Plan::on_host(entering, places, settings.keys as usize)?;
    match checked.dtype {
        Dtype::F32 if checked.fusible => fused::<f32>(
            (batch, queue_ptr),
            &checked,
            labels,
            settings,
            &plan,
            history,
        ),
        Dtype::F64 if checked.fusible => fused::<f64>(
            (batch, queue_ptr),
            &checked,
            labels,
            settings,
            &plan,
            history,
        ),
        dtype => composite(batch, queue_ptr, settings, dtype, &plan),
    }
}

fn fused<E: Element<Acc = E> + Real + Stored>(
    (batch, queue_ptr): (&Batch<'_>, &Tensor),
    checked: &Checked<'_>,
    labels: Vec<usize>,
    settings: Settings,
    plan: &Plan,
    history: &History,
) -> Result<Tensor> {
    let keys = batch.h_k.f_detach()?.f_to_kind(E::KIND)?;
    let entering = match batch.enqueued {
        Some((all, _)) => all.f_detach()?.f_to_kind(E::KIND)?,
        None => keys.shallow_clone(),
    };
    let batch = &Batch {
        h_k: &keys,
        ..*batch
    };
    let forward = || scores::<E>(batch, &labels, settings);
    let wanted = checked.h_q.wants_grad();
    let queue = batch.queue_list;
    let (out, snapshot) =
        no_grad(|| history.step(queue, queue_ptr, &entering, plan, wanted, forward))?;
    if let Some(snapshot) = snapshot {
        let queue = Arc::new(snapshot);
        let held = Held::new(queue.clone(), &keys, &batch.classes()?, settings)?;
        let node = Node::<E>::new(&held, queue, &out, labels, batch.h_q.f_kind()?)?;
        held.attach(&out, batch.h_q, node, E::KIND)?;
    }
    Ok(out)
}

/// The log-probabilities of a batch in host memory, without a graph.
fn scores<E: Element<Acc = E> + Real + Stored>(
    batch: &Batch<'_>,
    labels: &[usize],
    settings: Settings,
) -> Result<Tensor> {
    let queries = batch.h_q.f_detach()?.f_to_kind(E::KIND)?;
    let keys = batch.h_k.f_detach()?.f_to_kind(E::KIND)?;
    let queue = batch.queue_list.f_detach()?;
    let columns = settings.keys * settings.classes;
    // After the column of the own key: scores then move within their row only.
    let product = |out: &Tensor| {
        let out = out.f_narrow(1, 1, columns)?;
        multiply(&queries, &queue, &out, How::default())
    };
    let shape = [labels.len() as i64, 1 + columns];
    // SAFETY: the product keeps nothing; the view that it writes to is gone.
    let mut scores = unsafe { Owned::<E>::written_by(&shape, product)? };
    let (q, k) = (
        Input::new(CLASS, "h_q", &queries)?,
        Input::new(CLASS, "h_k", &keys)?,
    );
    let q = q.dense_rows::<E>()?;
    let k = k.dense_rows::<E>()?;
    let work = threads(labels.len() * (1 + columns as usize));
    log_probabilities(scores.slice(), q, k, labels, settings.shape(), work);
    Ok(scores.into_tensor())
}

/// The step in libtorch operations. Autograd saves the queue, so it gets a copy.
fn composite(
    batch: &Batch<'_>,
    queue_ptr: &Tensor,
    settings: Settings,
    dtype: Dtype,
    plan: &Plan,
) -> Result<Tensor> {
    let (keys, queue) = (batch.h_k.f_detach()?, batch.queue_list.f_detach_copy()?);
    let labels = batch.classes()?;
    let out = formula(batch.h_q, &keys, &labels, &queue, settings, dtype.kind())?;
    let entering = batch.enqueued.map_or(&keys, |(all, _)| all);
    plan.apply(entering, batch.queue_list, queue_ptr)?;
    Ok(out)
}

/// The log-probabilities from the definition. `labels` are int64.
fn formula(
    h_q: &Tensor,
    h_k: &Tensor,
    labels: &Tensor,
    queue: &Tensor,
    settings: Settings,
    kind: Kind,
) -> Result<Tensor> {
    let inside = inside(kind);
    let _guard = Without::autocast();
    let q = h_q.f_to_kind(inside)?;
    let own = q
        .f_mul(&h_k.f_to_kind(inside)?)?
        .f_sum_dim_intlist(1, true, inside)?;
    let scores = q.f_mm(&queue.f_to_kind(inside)?)?;
    let scores = scores.f_gather(1, &order(labels, settings)?, false)?;
    let scores = Tensor::f_cat(&[own, scores], 1)?.f_div_scalar(settings.temperature)?;
    Ok(scores.f_log_softmax(1, inside)?.f_to_kind(kind)?)
}

/// The columns of the queue in the order of the output: the own class, then the others.
fn order(labels: &Tensor, settings: Settings) -> Result<Tensor> {
    let keys = settings.keys;
    let arange = |n: i64| counting(n, labels);
    let start = labels.f_mul_scalar(keys)?.f_unsqueeze(1)?;
    let own = start.f_add(&arange(keys)?)?;
    let others = arange(keys * (settings.classes - 1))?.f_unsqueeze(0)?;
    let behind = others.f_ge_tensor(&start)?.f_to_kind(Kind::Int64)?;
    let others = others.f_add(&behind.f_mul_scalar(keys)?)?;
    Ok(Tensor::f_cat(&[own, others], 1)?)
}
