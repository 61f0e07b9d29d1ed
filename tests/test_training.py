"""Whole trainings in the ways in which users train, step by step against the plain formulation."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from tests.losses import LOSSES
from tests.trainings import TASKS, assert_same_training, plain_step, train
from tllib_rs.self_training.mcc import MinimumClassConfusionLoss

every_task = pytest.mark.parametrize("task", TASKS, ids=repr)
OF_LOSSES = TASKS[: len(LOSSES)]
repeatable = pytest.mark.parametrize("task", [task for task in TASKS if task.repeatable], ids=repr)


@every_task
def test_plain_steps(task):
    ours, plain = task.pair()
    batches = task.batches(8)
    assert_same_training(train(ours, batches, plain_step), train(plain, batches, plain_step))


@every_task
def test_gradient_accumulation(task):
    """One backward per micro-batch, against one backward for the mean of them all."""
    ours, plain = task.pair()
    batches = [task.batches(12)[k : k + 4] for k in range(0, 12, 4)]

    def accumulated(network, optimizer, micro_batches):
        optimizer.zero_grad()
        total = 0
        for batch in micro_batches:
            loss = network(*batch) / len(micro_batches)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        return total

    def at_once(network, optimizer, micro_batches):
        optimizer.zero_grad()
        loss = sum(network(*batch) for batch in micro_batches) / len(micro_batches)
        loss.backward()
        optimizer.step()
        return loss

    assert_same_training(train(ours, batches, accumulated), train(plain, batches, at_once))


def checkpointed(reentrant):
    """A step whose network and loss are run again in backward, with the same dropout."""

    def step(network, optimizer, batch):
        optimizer.zero_grad()
        # The reentrant kind sees only that its inputs require a gradient, not that parameters do.
        first = batch[0].clone().requires_grad_()
        loss = checkpoint(network, first, *batch[1:], use_reentrant=reentrant)
        loss.backward()
        optimizer.step()
        return loss

    return step


@repeatable
def test_reentrant_activation_checkpointing_around_network_and_loss(task):
    ours, plain = task.pair()
    batches = task.batches(6)
    assert_same_training(train(ours, batches, checkpointed(True)), train(plain, batches, plain_step))


@pytest.mark.parametrize("early_stop", [False, True], ids=["whole", "early_stop"])
@pytest.mark.parametrize("task", OF_LOSSES, ids=repr)
def test_activation_checkpointing_around_network_and_loss(task, early_stop):
    """Early stop, the default, ends the second forward by an exception when the last tensor is saved."""
    ours, plain = task.pair()
    batches = task.batches(6)
    with set_checkpoint_early_stop(early_stop):
        got = train(ours, batches, checkpointed(False))
    assert_same_training(got, train(plain, batches, plain_step))


def test_what_a_hook_for_saved_tensors_raises_reaches_the_caller():
    def pack(tensor):
        raise KeyError("not this one")

    logits = torch.randn(5, 3, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        pytest.raises(KeyError, match="not this"),
    ):
        MinimumClassConfusionLoss(2.0)(logits)


# bfloat16 keeps 8 bits: rounding to it moves a number by at most 2^-9 of itself.
ROUNDED = 2.0**-9
WEIGHTS = [1.0, 2.0, torch.inf, 0.5, 1.0, torch.nan, 1.0]  # of the loss in each step; powers of 2 are exact


def scaled(network, batch, scaler, weight):
    """Forward under autocast, then backward of the scaled loss, which leaves the gradients to the scaler."""
    for parameter in network.parameters():
        parameter.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = network(*batch)
    scaler.scale(loss * weight).backward()
    return loss.detach()


def in_float32(call):
    """Runs a plain formulation in float32: autocast would round inside it, and ours never does."""

    def called(*inputs):
        with torch.autocast("cpu", enabled=False):
            return call(*(x.float() if x.is_floating_point() else x for x in inputs))

    return called


@pytest.mark.parametrize("loss", OF_LOSSES, ids=repr)
def test_autocast_with_a_gradient_scaler(loss):
    """Logits come out of the network in bfloat16 and go into both formulations as they are.

    The two may differ by the rounding to bfloat16. A loss that is one number is rounded once, a loss per
    row once in each row and once as their sum: 2 ROUNDED. Both store a gradient in bfloat16, and the scale
    is a power of 2: 2 ROUNDED of the largest where the two round differently, and as much again from the
    matrix product that computes the gradient of a weight. Every step starts from the same parameters, since
    a difference in the last bit would change the roundings of all that follows.
    """
    ours, plain = (network.float() for network in loss.pair())
    plain.call = in_float32(plain.call)
    networks = (ours, plain)
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9) for network in networks]
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2) for _ in networks]
    initial = copy.deepcopy(ours.state_dict())
    for number, (batch, weight) in enumerate(zip(loss.batches(len(WEIGHTS)), WEIGHTS, strict=True)):
        batch = [x.float() if x.is_floating_point() else x for x in batch]
        plain.load_state_dict(ours.state_dict())
        optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        before = copy.deepcopy(ours.state_dict())
        values = []
        for network, scaler in zip(networks, scalers, strict=True):
            torch.manual_seed(number)
            values.append(scaled(network, batch, scaler, weight))
        torch.testing.assert_close(values[0].float(), values[1].float(), rtol=2 * ROUNDED, atol=1e-6)
        if torch.tensor(weight).isfinite():
            for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
                assert (a.grad - b.grad).abs().max() <= 4 * ROUNDED * b.grad.abs().max().clamp_min(1e-3)
        for optimizer, scaler in zip(optimizers, scalers, strict=True):
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        kept = all(torch.equal(before[key], value) for key, value in ours.state_dict().items())
        assert kept == (not torch.tensor(weight).isfinite())
    assert scalers[0].get_scale() == 2.0**12  # grown twice, halved twice
    assert any(not torch.equal(initial[key], value) for key, value in ours.state_dict().items())
