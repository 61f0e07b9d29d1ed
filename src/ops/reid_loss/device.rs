//! The triplet losses on a device: one product by libtorch, and fused kernels for the rest. Nothing waits for
//! the device.

use super::check::Inputs;
use super::composite::{Pairs, of_pairs, sides};
use super::integral;
use super::triplet::{Arguments, Objective, bound};
use crate::cuda::triplet::{Features, LARGEST, Mined, Mining, mine};
use crate::cuda::triplet_gradient::pull;
use crate::cuda::{self, Stream};
use crate::error::Result;
use crate::kernels::reid_loss::triplet::Role;
use crate::torch::autograd::attach;
use crate::torch::input::Input;
use tch::{Kind, Tensor};

/// Whether the kernels take these arguments.
pub fn serves(inputs: &Inputs<'_>) -> bool {
    let fits = |input: &Input<'_>| input.shape().iter().all(|&n| n <= LARGEST);
    let labels = |i: &Input<'_>| cuda::reaches(i) && i.tensor.f_kind().is_ok_and(integral);
    // Each side is read in its own dtype.
    let features = |i: &Input<'_>| cuda::serves(&[i]) && fits(i);
    let memory = inputs.memory.as_ref();
    features(&inputs.features)
        && labels(&inputs.labels)
        && memory.is_none_or(|(f, l)| features(f) && labels(l))
        && inputs.teacher.as_ref().is_none_or(features)
}

/// The loss, attached to its graph.
pub fn triplet(call: &Arguments<'_>, inputs: &Inputs<'_>) -> Result<Tensor> {
    let stream = Stream::current(inputs.features.device())?;
    let prepared = |input: &Input<'_>, mined| {
        let dtype = input.floating()?;
        Features::of(&stream, (input, dtype), call.normalize, mined)
    };
    let u = prepared(&inputs.features, true)?;
    let memory = inputs.memory.as_ref();
    let memory_features = memory.map(|(input, _)| prepared(input, true)).transpose()?;
    let v = memory_features.as_ref().unwrap_or(&u);
    let teacher = match (&inputs.teacher, call.objective) {
        (Some(teacher), Objective::Taught) => Some(prepared(teacher, false)?),
        _ => None,
    };
    let labels = inputs.labels.to_int64()?;
    let memory_labels = memory.map(|(_, labels)| labels.to_int64()).transpose()?;
    let mining = Mining {
        u: &u,
        v,
        labels: (&labels, memory_labels.as_ref().unwrap_or(&labels)),
        teacher: teacher.as_ref(),
        objective: call.objective,
    };
    let Mined { loss, pairs } = mine(&stream, &mining, inputs.dtype)?;

    let bound = bound(call.objective, None);
    let role = memory.map_or(Role::Both, |_| Role::Anchors);
    let grad = |input, role| pull(&stream, (input, role), (&u, v), &pairs, inputs.dtype, bound);
    let mut grads = vec![grad(&inputs.features, role)?];
    let mut differentiable = vec![call.features.1];
    if let Some((input, _)) = memory {
        grads.push(grad(input, Role::Candidates)?);
        differentiable.push(input.tensor);
    }
    if grads.iter().any(Option::is_some) {
        let formula = formula(call, pairs);
        attach(
            c"TripletBackward",
            &loss,
            &differentiable,
            grads,
            Box::new(formula),
        )?;
    }
    Ok(loss)
}

/// The loss of the mined pairs, in operations that autograd can differentiate.
fn formula(
    call: &Arguments<'_>,
    mined: cuda::triplet::Pairs,
) -> impl Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static {
    let (objective, normalize) = (call.objective, call.normalize);
    move |t: &[Tensor]| {
        let kind = Kind::Float;
        let ([index, offset], references) = mined.parts()?;
        let pairs = Pairs { index, offset };
        let (u, v) = sides(&t[0], t.get(1), normalize, kind)?;
        let reference = matches!(objective, Objective::Taught).then_some(&references);
        of_pairs(&u, &v, &pairs, objective, reference, kind)
    }
}
