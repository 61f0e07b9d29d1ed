"""Debiased self-training."""

import pytest
import torch
from torch import nn

from tests import golden
from tests.plain.dst import worst_case
from tllib_rs.self_training.dst import ImageClassifier, WorstCaseEstimationLoss, shift_log

NAMES = ("y_l", "y_l_adv", "y_u", "y_u_adv")


@pytest.mark.parametrize("case", golden.cases("dst", lambda c: c.name.startswith("wce_")), ids=repr)
def test_golden(case, precision):
    inputs = case.requires_grad(case.inputs(precision))
    loss = WorstCaseEstimationLoss(**case.ctor)(*(inputs[name] for name in NAMES))
    case.backward(loss, inputs, precision)
    case.check("loss", loss, precision)
    case.check_grads(inputs, precision)


@pytest.mark.parametrize("case", golden.cases("dst", lambda c: c.name.startswith("shift_log")), ids=repr)
def test_golden_shift_log(case, precision):
    inputs = case.requires_grad(case.inputs(precision))
    y = shift_log(inputs["x"], **case.ctor)
    case.backward(y, inputs, precision)
    case.check("y", y, precision)
    case.check_grads(inputs, precision)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nan_of_a_single_class(dtype):
    nothing = torch.zeros(2, 1)
    loss = WorstCaseEstimationLoss(2.0)(
        nothing, nothing, nothing, torch.tensor([[torch.nan], [0]], dtype=dtype)
    )
    assert loss.isnan()


@pytest.mark.parametrize("gap", [4.0, 10.0, 14.0, 16.0, 20.0, 40.0])
@pytest.mark.parametrize("form", ["kernel", "composite"])
def test_saturated_float32_is_exact_where_tllib_is_not(gap, form):
    y = torch.randn(6, 5)
    adv = 0.1 * torch.randn(6, 5) + gap * nn.functional.one_hot(y.argmax(1), 5)
    adv.requires_grad_()
    loss = WorstCaseEstimationLoss(1.0)
    got = loss(y, adv.detach(), y, adv)
    (grad,) = torch.autograd.grad(got, adv, create_graph=form == "composite")

    wide = adv.detach().double().requires_grad_()
    label = nn.functional.one_hot(y.argmax(1), 5).bool()
    others = wide.softmax(1).masked_fill(label, 0).sum(1)
    exact = nn.functional.cross_entropy(wide.detach(), y.argmax(1)) - (others + 1e-6).log().mean()
    (exact_grad,) = torch.autograd.grad(exact, wide)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)
    error = (grad.double() - exact_grad).abs().max() / exact_grad.abs().max()
    assert error < 3e-6
    # What this is for: the plain formula in float32 is far off from gap 10 on.
    (plain_grad,) = torch.autograd.grad(worst_case(y, adv.detach(), y, adv, 1.0), adv)
    plain_error = (plain_grad.double() - exact_grad).abs().max() / exact_grad.abs().max()
    assert gap < 10 or plain_error > 10 * error


@pytest.mark.parametrize(
    ("name", "bad", "error", "message"),
    [
        ("y_l", [1.0], TypeError, "WorstCaseEstimationLoss: y_l must be a torch.Tensor, got list"),
        ("y_u_adv", torch.zeros(4, 3).bool(), TypeError, r"y_u_adv must be float32, .*, got bool"),
        ("y_l", torch.zeros(2), ValueError, r"y_l must have shape \(minibatch, C, \.\.\.\) .* \[2\]"),
        ("y_l", torch.zeros(2, 3, 1), ValueError, r"y_l_adv must have the shape of y_l, \[2, 3, 1\]"),
        (
            "y_l_adv",
            torch.zeros(2, 4),
            ValueError,
            r"y_l_adv must have the shape of y_l, \[2, 3\], got shape \[2, 4\]",
        ),
        ("y_u", torch.zeros(5, 3), ValueError, r"y_u_adv must have the shape of y_u, \[5, 3\], .* \[4, 3\]"),
        ("y_u_adv", torch.zeros(4, 3, device="meta"), RuntimeError, "y_u_adv must be on the device of y_u"),
    ],
)
def test_bad_inputs(name, bad, error, message):
    inputs = {n: torch.zeros(2 if n.startswith("y_l") else 4, 3) for n in NAMES} | {name: bad}
    with pytest.raises(error, match=message):
        WorstCaseEstimationLoss(1.0)(**inputs)


def test_bad_arguments():
    with pytest.raises(ValueError, match="eta_prime must be a finite number, got NaN"):
        WorstCaseEstimationLoss(float("nan"))
    with pytest.raises(TypeError, match="eta_prime must be a number, got NoneType"):
        WorstCaseEstimationLoss(None)
    with pytest.raises(TypeError, match="shift_log: x must be a torch.Tensor, got float"):
        shift_log(0.5)
    with pytest.raises(TypeError, match=r"shift_log: x must be floating point, got torch\.int64"):
        shift_log(torch.zeros(2, dtype=torch.int64))


def test_an_empty_batch_is_nan_and_leaves_the_other_gradient():
    y, adv = torch.randn(4, 3), torch.randn(4, 3, requires_grad=True)
    nothing = torch.zeros(0, 3, requires_grad=True)
    loss = WorstCaseEstimationLoss(1.0)(nothing.detach(), nothing, y, adv)
    assert loss.isnan()
    loss.backward()
    assert nothing.grad.shape == (0, 3)
    assert adv.grad.isfinite().all()
    assert adv.grad.abs().max() > 0


def test_mixed_dtypes_promote():
    y, adv = torch.randn(4, 3), torch.randn(4, 3)
    loss = WorstCaseEstimationLoss(2.0)
    mixed = loss(y.double(), adv, y.bfloat16(), adv.double())
    assert mixed.dtype == torch.float64
    torch.testing.assert_close(mixed.float(), loss(y, adv, y, adv))


def classifier(case):
    """The recorded model."""
    arguments = {k: v for k, v in case.ctor.items() if k not in ("backbone", "pool_layer")}
    backbone = nn.Linear(5, 6)
    backbone.out_features = 6
    return ImageClassifier(backbone, pool_layer=nn.Identity(), **arguments)


def recorded(case, dtype):
    """The recorded model with the recorded weights."""
    model, inputs = classifier(case).to(dtype), case.inputs(dtype)
    state = {n.removeprefix("state:"): x for n, x in inputs.items() if n.startswith("state:")}
    model.load_state_dict(state)
    return model, inputs


def image_cases(start):
    """The cases of the classifier whose names start with ``start``."""
    return golden.cases("image_classifiers", lambda c: c.name.startswith(start))


def test_golden_classifier_in_evaluation(precision):
    (case,) = image_cases("dst_eval")
    model, inputs = recorded(case, precision)
    outputs = model.eval()(inputs["x"].requires_grad_())
    case.backward(outputs, inputs, precision)
    case.check("outputs", outputs, precision)
    case.check_grads(inputs, precision)
    assert model.features_dim == case.entry["features_dim"]
    assert [[n, list(x.shape)] for n, x in model.state_dict().items()] == [
        entry[:2] for entry in case.entry["state_dict"]
    ]
    default = ImageClassifier(nn.Linear(5, 6), 7, pool_layer=nn.Identity())
    assert [[n, list(x.shape)] for n, x in default.state_dict().items()] == [
        entry[:2] for entry in case.entry["state_dict_defaults"]
    ]


@pytest.mark.parametrize("finetune", [True, False])
def test_golden_classifier_groups(finetune):
    (case,) = image_cases("dst_eval")
    model = classifier(case)
    model.finetune = finetune
    for name, groups in case.entry["groups"].items():
        kind, lr = name.split("_lr")
        if (kind == "finetune") != finetune:
            continue
        for ours, theirs in zip(model.get_parameters(float(lr)), groups, strict=True):
            parameters = list(ours["params"])
            assert (len(parameters), sum(p.numel() for p in parameters)) == (
                theirs["n_params"],
                theirs["numel"],
            )
            assert ours["lr"] == pytest.approx(theirs["lr"])


@pytest.mark.parametrize("case", image_cases("dst_train"), ids=repr)
def test_golden_classifier_in_training(case, precision):
    model, inputs = recorded(case, precision)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for _ in range(int(case.name.removeprefix("dst_train_grl"))):
        model.step()
    x = inputs["x"].requires_grad_()
    outputs = dict(zip(("outputs", "outputs_adv", "outputs_pseudo"), model.train()(x), strict=True))
    loss = 0.37 * sum((output * inputs[f"cot:{name}"]).sum() for name, output in outputs.items())
    loss.backward()
    case.check("loss", loss, precision)
    for name, output in outputs.items():
        case.check(name, output, precision)
    for name, buffer in model.named_buffers():
        case.check(f"buffers_after:{name}", buffer, precision)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()} | {"x": x.grad}
    assert set(case.entry["grads"]) == set(grads)
    for name, grad in grads.items():
        case.check_grad(name, grad, precision)


def test_golden_classifier_initial_weights():
    (case,) = image_cases("dst_init")
    torch.manual_seed(0)
    model = classifier(case)
    for name, value in model.state_dict().items():
        case.check_drawn(f"init:{name}", value)
