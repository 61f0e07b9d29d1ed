"""Minimum class confusion."""

import pytest
import torch

from tests import golden
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
