"""Minimum class confusion."""

import pytest
import torch

from tests import golden
from tests.plain.mcc import mcc as plain
from tllib_rs.self_training.mcc import MinimumClassConfusionLoss


@pytest.mark.parametrize("case", golden.cases("mcc"), ids=repr)
def test_golden(case, precision):
    inputs = case.requires_grad(case.inputs(precision))
    loss = MinimumClassConfusionLoss(**case.ctor)(inputs["logits"])
    case.backward(loss, inputs, precision)
    if case.name == "large800_missing_class_T1.0":
        # tllib: 0/0 = NaN in both precisions. Ours is the limit: the class adds nothing to the trace.
        assert torch.isfinite(loss)
        assert torch.isfinite(inputs["logits"].grad).all()
        return
    case.check("loss", loss, precision)
    case.check_grads(inputs, precision)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([[1.0, 2.0]], TypeError, "MinimumClassConfusionLoss: logits must be a torch.Tensor, got list"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            TypeError,
            "logits must be float32, float64, float16 or bfloat16, got int64",
        ),
        (torch.zeros(3), ValueError, r"logits must have shape \(minibatch, C\) with C > 0, got shape \[3\]"),
        (torch.zeros(2, 0), ValueError, r"got shape \[2, 0\]"),
        (torch.zeros(2, 3, 4), ValueError, r"got shape \[2, 3, 4\]"),
    ],
)
def test_bad_logits(bad, error, message):
    with pytest.raises(error, match=message):
        MinimumClassConfusionLoss(1.0)(bad)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_bad_temperature(temperature):
    with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
        MinimumClassConfusionLoss(temperature)
    loss = MinimumClassConfusionLoss(1.0)
    loss.temperature = temperature
    with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
        loss(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="temperature must be a number, got str"):
        MinimumClassConfusionLoss("1")


def test_empty_batch_is_nan_as_in_tllib():
    assert MinimumClassConfusionLoss(1.0)(torch.zeros(0, 3)).isnan()


def test_confusion_matrix_is_what_the_loss_reads(generator):
    logits = 2 * torch.randn(9, 5, generator=generator, dtype=torch.float64).requires_grad_()
    loss = MinimumClassConfusionLoss(2.0)
    matrix = loss.confusion_matrix(logits)
    assert not matrix.requires_grad
    torch.testing.assert_close(matrix.sum(dim=0), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(1 - matrix.trace() / 5, loss(logits).detach(), rtol=1e-12, atol=0)
    p = (logits / 2).softmax(dim=1).detach()
    weight = 1 + (p * (p + 1e-5).log()).sum(dim=1, keepdim=True).exp()
    plain = (p * weight).T @ p
    torch.testing.assert_close(matrix, plain / plain.sum(dim=1))


def test_confusion_matrix_has_zeros_for_absent_classes():
    loss = MinimumClassConfusionLoss(1.0)
    logits = torch.tensor([[900.0, 0.0, -900.0], [0.0, 900.0, -900.0]])
    assert torch.equal(loss.confusion_matrix(logits), torch.diag(torch.tensor([1.0, 1.0, 0.0])))
    assert loss.confusion_matrix(torch.zeros(0, 3)).eq(0).all()
    assert loss.confusion_matrix(torch.tensor([[float("nan"), 0.0]])).isnan().all()


@pytest.mark.parametrize("gap", [80.0, 90.0, 95.0, 100.0, 103.0, 110.0])
def test_classes_of_subnormal_probability(gap, generator):
    """Their sums have no reciprocal in float32."""
    logits = torch.randn(6, 4, generator=generator)
    logits[:, 3] -= gap
    exact = logits.double().requires_grad_()
    expected = plain(exact, 1.0)
    expected.backward()
    loss = MinimumClassConfusionLoss(1.0)(logits.requires_grad_())
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)


def test_confusion_matrix_dtypes_and_bad_logits():
    loss = MinimumClassConfusionLoss(1.0)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        matrix = loss.confusion_matrix(torch.zeros(4, 2, dtype=dtype))
        assert torch.equal(matrix, torch.full((2, 2), 0.5, dtype=dtype))
    with torch.autocast("cpu"):
        matrix = loss.confusion_matrix(torch.full((1, 3), 0.1))
    assert matrix.dtype == torch.float32
    torch.testing.assert_close(matrix, torch.full((3, 3), 1 / 3), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"logits must have shape \(minibatch, C\)"):
        loss.confusion_matrix(torch.zeros(3))


@pytest.mark.parametrize("classes", [5, 40, 160])
def test_certain_rows_keep_their_digits(classes, generator):
    # Each row is certain of a class of its own, to 1e-6 or so: computed as 1 minus a sum, the loss would have
    # no digits left.
    logits = torch.randn(classes, classes, generator=generator) + 18 * torch.eye(classes)
    exact = logits.double().requires_grad_()
    logits.requires_grad_()
    expected, loss = plain(exact, 1.0), MinimumClassConfusionLoss(1.0)(logits)
    assert expected < 2e-5
    torch.testing.assert_close(loss.double(), expected, rtol=3e-6, atol=0)
    expected.backward()
    loss.backward()
    assert (logits.grad - exact.grad).abs().max() <= 3e-6 * exact.grad.abs().max()
