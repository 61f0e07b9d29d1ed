"""Pseudo labels."""

import pytest
import torch

from tests import golden
from tllib_rs.self_training.pseudo_label import ConfidenceBasedSelfTrainingLoss


@pytest.mark.parametrize("case", golden.cases("pseudo_label"), ids=repr)
def test_golden(case, precision):
    inputs = case.inputs(precision)
    if "y_target" in inputs:
        case.requires_grad(inputs)
        target = inputs["y_target"]
    else:  # y itself
        target = inputs["y"].requires_grad_()
    loss, mask, labels = ConfidenceBasedSelfTrainingLoss(**case.ctor)(inputs["y"], target)
    case.backward(loss, inputs, precision)
    case.check("loss", loss, precision)
    case.check("mask", mask, precision)
    case.check("pseudo_labels", labels, precision)
    case.check_grads(inputs, precision)


@pytest.mark.parametrize(
    ("y", "target", "error", "message"),
    [
        (None, torch.zeros(2, 3), TypeError, "ConfidenceBasedSelfTrainingLoss: y must be a torch.Tensor, got NoneType"),
        (torch.zeros(2, 3), 1.0, TypeError, "y_target must be a torch.Tensor, got float"),
        (torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3), TypeError, "y must be float32, .* got bool"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.cfloat), TypeError, "y_target must be .* complex dtype"),
        (torch.zeros(2), torch.zeros(2), ValueError, r"y must have shape \(minibatch, C, \.\.\.\) with C > 0, got shape \[2\]"),
        (torch.zeros(2, 0), torch.zeros(2, 0), ValueError, r"got shape \[2, 0\]"),
        (torch.zeros(2, 3), torch.zeros(2, 4), ValueError, r"y_target must have the shape of y, \[2, 3\], got shape \[2, 4\]"),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), RuntimeError, "y_target must be on the device of y"),
    ],
)  # fmt: skip
def test_bad_input(y, target, error, message):
    with pytest.raises(error, match=message):
        ConfidenceBasedSelfTrainingLoss(0.9)(y, target)


def test_bad_threshold():
    with pytest.raises(ValueError, match="threshold must be a number, got NaN"):
        ConfidenceBasedSelfTrainingLoss(float("nan"))
    with pytest.raises(TypeError, match="threshold must be a number, got NoneType"):
        ConfidenceBasedSelfTrainingLoss(None)


def test_targets_of_another_dtype():
    y, target = torch.randn(5, 4), torch.randn(5, 4, dtype=torch.float64)
    loss, mask, labels = ConfidenceBasedSelfTrainingLoss(0.3)(y, target)
    same, same_mask, same_labels = ConfidenceBasedSelfTrainingLoss(0.3)(y.double(), target)
    torch.testing.assert_close(loss.double(), same, rtol=1e-6, atol=0)
    assert loss.dtype == torch.float32
    assert torch.equal(mask, same_mask)
    assert torch.equal(labels, same_labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_labels_are_those_of_the_rounded_softmax(dtype):
    target = (3 * torch.randn(4096, 10)).to(dtype)
    confidence, labels = target.softmax(dim=1).max(dim=1)
    _, mask, ours = ConfidenceBasedSelfTrainingLoss(0.7)(target, target)
    # torch rounds its own float32 softmax to the half type; an ulp of that may differ.
    assert (ours == labels).float().mean() > 0.999
    assert (mask == (confidence > 0.7)).float().mean() > 0.999


def test_float16_labels_among_very_many_classes(generator):
    # Probabilities near 1e-5, which are subnormal in float16, so that few differ.
    target = (0.002 * torch.randn(8, 100_000, generator=generator)).half()
    labels = target.float().softmax(dim=1).half().max(dim=1).indices
    _, _, ours = ConfidenceBasedSelfTrainingLoss(0.0)(target, target)
    assert torch.equal(ours, labels)


@pytest.mark.parametrize("output", [1, 2])
def test_second_derivatives_notice_a_change_of_mask_and_labels(output):
    y = torch.randn(5, 4, requires_grad=True)
    outputs = ConfidenceBasedSelfTrainingLoss(0.1)(y, y)
    torch.autograd.grad(outputs[0], y, create_graph=True)
    outputs[output].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs[0], y, create_graph=True)


def test_every_place_of_an_image_is_a_row(generator):
    y, target = torch.randn(2, 3, 6, 4, 5, generator=generator)
    loss, mask, labels = ConfidenceBasedSelfTrainingLoss(0.5)(y, target)
    rows = [x.movedim(1, -1).reshape(-1, 6) for x in (y, target)]
    expected, mask_of_rows, labels_of_rows = ConfidenceBasedSelfTrainingLoss(0.5)(*rows)
    torch.testing.assert_close(loss, expected)
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(mask, mask_of_rows.reshape(3, 4, 5))
    assert torch.equal(labels, labels_of_rows.reshape(3, 4, 5))
