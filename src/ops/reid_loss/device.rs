//! The triplet losses on a device: one product by libtorch, and fused kernels for the rest. Nothing waits for
//! the device.

use super::check::Inputs;
use super::composite::Pairs;
use super::triplet::{Arguments, LABEL, Objective, bound};
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
    let labels = |i: &Input<'_>| cuda::reaches(i) && i.integral();
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
    if let Some((input, _)) = memory {
        grads.push(grad(input, Role::Candidates)?);
    }
    attach(LABEL, &loss, &call.differentiable(), grads, || {
        let again = call.again(Kind::Float, Kind::Float);
        Ok(move |t: &[Tensor]| {
            let ([index, offset], reference) = pairs.parts()?;
            let taught = matches!(again.objective, Objective::Taught);
            again.loss(t, &Pairs { index, offset }, taught.then_some(&reference))
        })
    })?;
    Ok(loss)
}
