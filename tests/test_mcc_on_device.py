"""What is specific to minimum class confusion on a device."""

import pytest
import torch

from tests.losses import LOSSES
from tests.on_device import DEVICE, on_cpu, somewhere
from tests.plain.mcc import mcc as plain
from tests.test_losses import assert_agree, run
from tllib_rs.self_training.mcc import MinimumClassConfusionLoss

pytestmark = somewhere
MCC = next(loss for loss in LOSSES if loss.name == "mcc")
#: One block, and each form with several rows in a block.
SHAPES = [(128, 128), (129, 17), (300, 7), (70, 345), (12, 1500), (5, 5003)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@every_shape
def test_without_a_gradient_is_the_same(generator, shape):
    logits = 2 * torch.randn(shape, generator=generator).to(DEVICE)
    exact = logits.detach().cpu().double().requires_grad_()
    value, grads = run(MCC, MCC.ours, [logits.requires_grad_()])
    assert_agree(on_cpu((value, grads)), run(MCC, MCC.plain, [exact]), torch.float32, 2e-6)
    assert torch.equal(MCC.ours(logits.detach()), value)


@every_shape
def test_absent_classes_and_nan(generator, shape):
    rows, classes = shape
    present = torch.arange(classes) % 3 > 0
    exact = 2 * torch.randn(rows, int(present.sum()), generator=generator).double()
    logits = torch.full(shape, -900.0)
    logits[:, present] = exact.float()
    logits = logits.to(DEVICE).requires_grad_()
    loss = MinimumClassConfusionLoss(1.0)(logits)
    loss.backward()
    # Only classes that are present are in the trace.
    trace = exact.shape[1] * (1 - plain(exact, 1.0))
    torch.testing.assert_close(loss.detach().cpu().double(), 1 - trace / classes, rtol=2e-6, atol=0)
    grad = logits.grad.cpu()
    assert grad[:, ~present].eq(0).all()
    assert grad[:, present].ne(0).any()
    logits = logits.detach()
    logits[rows // 2, classes // 2] = torch.nan
    loss = MinimumClassConfusionLoss(1.0)(logits.requires_grad_())
    loss.backward()
    assert loss.isnan()
    assert logits.grad.isnan().all()


@pytest.mark.parametrize("shape", [(0, 7), (0, 345), (0, 5003)], ids=str)
def test_no_rows(shape):
    logits = torch.zeros(shape, device=DEVICE, requires_grad=True)
    loss = MinimumClassConfusionLoss(1.0)(logits)
    loss.backward()
    assert loss.isnan()
    assert logits.grad.shape == shape
