//! The triplet losses on tensors.

use super::check::Inputs;
use super::composite::{Again, Pairs, composite};
use super::device;
use super::mining::{Features, mine};
use super::operations;
use crate::error::Result;
use crate::kernels::Loss;
use crate::kernels::element::{Element, stored_scale};
use crate::kernels::real::Real;
use crate::kernels::reid_loss::SMALLEST_NORM;
use crate::kernels::reid_loss::mining::{Found, Hardest};
pub use crate::kernels::reid_loss::triplet::Objective;
use crate::kernels::reid_loss::triplet::{
    Gradient, Role, loss as pair_loss, normalize, references,
};
use crate::kernels::rows::Rows;
use crate::ops::threads;
use crate::torch::autograd::{StoredGrad, attach};
use crate::torch::facts::Facts;
use crate::torch::input::Input;
use crate::torch::{Owned, Stored, by_dtype, dense, scalar};
use std::ffi::CStr;
use tch::{Kind, Tensor};

/// The node's name.
pub const LABEL: &CStr = c"TripletBackward";

/// A call of one of the three losses. Tensors come with the name of their argument.
pub struct Arguments<'a> {
    /// The class, for messages.
    pub class: &'static str,
    /// The features to train, (N, F).
    pub features: (&'static str, &'a Tensor),
    /// Their identities, (N).
    pub labels: (&'static str, &'a Tensor),
    /// Where pairs are looked for, with identities; the features themselves if `None`.
    pub memory: Option<(&'a Tensor, &'a Tensor)>,
    /// Features of a teacher, (N, any), for [`Objective::Taught`].
    pub teacher: Option<&'a Tensor>,
    /// The loss of a pair of distances.
    pub objective: Objective,
    /// Whether all features are divided by their norms.
    pub normalize: bool,
}

impl<'a> Arguments<'a> {
    /// The features and the memory.
    pub fn differentiable(&self) -> Vec<&'a Tensor> {
        let memory = self.memory.map(|(memory, _)| memory);
        [Some(self.features.1), memory]
            .into_iter()
            .flatten()
            .collect()
    }

    /// For second derivatives: features in `kind`, the loss in `out`.
    pub fn again(&self, kind: Kind, out: Kind) -> Again {
        Again {
            objective: self.objective,
            normalize: self.normalize,
            kind,
            out,
        }
    }
}

/// The loss, differentiable with respect to the features and the memory.
pub fn triplet(call: &Arguments<'_>) -> Result<Tensor> {
    let inputs = Inputs::check(call)?;
    inputs.candidates()?;
    if device::serves(&inputs) {
        return device::triplet(call, &inputs);
    }
    let (kind, out) = (inputs.dtype.at_least_f32().kind(), inputs.out.kind());
    if !inputs.fusible() {
        return if inputs.all(Facts::plain) {
            operations::triplet(call, &inputs, kind, out)
        } else {
            composite(call, kind, out)
        };
    }
    let Fused {
        loss,
        grads,
        hardest,
        reference,
    } = by_dtype!(inputs.dtype, E => fused::<E>(call, &inputs)?);
    attach(LABEL, &loss, &call.differentiable(), grads, || {
        let again = call.again(kind, out);
        Ok(move |t: &[Tensor]| {
            let reference = Tensor::f_from_slice(&reference)?.f_to_kind(out)?;
            again.loss(t, &Pairs::of(&hardest, kind)?, Some(&reference))
        })
    })?;
    Ok(loss)
}

struct Fused {
    loss: Tensor,
    grads: Vec<Option<StoredGrad>>,
    hardest: Vec<Hardest>,
    reference: Vec<f64>,
}

/// Features in the computing type, and the norms that they were divided by.
struct Prepared {
    tensor: Tensor,
    norms: Option<Vec<f64>>,
}

fn prepare<E>(input: &Input<'_>, normalized: bool) -> Result<Prepared>
where
    E: Element + Stored,
    E::Acc: Stored,
{
    if !normalized {
        return Ok(Prepared {
            tensor: dense(input.tensor, <E::Acc as Stored>::KIND)?,
            norms: None,
        });
    }
    let rows = input.dense_rows::<E>()?;
    let mut out = Owned::<E::Acc>::new(input.shape())?;
    let norms = normalize(rows, out.slice(), threads(input.numel()));
    Ok(Prepared {
        tensor: out.into_tensor(),
        norms: Some(norms),
    })
}

/// How often the candidates must outnumber the anchors for columns to be read where they are: those near each anchor
/// are then read row by row, which takes longer than copying them.
const FEW: usize = 16;

/// A memory. If its columns are adjacent, and few of its rows are read, it is only converted: it stays in columns.
fn prepare_memory<E>(memory: &Input<'_>, anchors: &Input<'_>, normalized: bool) -> Result<Prepared>
where
    E: Element + Stored,
    E::Acc: Stored,
{
    let count = anchors.shape()[0] as usize;
    let in_columns = |rows: Rows<'_, E>| rows.column_major() && count * FEW <= rows.rows();
    if normalized || memory.wants_grad() || !memory.rows::<E>().is_some_and(in_columns) {
        return prepare::<E>(memory, normalized);
    }
    let detached = memory.tensor.f_detach()?;
    Ok(Prepared {
        tensor: detached.f_to_kind(<E::Acc as Stored>::KIND)?,
        norms: None,
    })
}

/// The candidates that were found, the positives and then the negatives, as contiguous rows.
struct Picked {
    rows: Tensor,
    /// The pairs, with their indices among these.
    hardest: Vec<Hardest>,
}

impl Picked {
    fn of(candidates: &Tensor, hardest: &[Hardest]) -> Result<Self> {
        let Pairs { index, .. } = Pairs::of(hardest, candidates.kind())?;
        let at = |index, found| Found { index, ..found };
        let pairs = hardest.iter().enumerate().map(|(i, pair)| Hardest {
            positive: at(i, pair.positive),
            negative: at(hardest.len() + i, pair.negative),
        });
        Ok(Self {
            rows: candidates.f_index_select(0, &index)?,
            hardest: pairs.collect(),
        })
    }
}

fn fused<E>(call: &Arguments<'_>, inputs: &Inputs<'_>) -> Result<Fused>
where
    E: Element + Stored,
    E::Acc: Element<Acc = E::Acc> + Real + Stored,
{
    let anchors = prepare::<E>(&inputs.features, call.normalize)?;
    let memory = match &inputs.memory {
        None => None,
        Some((memory, _)) => Some(prepare_memory::<E>(
            memory,
            &inputs.features,
            call.normalize,
        )?),
    };
    let candidates = &memory.as_ref().unwrap_or(&anchors).tensor;
    let views = [
        Input::new(call.class, call.features.0, &anchors.tensor)?,
        Input::new(call.class, "xbm_f", candidates)?,
    ];
    let (u, v) = (Features::of(&views[0])?, Features::of(&views[1])?);
    let hardest = mine(&u, &v, &inputs.identities()?)?;
    let reference = match (&inputs.teacher, call.objective) {
        (Some(teacher), Objective::Taught) => taught(teacher, call, &hardest)?,
        _ => Vec::new(),
    };
    let (picked, view);
    let (candidates, pairs) = if v.rows.column_major() {
        picked = Picked::of(v.tensor, &hardest)?;
        view = Input::new(call.class, "xbm_f", &picked.rows)?;
        (view.dense_rows::<E::Acc>()?, &picked.hardest)
    } else {
        (v.rows, &hardest)
    };
    let (value, pulls) = pair_loss(call.objective, pairs, &reference, candidates.rows());
    let gradient = Gradient {
        anchors: u.rows,
        candidates,
        pulls: &pulls,
        role: if memory.is_some() {
            Role::Anchors
        } else {
            Role::Both
        },
        norms: anchors.norms.as_deref(),
    };
    let mut grads = vec![store::<E>(
        gradient,
        &inputs.features,
        value,
        call.objective,
    )?];
    if let (Some((input, _)), Some(memory)) = (&inputs.memory, &memory) {
        let gradient = Gradient {
            role: Role::Candidates,
            norms: memory.norms.as_deref(),
            ..gradient
        };
        grads.push(store::<E>(gradient, input, value, call.objective)?);
    }
    Ok(Fused {
        loss: scalar(value, inputs.out)?,
        grads,
        hardest,
        reference,
    })
}

/// An upper bound on the elements of the gradient: a row may be the candidate of every anchor twice.
pub fn bound(objective: Objective, norms: Option<&[f64]>) -> f64 {
    let slope = match objective {
        Objective::Hinge(_) | Objective::Taught => 1.0,
        Objective::Margin(margin) => 1.0 + margin.abs(),
    };
    let smallest = norms
        .into_iter()
        .flatten()
        .copied()
        .filter(|&n| n > SMALLEST_NORM)
        .fold(1.0, f64::min);
    4.0 * slope / smallest
}

/// The gradient of `input`, if one is wanted.
fn store<E>(
    gradient: Gradient<'_, E::Acc>,
    input: &Input<'_>,
    value: f64,
    objective: Objective,
) -> Result<Option<StoredGrad>>
where
    E: Element + Stored,
    E::Acc: Element<Acc = E::Acc> + Real,
{
    if !input.wants_grad() {
        return Ok(None);
    }
    let loss = Loss {
        value,
        scale: stored_scale::<E>(bound(objective, gradient.norms)),
    };
    let mut out = Owned::<E>::new(input.shape())?;
    gradient.store(loss, out.slice(), threads(4 * input.numel()));
    Ok(Some(StoredGrad::new(out.into_tensor(), loss.scale)))
}

/// The teacher's references, from its own features: 2N distances.
fn taught(teacher: &Input<'_>, call: &Arguments<'_>, hardest: &[Hardest]) -> Result<Vec<f64>> {
    by_dtype!(teacher.floating()?, E => {
        type F = <E as Element>::Acc;
        let prepared = prepare::<E>(teacher, call.normalize)?;
        let view = Input::new(call.class, "features_2", &prepared.tensor)?;
        let rows = view.dense_rows::<F>()?;
        Ok(references(rows, hardest, threads(2 * teacher.numel())))
    })
}
