//! The step in three parts that share no state, for `torch.compile`: the compiled graph carries what
//! backward needs, including a copy of the queue.

use super::check::{Checked, Pointers};
use super::node::{self, gradient};
use super::plan::Plan;
use super::{Batch, CLASS, Settings, device, formula, scores};
use crate::error::Result;
use crate::kernels::element::Element;
use crate::kernels::real::Real;
use crate::ops::inside;
use crate::torch::input::Input;
use crate::torch::product::{How, multiply};
use crate::torch::{Dtype, Owned, Stored, dense, no_grad};
use tch::Tensor;

/// The log-probabilities, without a graph; nothing is enqueued.
pub fn forward(batch: &Batch<'_>, settings: Settings) -> Result<Tensor> {
    let checked = Checked::new(batch, settings)?;
    if let Some(scored) = device::forward(batch, &checked, settings, false)? {
        return Ok(scored.out);
    }
    let labels = checked.on_host(settings)?.filter(|_| checked.fusible);
    match (checked.dtype, labels) {
        (Dtype::F32, Some(labels)) => no_grad(|| scores::<f32>(batch, &labels, settings)),
        (Dtype::F64, Some(labels)) => no_grad(|| scores::<f64>(batch, &labels, settings)),
        (dtype, _) => no_grad(|| {
            let Batch {
                h_q,
                h_k,
                queue_list,
                ..
            } = batch;
            let labels = batch.classes()?;
            formula(h_q, h_k, &labels, queue_list, settings, dtype.kind())
        }),
    }
}

/// The gradient of the queries, from that of the log-probabilities `out`. The batch holds the queue
/// as [`forward`] saw it.
pub fn backward(
    incoming: &Tensor,
    out: &Tensor,
    batch: &Batch<'_>,
    settings: Settings,
) -> Result<Tensor> {
    let checked = Checked::new(batch, settings)?;
    let columns = 1 + settings.keys * settings.classes;
    let (rows, _) = checked.h_q.matrix()?;
    for (name, tensor) in [("grad_output", incoming), ("pgc_logits", out)] {
        let input = Input::new(CLASS, name, tensor)?;
        input.floating()?;
        if input.shape() != [rows as i64, columns] {
            return Err(input.wrong(&format!("have shape [{rows}, {columns}]")));
        }
        input.same_device(&checked.h_q)?;
    }
    if let Some(grad) = device::backward(incoming, out, batch, &checked, settings)? {
        return Ok(grad);
    }
    let labels = checked.on_host(settings)?.filter(|_| checked.fusible);
    let grad = no_grad(|| match (checked.dtype, labels) {
        (Dtype::F32, Some(labels)) => fused::<f32>(incoming, out, batch, &labels, settings),
        (Dtype::F64, Some(labels)) => fused::<f64>(incoming, out, batch, &labels, settings),
        (dtype, _) => {
            let to = |x: &Tensor| x.f_to_kind(inside(dtype.kind()));
            let (keys, queue) = (to(batch.h_k)?, to(batch.queue_list)?);
            let held = (&keys, &batch.classes()?, &queue);
            gradient(&to(incoming)?, &to(out)?, held, settings)
        }
    })?;
    Ok(grad.f_to_kind(batch.h_q.f_kind()?)?)
}

fn fused<E: Element<Acc = E> + Real + Stored>(
    incoming: &Tensor,
    out: &Tensor,
    batch: &Batch<'_>,
    labels: &[usize],
    settings: Settings,
) -> Result<Tensor> {
    let of_kind = |x| dense(x, E::KIND);
    let (incoming, out, keys) = (of_kind(incoming)?, of_kind(out)?, of_kind(batch.h_k)?);
    let input = Input::new(CLASS, "grad_output", &incoming)?;
    let rows = input.dense_rows::<E>()?;
    node::fused(rows, &out, (&keys, labels), settings, |scores| {
        let queue = batch.queue_list.f_detach()?;
        let grad = Owned::<E>::new(&[scores.size2()?.0, queue.size2()?.0])?.into_tensor();
        multiply(scores, &queue.f_tr()?, &grad, How::default())?;
        Ok(grad)
    })
}

/// Puts the keys of a batch into the queue, at its pointers, and advances these.
pub fn enqueue(
    h_k: &Tensor,
    labels: &Tensor,
    (queue_list, queue_ptr): (&Tensor, &Tensor),
    settings: Settings,
) -> Result<()> {
    // No queries are needed here; keys have their shape.
    let batch = Batch {
        h_q: h_k,
        h_k,
        labels,
        queue_list,
        enqueued: None,
    };
    let checked = Checked::new(&batch, settings)?;
    let pointers = Pointers::new(queue_ptr, queue_list, settings)?;
    if device::enqueue(&batch, &checked, &pointers.queue_ptr, settings)? {
        return Ok(());
    }
    let plan = match (checked.on_host(settings)?, pointers.on_host()?) {
        (Some(labels), Some(places)) => Plan::on_host(&labels, places, settings.keys as usize)?,
        _ => Plan::on_device(&batch.classes()?, queue_ptr, settings.keys)?,
    };
    plan.apply(h_k, queue_list, queue_ptr)
}
