//! The step on a device: products by libtorch, and one fused kernel each for the rest of forward, the rest of backward
//! and the queue. Nothing waits for the device. Functions return `None` or `false` for arguments that the kernels do
//! not take.

use super::check::Checked;
use super::node::{Held, saved};
use super::queue::Past;
use super::{Batch, CLASS, History, Settings};
use crate::cuda;
use crate::cuda::self_tuning::{Rows, Scored};
use crate::error::Result;
use crate::torch::autograd::Backward;
use crate::torch::input::Input;
use crate::torch::saved::Saved;
use crate::torch::{Dtype, beside, dense};
use tch::{Kind, Tensor};

/// Sizes are 32-bit in the kernels.
const LARGEST: i64 = 1 << 30;

/// Whether the kernels take what was checked: queries and keys of one dtype, which promotes to float32, and a float32
/// queue.
fn serves(checked: &Checked<'_>, settings: Settings) -> bool {
    let Checked { h_q, h_k, list, .. } = checked;
    let fits = |&n: &i64| n <= LARGEST;
    checked.dtype == Dtype::F32
        && list.dtype() == Some(Dtype::F32)
        && h_q.dtype() == h_k.dtype()
        && cuda::serves(&[h_q, h_k, list])
        && fits(&(settings.keys * settings.classes))
        && h_q.shape().iter().all(fits)
}

/// The labels, int64, if kernels may read them.
fn readable(labels: Tensor) -> Result<Option<Tensor>> {
    let input = Input::new(CLASS, "labels", &labels)?;
    Ok(cuda::reaches(&input).then(|| labels.shallow_clone()))
}

/// The log-probabilities, without a graph. With `keep`, keys and labels are kept.
pub fn forward(
    batch: &Batch<'_>,
    checked: &Checked<'_>,
    settings: Settings,
    keep: bool,
) -> Result<Option<Scored>> {
    if !serves(checked, settings) {
        return Ok(None);
    }
    let Some(labels) = readable(batch.classes()?)? else {
        return Ok(None);
    };
    let rows = Rows {
        queries: &checked.h_q,
        keys: &checked.h_k,
        labels: &labels,
        dtype: checked.h_q.floating()?,
    };
    let queue = batch.queue_list;
    cuda::self_tuning::forward(&rows, queue, settings.shape(), keep).map(Some)
}

/// The whole step.
pub fn step(
    batch: &Batch<'_>,
    checked: &Checked<'_>,
    queue_ptr: &Input<'_>,
    settings: Settings,
    history: &History,
) -> Result<Option<Tensor>> {
    let (keys, labels) = batch.enqueued.unwrap_or((batch.h_k, batch.labels));
    let keys = Input::new(CLASS, "enqueued keys", keys)?;
    if !(cuda::reaches(queue_ptr) && cuda::serves(&[&keys])) {
        return Ok(None);
    }
    let Some(labels) = readable(beside(labels, Kind::Int64, batch.h_q)?)? else {
        return Ok(None);
    };
    let wanted = checked.h_q.wants_grad();
    // Another thread's step between the copy and the product would make the two differ.
    let _alone = history.exclusive();
    let Some(scored) = forward(batch, checked, settings, wanted)? else {
        return Ok(None);
    };
    let past = wanted
        .then(|| batch.queue_list.f_detach_copy())
        .transpose()?;
    let state = (&checked.list, queue_ptr);
    cuda::self_tuning::enqueue(&keys, &labels, state, settings.shape())?;
    let Scored { out, kept } = scored;
    if let (Some(queue), Some((keys, labels))) = (past, kept) {
        let held = Held::kept(Past::Copied(queue), keys, labels, settings);
        let node = Node {
            held: held.clone(),
            out: saved(&out)?,
            settings,
            kind: batch.h_q.f_kind()?,
        };
        held.attach(&out, batch.h_q, node, Kind::Float)?;
    }
    Ok(Some(out))
}

/// The node's state.
struct Node {
    held: Held,
    out: Saved,
    settings: Settings,
    /// The dtype of the queries.
    kind: Kind,
}

impl Backward for Node {
    fn grads(&mut self, incoming: &Tensor, _last: bool) -> Result<Vec<Option<Tensor>>> {
        let out = self.out.get()?;
        let input = Input::new(CLASS, "grad_output", incoming)?;
        let grad = if cuda::serves(&[&input]) && input.dtype() == Some(Dtype::F32) {
            let (keys, labels, queue) = self.held.parts()?;
            let keys = Input::new(CLASS, "h_k", keys)?;
            cuda::self_tuning::backward(
                &input,
                out,
                (&keys, labels),
                &queue,
                self.settings.shape(),
            )?
        } else {
            self.held.gradient(incoming, out)?
        };
        Ok(vec![Some(grad.f_to_kind(self.kind)?)])
    }
}

/// The gradient of the queries, in their dtype, from that of the log-probabilities `out`. Shapes were checked.
pub fn backward(
    incoming: &Tensor,
    out: &Tensor,
    batch: &Batch<'_>,
    checked: &Checked<'_>,
    settings: Settings,
) -> Result<Option<Tensor>> {
    if !serves(checked, settings) {
        return Ok(None);
    }
    let (incoming, out) = (dense(incoming, Kind::Float)?, dense(out, Kind::Float)?);
    let inputs = [
        Input::new(CLASS, "grad_output", &incoming)?,
        Input::new(CLASS, "pgc_logits", &out)?,
    ];
    if !cuda::serves(&[&inputs[0], &inputs[1]]) {
        return Ok(None);
    }
    let Some(labels) = readable(batch.classes()?)? else {
        return Ok(None);
    };
    let queue = batch.queue_list.f_detach()?;
    let keys = (&checked.h_k, &labels);
    let grad = cuda::self_tuning::backward(&inputs[0], &out, keys, &queue, settings.shape())?;
    Ok(Some(grad.f_to_kind(batch.h_q.f_kind()?)?))
}

/// Puts the keys of a batch into the queue, at its pointers, and advances these.
pub fn enqueue(
    batch: &Batch<'_>,
    checked: &Checked<'_>,
    queue_ptr: &Input<'_>,
    settings: Settings,
) -> Result<bool> {
    if !(serves(checked, settings) && cuda::reaches(queue_ptr)) {
        return Ok(false);
    }
    let Some(labels) = readable(batch.classes()?)? else {
        return Ok(false);
    };
    let state = (&checked.list, queue_ptr);
    cuda::self_tuning::enqueue(&checked.h_k, &labels, state, settings.shape())?;
    Ok(true)
}
