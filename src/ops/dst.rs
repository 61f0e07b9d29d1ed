//! Worst-case estimation on tensors. The mathematics is in [`crate::kernels::dst`].

use super::{Place, counting, finite, inside, loss_dtype, nll_gradient, place, stored, threads};
use crate::cuda;
use crate::cuda::dst::Part;
use crate::error::Result;
use crate::kernels::dst::{Goal, OFFSET, Outputs, dst as kernel};
use crate::torch::autograd::{Constant, Room, StoredGrad, attach};
use crate::torch::input::Input;
use crate::torch::{Dtype, Owned, by_dtype, scalar};
use tch::{Kind, Reduction, Tensor};

/// The class, for messages.
pub const CLASS: &str = "WorstCaseEstimationLoss";

/// `ValueError` for a trade-off that is not finite.
pub fn check_eta_prime(eta_prime: f64) -> Result<()> {
    finite(CLASS, "eta_prime", eta_prime)
}

/// Logits of both heads on the same rows, (minibatch, C, ...).
struct Heads<'a> {
    main: Input<'a>,
    adversarial: Input<'a>,
    dtype: Dtype,
}

impl<'a> Heads<'a> {
    fn new(
        main: (&'static str, &'a Tensor),
        adversarial: (&'static str, &'a Tensor),
    ) -> Result<Self> {
        let (y, adv) = (
            Input::new(CLASS, main.0, main.1)?,
            Input::new(CLASS, adversarial.0, adversarial.1)?,
        );
        y.floating()?;
        let dtype = adv.floating()?;
        y.classes()?;
        adv.like(&y)?;
        Ok(Self {
            main: y,
            adversarial: adv,
            dtype,
        })
    }

    /// In the order in which the kernel takes them.
    fn pair(&self) -> (&Input<'a>, &Input<'a>) {
        (&self.adversarial, &self.main)
    }
}

/// The loss on labeled (`y_l`, `y_l_adv`) and unlabeled rows, differentiable with respect to the
/// logits of the adversarial head.
pub fn dst(
    y_l: &Tensor,
    y_l_adv: &Tensor,
    y_u: &Tensor,
    y_u_adv: &Tensor,
    eta_prime: f64,
) -> Result<Tensor> {
    let labeled = Heads::new(("y_l", y_l), ("y_l_adv", y_l_adv))?;
    let unlabeled = Heads::new(("y_u", y_u), ("y_u_adv", y_u_adv))?;
    unlabeled.adversarial.same_device(&labeled.adversarial)?;
    check_eta_prime(eta_prime)?;
    let dtype = labeled.dtype.promote(unlabeled.dtype);
    let out = loss_dtype(&labeled.adversarial, dtype);
    let (loss, [agree, disagree]) = match place(&[
        &labeled.main,
        &labeled.adversarial,
        &unlabeled.main,
        &unlabeled.adversarial,
    ]) {
        Place::Cuda => cuda::dst::dst(labeled.pair(), unlabeled.pair(), eta_prime, dtype, out)?,
        Place::Cpu => fused(&labeled, &unlabeled, eta_prime, dtype, out)?,
        Place::Operations => operations(&labeled, &unlabeled, eta_prime, out.kind())?,
        Place::Composite => {
            let (labels_l, labels_u) = (predictions(y_l)?, predictions(y_u)?);
            return composite(
                &[y_l_adv, y_u_adv],
                &[&labels_l, &labels_u],
                eta_prime,
                out.kind(),
            );
        }
    };
    let grads = [agree.grad, disagree.grad];
    attach(c"DstBackward", &loss, &[y_l_adv, y_u_adv], grads, || {
        let [labels_l, labels_u] = [Constant(agree.labels), Constant(disagree.labels)];
        Ok(move |t: &[Tensor]| {
            composite(
                &[&t[0], &t[1]],
                &[labels_l.get(), labels_u.get()],
                eta_prime,
                out.kind(),
            )
        })
    })?;
    Ok(loss)
}

/// By the CPU kernel.
fn fused(
    labeled: &Heads<'_>,
    unlabeled: &Heads<'_>,
    eta_prime: f64,
    dtype: Dtype,
    out: Dtype,
) -> Result<(Tensor, [Part; 2])> {
    let (agree, part_l) = sweep(Goal::Agree, labeled, dtype, eta_prime)?;
    let (disagree, part_u) = sweep(Goal::Disagree, unlabeled, dtype, 1.0)?;
    Ok((scalar(agree + disagree, out)?, [part_l, part_u]))
}

fn sweep(goal: Goal, heads: &Heads<'_>, dtype: Dtype, weight: f64) -> Result<(f64, Part)> {
    by_dtype!(dtype, E => {
        let Heads { main, adversarial, .. } = heads;
        let logits = adversarial.dense_rows::<E>()?;
        let y = main.dense_rows::<E>()?;
        let mut labels = Owned::<i64>::new(&[y.rows() as i64])?;
        let mut grad = Room::<E>::of(adversarial)?;
        let out = Outputs { labels: labels.slice(), grad: grad.slice() };
        let loss = kernel(goal, logits, y, weight, out, threads(2 * adversarial.numel()));
        Ok((loss.value, Part { labels: labels.into_tensor(), grad: grad.stored(loss.scale) }))
    })
}

fn predictions(y: &Tensor) -> Result<Tensor> {
    Ok(y.f_detach()?.f_max_dim(1, false)?.1)
}

/// The same in libtorch operations, from the logits and predictions of the labeled and the unlabeled
/// rows.
fn composite(
    logits: &[&Tensor; 2],
    labels: &[&Tensor; 2],
    eta_prime: f64,
    kind: Kind,
) -> Result<Tensor> {
    let agree = agreement(&logits[0].f_log_softmax(1, inside(kind))?, labels[0])?;
    let remainder = remainder(logits[1], labels[1], inside(kind))?;
    let disagree = disagreement(&remainder.f_add_scalar(OFFSET)?)?;
    together(&agree, &disagree, eta_prime, kind)
}

/// `1 - p_ia` for the label `a` of each row. By masks and sums, which a compiler fuses with the exponential; it would
/// materialize the result of each gather and scatter.
fn remainder(logits: &Tensor, labels: &Tensor, kind: Kind) -> Result<Tensor> {
    let z = logits.f_to_kind(kind)?;
    let largest = z.f_detach()?.f_amax([1].as_slice(), true)?;
    let e = z.f_sub(&largest)?.f_exp()?;
    let along = vec![1; z.dim() - 2];
    let classes = counting(z.size()[1], &z)?.f_view([&[-1], &along[..]].concat().as_slice())?;
    let label = labels.f_unsqueeze(1)?.f_eq_tensor(&classes)?;
    let sum = |t: Tensor| t.f_sum_dim_intlist(1, false, kind);
    let own = sum(e.f_masked_fill(&label.f_logical_not()?, 0.0)?)?;
    let others = sum(e.f_masked_fill(&label, 0.0)?)?;
    let all = own.f_add(&others)?;
    let (own, others) = (own.f_div(&all)?, others.f_div(&all)?);
    // Each form is used where it does not cancel, gradients included.
    Ok(own
        .f_rsub_scalar(1.0)?
        .f_where_self(&own.f_lt(0.5)?, &others)?)
}

/// `mean_i -ln p_ia`
fn agreement(log_p: &Tensor, labels: &Tensor) -> Result<Tensor> {
    Ok(log_p.f_nll_loss_nd(labels, None::<Tensor>, Reduction::Mean, -100)?)
}

/// `mean_i ln min(u_i, 1)`
fn disagreement(u: &Tensor) -> Result<Tensor> {
    Ok(u.f_clamp_max(1.0)?.f_log()?.f_mean(u.f_kind()?)?)
}

fn together(agree: &Tensor, disagree: &Tensor, eta_prime: f64, kind: Kind) -> Result<Tensor> {
    let loss = agree.f_mul_scalar(eta_prime)?.f_sub(disagree)?;
    Ok(loss.f_to_kind(kind)?)
}

/// The probability of each row's label, and those of the other classes.
struct Split {
    /// (minibatch, 1, ...)
    index: Tensor,
    /// (minibatch, ...)
    own: Tensor,
    /// The probabilities with 0 for the label, (minibatch, C, ...).
    rest: Tensor,
    /// The sum of `rest`, (minibatch, ...).
    others: Tensor,
}

impl Split {
    fn of(logits: &Tensor, labels: &Tensor, kind: Kind) -> Result<Self> {
        let p = logits.f_softmax(1, kind)?;
        let index = labels.f_unsqueeze(1)?;
        let own = p.f_gather(1, &index, false)?.f_squeeze_dim(1)?;
        let rest = p.f_scatter_value(1, &index, 0.0)?;
        let others = match logits.size()[1] {
            // Nothing, but NaN if the logit is.
            1 => own.f_rsub_scalar(1.0)?,
            _ => rest.f_sum_dim_intlist(1, false, kind)?,
        };
        Ok(Self {
            index,
            own,
            rest,
            others,
        })
    }
}

/// Loss and parts in libtorch operations.
fn operations(
    labeled: &Heads<'_>,
    unlabeled: &Heads<'_>,
    eta_prime: f64,
    kind: Kind,
) -> Result<(Tensor, [Part; 2])> {
    let labels = predictions(labeled.main.tensor)?;
    let log_p = labeled
        .adversarial
        .tensor
        .f_detach()?
        .f_log_softmax(1, inside(kind))?;
    let agree = agreement(&log_p, &labels)?;
    let grad = if labeled.adversarial.wants_grad() {
        let each = eta_prime / labels.numel() as f64;
        let weight = log_p.f_new_full(labels.size(), each, (inside(kind), log_p.device()))?;
        Some(nll_gradient(&log_p, &labels, &weight)?)
    } else {
        None
    };
    let part_l = Part { labels, grad };

    let labels = predictions(unlabeled.main.tensor)?;
    let z = unlabeled.adversarial.tensor.f_detach()?;
    let split = Split::of(&z, &labels, inside(kind))?;
    let u = split.others.f_add_scalar(OFFSET)?;
    let disagree = disagreement(&u)?;
    let grad = if unlabeled.adversarial.wants_grad() {
        Some(disagreement_gradient(&split, &u)?)
    } else {
        None
    };
    let part_u = Part { labels, grad };
    Ok((
        together(&agree, &disagree, eta_prime, kind)?,
        [part_l, part_u],
    ))
}

/// `p_a / u_i (onehot_a - p) / B`, 0 where `u_i > 1`, which `p_a` tells most precisely.
fn disagreement_gradient(split: &Split, u: &Tensor) -> Result<StoredGrad> {
    let slope = split
        .own
        .f_div(u)?
        .f_mul_scalar(-1.0 / split.own.numel() as f64)?
        .f_masked_fill(&split.own.f_lt(OFFSET)?, 0.0)?
        .f_unsqueeze(1)?;
    // 1 - p_a without a subtraction.
    let at_label = split.others.f_unsqueeze(1)?.f_neg()?.f_mul(&slope)?;
    stored(
        &split
            .rest
            .f_mul(&slope)?
            .f_scatter_(1, &split.index, &at_label)?,
    )
}
