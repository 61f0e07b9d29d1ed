"""What is specific to class balance on a device."""

import pytest
import torch

from tests.losses import LOSSES
from tests.on_device import DEVICE, KERNELS, ROUNDING, on_cpu, somewhere
from tests.test_losses import assert_agree, run
from tllib_rs.self_training.self_ensemble import ClassBalanceLoss

pytestmark = somewhere
BALANCE = next(loss for loss in LOSSES if loss.name == "class_balance")


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", [(1023, 5), (2051, 3), (1100, 40)], ids=str)
def test_parts_of_the_rows(generator, dtype, shape):
    p = (2 * torch.randn(shape, generator=generator)).softmax(dim=1).to(dtype)
    exact, typed = p.double().requires_grad_(), p.to(DEVICE).requires_grad_()
    # The gradient of a mean is small; `assert_agree` needs one that is not.
    got = run(BALANCE, BALANCE.ours, [typed], weight=len(p))
    expected = run(BALANCE, BALANCE.plain, [exact], weight=len(p))
    rounding = ROUNDING[dtype]
    if not KERNELS:
        # A float32 mean, rounded a few times, loses as many digits as it shares with the number it is compared with.
        means = exact.detach().mean(dim=0)
        shared = means.max() / (means - 1 / shape[1]).abs().max()
        rounding = max(rounding, 4 * torch.finfo(torch.float32).eps * float(shared))
    assert_agree(on_cpu(got), expected, dtype, rounding)


def test_nan_where_it_cannot_raise():
    p = torch.tensor([[1.5, 0.5], [1.5, 0.5]], device=DEVICE, requires_grad=True)
    loss = ClassBalanceLoss(2)(p)
    loss.backward()
    assert loss.isnan()
    assert p.grad[:, 0].isnan().all()
    assert p.grad[:, 1].eq(0).all()


def test_several_gradients_at_once(generator):
    p = torch.rand(6, 5, generator=generator).to(DEVICE).requires_grad_()
    loss = BALANCE.ours(p)
    weights = torch.tensor([1.0, -2.0], device=DEVICE)
    (several,) = torch.autograd.grad(loss, p, weights, retain_graph=True, is_grads_batched=True)
    (one,) = torch.autograd.grad(loss, p)
    torch.testing.assert_close(several, torch.stack([one, -2 * one]))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"p must have shape \(minibatch, 3\), got shape \[2, 4\]"):
        ClassBalanceLoss(3)(torch.zeros(2, 4, device=DEVICE))
