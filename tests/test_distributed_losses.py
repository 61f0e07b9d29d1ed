"""Losses and Self-Tuning across ranks: values, gradients and state are those of one process with the batches
of all ranks in order, whatever the sizes of the batches.

Each rank draws the whole batch from one seed, runs its rows through the module with the group, and compares
with the module without one on all rows.
"""

import copy
import os
import pickle
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.losses import Observed
from tests.ranks import Died, run_ranks
from tllib_rs import _core
from tllib_rs.self_training.flexmatch import DynamicThresholdingModule
from tllib_rs.self_training.mcc import MinimumClassConfusionLoss
from tllib_rs.self_training.self_ensemble import ClassBalanceLoss
from tllib_rs.self_training.self_tuning import SelfTuning
from tllib_rs.vision.models.reid.loss import SoftTripletLoss

STEPS = 50
CLASSES = 5


def sizes(step, world):
    """Ragged batches; in two of three steps one rank has no rows, and in some all but one have none."""
    generator = torch.Generator().manual_seed(step)
    drawn = torch.randint(1, 6, (world,), generator=generator).tolist()
    if step % 3:
        drawn[step % world] = 0
    if step % 10 == 7:
        drawn = [n if r == step % world else 0 for r, n in enumerate(drawn)]
        drawn[step % world] = 4
    return drawn


def split(step, rank, world):
    """How many rows all ranks have together, and which of them are this rank's."""
    counts = sizes(step, world)
    return sum(counts), slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def logits_of(module):
    return lambda x: module(x[0])


def probabilities_of(module):
    return lambda x: module(x[0].softmax(dim=1))


def labelled(module):
    return lambda x: module(x[0], x[1], x[2])


#: By name: the class, its arguments, and how a module is called with (features, teacher, labels).
LOSSES = {
    "mcc": (MinimumClassConfusionLoss, (2.5,), logits_of),
    "class_balance": (ClassBalanceLoss, (CLASSES,), probabilities_of),
    "soft_triplet": (SoftTripletLoss, (), labelled),
    "soft_triplet_margin": (SoftTripletLoss, (0.3, True), labelled),
}


def loss_of(name, group=None):
    make, arguments, through = LOSSES[name]
    return through(make(*arguments, process_group=group))


def batch(step, rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1000 + step)
    features, teacher = torch.randn(2, rows, CLASSES, generator=generator, dtype=torch.float64).to(dtype)
    return features, teacher, torch.randint(3, (rows,), generator=generator)


def with_gradient(loss, x, factor=0.5):
    leaf = x[0].clone().requires_grad_()
    value = loss((leaf, *x[1:]))
    (factor * value).backward()
    return value.detach(), leaf.grad


def fifty_steps(rank, world):
    return {name: losses_of(name, rank, world) for name in LOSSES}


def losses_of(name, rank, world):
    ours, one = loss_of(name, dist.group.WORLD), loss_of(name)
    losses = []
    for step in range(STEPS):
        total, own = split(step, rank, world)
        x = batch(step, total)
        value, gradient = with_gradient(ours, [part[own] for part in x])
        expected, whole = with_gradient(one, x)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        # DistributedDataParallel divides by the number of ranks.
        torch.testing.assert_close(gradient, world * whole[own], rtol=1e-11, atol=1e-13)
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("world", [2, 4])
def test_values_and_gradients_are_those_of_one_process(world):
    first, *others = run_ranks(world, fifty_steps, world)
    assert all(len(losses) == STEPS for losses in first.values())
    assert all(losses == first for losses in others)  # to the last bit


class Encoder(nn.Module):
    """Without batch norm, whose statistics would differ between ranks."""

    def __init__(self, projection_dim=4):
        super().__init__()
        self.body, self.projection_dim = nn.Linear(6, 5), projection_dim
        self.projector, self.head = nn.Linear(5, projection_dim), nn.Linear(5, CLASSES)

    def forward(self, x):
        h = self.body(x).tanh()
        return F.normalize(self.projector(h), dim=1), self.head(h)


def self_tuning(seed, group=None):
    torch.manual_seed(seed)
    return SelfTuning(Encoder(), Encoder(), CLASSES, K=3, m=0.9, T=0.2, process_group=group).double()


def views(step, rows):
    generator = torch.Generator().manual_seed(2000 + step)
    im_q, im_k = torch.randn(2, rows, 6, generator=generator, dtype=torch.float64)
    return im_q, im_k, torch.randint(CLASSES, (rows,), generator=generator)


def same_encoders(ours, one):
    for name in ("encoder_q", "encoder_k"):
        getattr(ours, name).load_state_dict(getattr(one, name).state_dict())


def queue_steps(rank, world):
    # Every rank draws a queue of its own; the first rank's is used.
    ours, one = self_tuning(rank, dist.group.WORLD), self_tuning(0)
    same_encoders(ours, one)
    for step in range(STEPS):
        total, own = split(step, rank, world)
        x = views(step, total)
        found = ours(x[0][own], x[1][own], x[2][own].int())
        expected = one(*x)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b[own], rtol=1e-11, atol=1e-11)
        parameters = list(ours.encoder_q.parameters())
        cotangent = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(step)).double()
        gradients = torch.autograd.grad((found[0] * cotangent[own]).sum() + found[2].sum(), parameters)
        (expected[0] * cotangent).sum().add(expected[2].sum()).backward()
        for mine, parameter in zip(gradients, one.encoder_q.parameters(), strict=True):
            dist.all_reduce(mine)
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-10, atol=1e-10)
        for model in (ours, one):
            for k, parameter in enumerate(model.encoder_q.parameters()):
                parameter.grad = None
                parameter.data.add_(0.01 * (-1) ** (k + step))
        torch.testing.assert_close(ours.queue_list, one.queue_list, rtol=1e-12, atol=1e-12)
        assert torch.equal(ours.queue_ptr, one.queue_ptr)
    return ours.queue_list


@pytest.mark.parametrize("world", [2, 4])
def test_queues_are_those_of_one_process(world):
    first, *others = run_ranks(world, queue_steps, world)
    assert all(torch.equal(queue, first) for queue in others)


def trained(model, loss, steps):
    """By plain gradient descent."""
    for step in range(steps):
        model.zero_grad()
        loss(model, step).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter -= 0.1 * parameter.grad


def ddp_losses(rank, world):
    torch.manual_seed(rank)  # its constructor makes the parameters equal
    network = nn.Sequential(nn.Linear(CLASSES, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
    ddp = DistributedDataParallel(network)
    one = copy.deepcopy(ddp.module)

    def objective(losses, part):
        def loss(model, step):
            total, own = split(step, rank, world)
            x = batch(step, total)
            x = [each[own] for each in x] if part else x
            y = model(x[0])
            return sum(each((y, *x[1:])) for each in losses)

        return loss

    group = dist.group.WORLD
    for model, losses, part in (
        (ddp, [loss_of(name, group) for name in LOSSES], True),
        (one, [loss_of(name) for name in LOSSES], False),
    ):
        trained(model, objective(losses, part), 20)
    for a, b in zip(ddp.module.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Nested(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *x):
        return self.inner(*x)


def contrast(outputs, labels, scale):
    """Summed over the rows, so that ragged batches weigh as in one process."""
    logits, targets, y = outputs
    return scale * (F.kl_div(logits, targets, reduction="sum") + F.cross_entropy(y, labels, reduction="sum"))


def ddp_queue(rank, world, forwards):
    one = self_tuning(0)
    ours = self_tuning(rank, dist.group.WORLD)
    same_encoders(ours, one)
    # Inside another module DDP broadcasts the queue: nothing changes, as it is the same everywhere.
    model = ours if forwards > 1 else Nested(ours)
    ddp = DistributedDataParallel(model, broadcast_buffers=True)

    def objective(part):
        def loss(model, step):
            terms = []
            # As in tllib's example, a labeled and an unlabeled batch share one backward.
            for k in range(forwards):
                total, own = split(forwards * step + k, rank, world)
                x = views(forwards * step + k, total)
                x = [each[own] for each in x] if part else x
                # Weighted so that DDP's mean over ranks is the mean over rows.
                terms.append(contrast(model(*x), x[2], (world if part else 1) / total))
            return sum(terms)

        return loss

    for network, part in ((ddp, True), (one, False)):
        trained(network, objective(part), 20)
    for key, value in one.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-10, atol=1e-12)
    return ours.queue_list


def ddp_training(rank, world):
    ddp_losses(rank, world)
    compiled(rank)
    return [ddp_queue(rank, world, forwards) for forwards in (1, 2)]


def compiled(rank):
    module = MinimumClassConfusionLoss(1.0, process_group=dist.group.WORLD)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(rank))
    assert torch.equal(torch.compile(module, backend="eager")(x), module(x))


@pytest.mark.parametrize("world", [2, 4])
def test_ddp_trains_as_one_process_does_and_leaves_the_queue(world):
    first, *others = run_ranks(world, ddp_training, world)
    for queues in others:
        assert all(map(torch.equal, queues, first))


def dying(rank, world):
    losses = [loss_of(name, dist.group.WORLD) for name in LOSSES]
    start = None
    try:
        for step in range(10_000):
            if rank == 1 and step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            start = time.monotonic()
            x = batch(step, 4)
            for loss in losses:
                loss(x)
    except RuntimeError:
        return time.monotonic() - start
    return None


def test_a_killed_rank_ends_the_others():
    first, died, *others = run_ranks(4, dying, 4, group_timeout=3.0, dying=[1])
    assert isinstance(died, Died)
    assert all(waited is not None and waited < 6.0 for waited in (first, *others))


def refused(rank, world):
    """Bad input raises on this rank before anything is sent: the ranks stay in step."""
    group = dist.group.WORLD
    mcc, balance = (
        MinimumClassConfusionLoss(1.0, process_group=group),
        ClassBalanceLoss(3, process_group=group),
    )
    triplet, tuning = SoftTripletLoss(process_group=group), self_tuning(0, group)
    x, labels, images = torch.randn(4, 3), torch.arange(4) % 2, torch.randn(4, 6).double()
    bad = [
        (TypeError, lambda: mcc(x.long())),
        (ValueError, lambda: mcc(x[0])),
        (TypeError, lambda: mcc(None)),
        (ValueError, lambda: balance(x[:, :2])),
        (TypeError, lambda: triplet(x.long(), x, labels)),
        (ValueError, lambda: triplet(x, x[:3], labels)),
        (ValueError, lambda: triplet(x, x, labels[:3])),
        (IndexError, lambda: tuning(images, images, torch.tensor([0, 1, 2, CLASSES]))),
        (ValueError, lambda: tuning(images, images[:3], labels)),
    ]
    if rank == 0:
        for error, call in bad:
            with pytest.raises(error):
                call()
    # In step: all get one value.
    y = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))
    values = [mcc(y), balance(y.softmax(dim=1)), triplet(y, y, labels)]
    tuning(images, images, labels)
    # Errors that only all ranks together can detect are raised on all of them, which also stay in step.
    with pytest.raises(ValueError, match="column means"):
        balance(x.softmax(dim=1) + 5 * (rank == 0))
    with pytest.raises(ValueError, match="width of features_1 must be the same on every rank, got"):
        triplet(torch.randn(4, 3 + rank), x, labels)
    with pytest.raises(ValueError, match="dtype of features_1 must be the same"):
        triplet(x.double() if rank else x, x, labels)
    with pytest.raises(ValueError, match="at least one row"):
        triplet(x[:0], x[:0], labels[:0])
    assert mcc(x[:0]).isnan()
    assert balance(x[:0]).isnan()
    return [value.item() for value in values], tuning.queue_ptr


def test_bad_input_leaves_the_ranks_in_step():
    (values, pointers), (others, other_pointers) = run_ranks(2, refused, 2)
    assert values == others
    assert torch.equal(pointers, other_pointers)


def flexmatch(group):
    return DynamicThresholdingModule(0.9, True, lambda x: x, 3, 10, "cpu", process_group=group)


def groups(rank, world):
    other = dist.new_group([1])
    destroyed = dist.new_group([0, 1])
    dist.destroy_process_group(destroyed)
    makers = [lambda g, n=name: loss_of(n, g) for name in LOSSES]
    makers += [lambda g: self_tuning(0, g), flexmatch]
    for make in makers:
        for group in ("world", 3, True, dist.group):
            with pytest.raises(TypeError, match=r"process_group must be a torch.distributed.ProcessGroup"):
                make(group)
        with pytest.raises(RuntimeError, match="not initialized, or was destroyed"):
            make(destroyed)
        if rank == 0:
            with pytest.raises(ValueError, match="not a member of process_group"):
                make(other)
    module = MinimumClassConfusionLoss(1.0, process_group=dist.group.WORLD)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(rank))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    with pytest.raises(TypeError, match="save the state_dict"):
        pickle.dumps(module)
    return True


def test_groups_are_checked_and_shared_by_copies():
    assert all(run_ranks(2, groups, 2))


def second_derivatives(rank, world):
    for name in LOSSES:
        x = batch(0, 6)
        leaf = x[0].requires_grad_()
        value = loss_of(name, dist.group.WORLD)((leaf, *x[1:]))
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(value, leaf, create_graph=True)
        torch.autograd.grad(value, leaf, retain_graph=True)
        torch.autograd.grad(value, leaf)
    return True


def test_second_derivatives_raise():
    assert all(run_ranks(2, second_derivatives, 2))


def forward_mode(rank, world):
    for name in LOSSES:
        x = batch(0, 6)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x[0], torch.ones_like(x[0]))
            with pytest.raises(RuntimeError, match="no derivative in forward mode across ranks"):
                loss_of(name, dist.group.WORLD)((dual, *x[1:]))
            loss_of(name, dist.group.WORLD)(x)
    return True


def test_forward_mode_raises():
    assert all(run_ranks(2, forward_mode, 2))


def replaced_step(rank, world):
    ours, one, seen = self_tuning(0, dist.group.WORLD), self_tuning(0), []
    same_encoders(ours, one)
    enqueue = ours._dequeue_and_enqueue
    ours._dequeue_and_enqueue = lambda h, label: (seen.append(int(label)), enqueue(h, label))
    total, own = split(1, rank, world)
    x = views(1, total)
    found, expected = ours(x[0][own], x[1][own], x[2][own]), one(*x)
    torch.testing.assert_close(found[0], expected[0][own], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours.queue_list, one.queue_list, rtol=1e-12, atol=1e-12)
    assert seen == x[2].tolist()
    return True


def test_a_step_that_is_replaced_gets_the_rows_of_all_ranks():
    assert all(run_ranks(2, replaced_step, 2))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("composite", [False, True])
def test_parts_are_a_whole_in_every_dtype(dtype, tolerance, composite):
    """The exchange done by hand, in one process."""
    z = batch(0, 9)[0].to(dtype)
    p = z.softmax(dim=1)
    for x, one in ((z, MinimumClassConfusionLoss(2.5)), (p, ClassBalanceLoss(CLASSES))):
        expected, whole = with_gradient(lambda x, one=one: one(x[0]), (x,), 1.0)
        leaves = [part.clone().requires_grad_() for part in x.split([4, 0, 5])]
        mode = Observed() if composite else torch.enable_grad()
        with mode:
            if x is z:
                parts = [_core.MccPart(leaf, 2.5) for leaf in leaves]
                total = sum(part.sums for part in parts)
                losses = [part.finish(total, 3) for part in parts]
            else:
                total = sum(_core.class_balance_sums(leaf, CLASSES) for leaf in leaves)
                losses = [_core.class_balance_of_sums(leaf, CLASSES, total, 3) for leaf in leaves]
        for loss in losses:
            assert loss.dtype == expected.dtype
            torch.testing.assert_close(loss.detach(), expected, rtol=tolerance, atol=tolerance)
            loss.backward()
        gradient = torch.cat([leaf.grad for leaf in leaves])
        torch.testing.assert_close(gradient, 3 * whole, rtol=4 * tolerance, atol=tolerance)


def test_a_part_is_finished_once_with_sums_that_fit():
    part = _core.MccPart(torch.randn(2, 3), 1.0)
    with pytest.raises(ValueError, match=r"sums must be float64 of shape \(4,\)"):
        _core.class_balance_of_sums(torch.rand(2, 3), 3, torch.ones(3, dtype=torch.float64), 1)
    with pytest.raises(ValueError, match="world_size must be above 0"):
        _core.class_balance_of_sums(torch.rand(2, 3), 3, torch.ones(4, dtype=torch.float64), 0)
    part.finish(part.sums, 1)
    for call in (lambda: part.sums, lambda: part.finish(torch.ones(6, dtype=torch.float64), 1)):
        with pytest.raises(RuntimeError, match="this part is finished"):
            call()
