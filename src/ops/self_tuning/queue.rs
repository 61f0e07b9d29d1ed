//! The queue of keys, written in place although graphs still need its earlier contents.
//!
//! Backward multiplies with the queue as its forward saw it. tllib clones the whole queue at every
//! step for that. Here a step keeps only the columns that it replaced, in a [`Change`], and changes
//! of one queue are linked forwards in time: a graph holds the change of its own step and finds all
//! later ones from there. The changes are dropped with the last graph.

use super::CLASS;
use super::plan::Plan;
use crate::error::{Error, Result};
use crate::kernels::self_tuning::finite;
use crate::torch::input::Input;
use crate::torch::product::{How, multiply};
use crate::torch::{by_dtype, version};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use tch::Tensor;

/// What one step replaced.
struct Change {
    queue: Tensor,
    columns: Tensor,
    /// (columns, D)
    replaced: Tensor,
    /// Whether all values written are finite.
    finite: bool,
    /// The version of the queue after the step.
    version: i64,
    next: OnceLock<Arc<Change>>,
}

// SAFETY: at::Tensor's reference count is atomic, and nothing writes the metadata of these tensors.
// The memory of `queue` is only touched under the lock of the [`History`] that all holders share.
unsafe impl Sync for Change {}

impl Drop for Change {
    /// Drops the later changes in a loop: a graph that was kept for long may hold so many that
    /// nested drops would overflow the stack.
    fn drop(&mut self) {
        let mut next = self.next.take();
        while let Some(change) = next {
            next = Arc::into_inner(change).and_then(|mut change| change.next.take());
        }
    }
}

/// The latest change of a queue, as long as a graph needs it.
#[derive(Clone, Default)]
pub struct History(Arc<Mutex<Weak<Change>>>);

impl History {
    /// A guard: until it is dropped, no other thread is inside a step of this queue.
    pub fn exclusive(&self) -> impl Sized + '_ {
        self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, Weak<Change>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `read`, then applies `plan`, while no other step of ours writes the queue. The snapshot,
    /// made if `wanted`, is of the queue before the plan.
    pub fn step<T>(
        &self,
        queue: &Tensor,
        pointers: &Tensor,
        keys: &Tensor,
        plan: &Plan,
        wanted: bool,
        read: impl FnOnce() -> Result<T>,
    ) -> Result<(T, Option<Snapshot>)> {
        let mut latest = self.lock();
        let out = read()?;
        let queue = &queue.f_detach()?;
        // After a change of tensor, or a write that was not ours, the chain that graphs hold ends,
        // and they will detect this by the version.
        let previous = latest.upgrade().filter(|change| {
            change.queue.data_ptr() == queue.data_ptr() && change.version == version(queue)
        });
        if previous.is_none() && !wanted {
            let _ = plan.exchange(keys, queue, pointers)?;
            return Ok((out, None));
        }
        let finite = all_finite(keys)?;
        let replaced = plan.exchange(keys, queue, pointers)?;
        let change = Arc::new(Change {
            queue: queue.shallow_clone(),
            columns: plan.columns.shallow_clone(),
            replaced,
            finite,
            version: version(queue),
            next: OnceLock::new(),
        });
        if let Some(previous) = previous {
            // Only the latest change gets a successor, and the lock is held.
            let _ = previous.next.set(Arc::clone(&change));
        }
        *latest = Arc::downgrade(&change);
        let snapshot = wanted.then(|| Snapshot {
            since: change,
            history: self.clone(),
        });
        Ok((out, snapshot))
    }
}

fn all_finite(keys: &Tensor) -> Result<bool> {
    let input = Input::new(CLASS, "h_k", keys)?;
    by_dtype!(input.floating()?, E => match input.rows::<E>() {
        Some(rows) => Ok(finite(rows)),
        None => Ok(keys.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0),
    })
}

/// The queue as it was before a step.
pub struct Snapshot {
    since: Arc<Change>,
    history: History,
}

impl Snapshot {
    /// All changes since, or an error if somebody else wrote the queue.
    fn changes(&self) -> Result<Vec<&Change>> {
        let mut changes = vec![&*self.since];
        let mut last = &self.since;
        while let Some(next) = last.next.get() {
            changes.push(next);
            last = next;
        }
        if last.version == version(&last.queue) {
            return Ok(changes);
        }
        Err(Error::Bridge(
            "one of the variables needed for gradient computation has been modified by an inplace \
             operation: SelfTuning's queue_list, written between forward and backward by something \
             other than its forward"
                .to_owned(),
        ))
    }

    /// A copy of the queue as it was.
    fn restored(&self) -> Result<Tensor> {
        let _lock = self.history.lock();
        restored(&self.changes()?)
    }

    /// `grad` (minibatch, N; overwritten) times the transposed queue as it was, (minibatch, D).
    pub fn times_transposed(&self, grad: &mut Tensor) -> Result<Tensor> {
        let _lock = self.history.lock();
        let changes = self.changes()?;
        let queue = &self.since.queue;
        let shape = [grad.size2()?.0, queue.size2()?.0];
        let out = Tensor::f_empty(shape, (grad.f_kind()?, grad.device()))?;
        if !changes.iter().all(|change| change.finite) {
            multiply(grad, &restored(&changes)?.f_tr()?, &out, How::default())?;
            return Ok(out);
        }
        // Columns that were replaced enter with their old values, and with weight 0 for the new ones.
        // A column that was replaced again later has weight 0 by then, so the earliest change counts.
        let mut taken = Vec::with_capacity(changes.len());
        for change in &changes {
            taken.push(grad.f_index_select(1, &change.columns)?);
            let _ = grad.f_index_fill_(1, &change.columns, 0.0)?;
        }
        multiply(grad, &queue.f_tr()?, &out, How::default())?;
        for (part, change) in taken.iter().zip(&changes) {
            multiply(part, &change.replaced, &out, How::ADDED)?;
        }
        Ok(out)
    }
}

/// The queue as it was before a step, for the graph of that step.
pub enum Past {
    /// Reconstructed from what later steps replaced.
    Changed(Arc<Snapshot>),
    /// Copied, on a device: whether the new keys are finite cannot be queried there, and other streams
    /// may write the queue while backward would read it.
    Copied(Tensor),
}

impl Past {
    /// The queue as it was.
    pub fn restored(&self) -> Result<Tensor> {
        match self {
            Self::Changed(snapshot) => snapshot.restored(),
            Self::Copied(queue) => Ok(queue.shallow_clone()),
        }
    }
}

fn restored(changes: &[&Change]) -> Result<Tensor> {
    let Some(first) = changes.first() else {
        return Err(Error::Bridge("no change of the queue".to_owned()));
    };
    let mut queue = first.queue.f_detach_copy()?;
    // The earliest change is applied last, so that it wins.
    for change in changes.iter().rev() {
        let _ = queue.f_index_copy_(1, &change.columns, &change.replaced.f_tr()?)?;
    }
    Ok(queue)
}
