"""Strong-weak consistency."""

import pytest
import torch

from tests import golden
from tllib_rs.self_training.uda import StrongWeakConsistencyLoss


@pytest.mark.parametrize("case", golden.cases("uda"), ids=repr)
def test_golden(case, precision):
    inputs = case.requires_grad(case.inputs(precision))
    y = inputs.get("y", inputs["y_strong"])  # or y_strong itself
    loss = StrongWeakConsistencyLoss(**case.ctor)(inputs["y_strong"], y)
    case.backward(loss, inputs, precision)
    case.check("loss", loss, precision)
    case.check_grads(inputs, precision)


@pytest.mark.parametrize(
    ("y_strong", "y", "error", "message"),
    [
        (
            [[1.0]],
            torch.zeros(1, 1),
            TypeError,
            "StrongWeakConsistencyLoss: y_strong must be a torch.Tensor, got list",
        ),
        (torch.zeros(2, 3), torch.zeros(2, 3).int(), TypeError, r"y must be float32, .*, got int32"),
        (
            torch.zeros(3),
            torch.zeros(3),
            ValueError,
            r"y_strong must have shape \(minibatch, C, \.\.\.\) with C > 0, got shape \[3\]",
        ),
        (torch.zeros(2, 0), torch.zeros(2, 0), ValueError, r"got shape \[2, 0\]"),
        (
            torch.zeros(2, 3),
            torch.zeros(3, 3),
            ValueError,
            r"y must have the shape of y_strong, \[2, 3\], got shape \[3, 3\]",
        ),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), RuntimeError, "y must be on the device"),
    ],
)
def test_bad_inputs(y_strong, y, error, message):
    with pytest.raises(error, match=message):
        StrongWeakConsistencyLoss(0.5, 1.0)(y_strong, y)


def test_bad_arguments():
    with pytest.raises(ValueError, match="threshold must be a number, got NaN"):
        StrongWeakConsistencyLoss(float("nan"), 1.0)
    with pytest.raises(TypeError, match="temperature must be a number, got str"):
        StrongWeakConsistencyLoss(0.5, "1")
    loss = StrongWeakConsistencyLoss(0.5, 1.0)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
            StrongWeakConsistencyLoss(0.5, bad)
        loss.temperature = bad
        with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
            loss(torch.zeros(2, 3), torch.zeros(2, 3))


def test_empty_batch_is_zero_as_in_tllib():
    y = torch.zeros(0, 3, requires_grad=True)
    loss = StrongWeakConsistencyLoss(0.5, 1.0)(y, y)
    assert loss == 0
    loss.backward()
    assert y.grad.shape == (0, 3)


def test_gradient_over_several_threads_is_divided_by_all_selected_rows():
    y = 3 * torch.randn(4099, 67)
    strong = torch.randn(67, 4099).t().requires_grad_()
    loss = StrongWeakConsistencyLoss(0.3, 0.4)
    (got,) = torch.autograd.grad(loss(strong, y), strong)
    chosen = y.softmax(1).max(1).values > 0.3
    expected = ((strong / 0.4).softmax(1) - y.softmax(1)) * chosen[:, None] / 0.4 / chosen.sum()
    assert 0 < chosen.sum() < len(y)
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-9)


def test_a_written_weak_prediction_is_noticed_by_second_derivatives():
    strong, y = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    loss = StrongWeakConsistencyLoss(0.0, 1.0)(strong, y)
    y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, strong, create_graph=True)
