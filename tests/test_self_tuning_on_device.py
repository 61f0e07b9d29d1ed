"""Self-tuning's step on a device."""

import pytest
import torch
from torch.nn import functional as F

from tests.on_device import DEVICE, ON_GPU, ROUNDING, gpu, kernels, never_waiting, somewhere
from tests.plain import self_tuning as plain
from tllib_rs import _core

pytestmark = somewhere

T = 0.3
#: Rows, width of projections, classes, keys per class: one for each form of a kernel over rows; a class that
#: gets more keys than it has places; and a batch with more rows than a grid has blocks.
SHAPES = [(6, 5, 4, 3), (9, 33, 1, 4), (1, 3, 1, 1), (70, 8, 31, 17), (5, 7, 101, 13), (3, 4, 300, 15)]
if ON_GPU:  # more rows than a grid has blocks
    SHAPES.append((5000, 8, 3, 4))


class Twins:
    """A queue on the device, and the same in float64 on the CPU for the plain step."""

    def __init__(self, generator, rows, dim, classes, keys, dtype=torch.float32):
        self.sizes, self.dtype, self.generator = (rows, dim, classes), dtype, generator
        self.keys = keys
        self.settings = _core.SelfTuningSettings(classes, keys, 0.9, T)
        self.history = _core.SelfTuningHistory()
        self.exact = self.randn(keys * classes, dim).T.contiguous().double()
        self.exact_pointers = torch.randint(keys, (classes,), generator=generator)
        self.queue, self.pointers = (x.clone().to(DEVICE) for x in (self.exact.float(), self.exact_pointers))

    def randn(self, *shape):
        return F.normalize(torch.randn(*shape, generator=self.generator), dim=1)

    def batch(self):
        """Queries, keys and labels, as float64 on the CPU and for the device."""
        rows, dim, classes = self.sizes
        q, k = (self.randn(rows, dim).to(self.dtype) for _ in range(2))
        labels = torch.randint(classes, (rows,), generator=self.generator)
        exact = (q.double().requires_grad_(), k.double(), labels)
        return exact, (q.to(DEVICE).requires_grad_(), k.to(DEVICE), labels.to(DEVICE))

    def ours(self, q, k, labels):
        return self.history.step(q, k, labels, self.queue, self.pointers, self.settings)

    def plain(self, q, k, labels, dtype=torch.float64):
        q, k, queue = (x.to(dtype) for x in (q, k, self.exact))
        out = plain.log_probabilities(q, k, labels, queue.clone(), self.keys, T)
        if dtype == torch.float64:
            plain.enqueue(k, labels, self.exact, self.exact_pointers, self.keys)
        return out

    def check_state(self):
        assert torch.equal(self.queue.cpu(), self.exact.float())
        assert torch.equal(self.pointers.cpu(), self.exact_pointers)


def error(got, expected):
    got, expected = got.detach().double().cpu(), expected.detach().double()
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_form(shape, dtype, generator):
    """Four forwards, then their backwards in another order."""
    twins = Twins(generator, *shape, dtype)
    steps = []
    for _ in range(4):
        exact, batch = twins.batch()
        own = twins.plain(*exact, dtype=torch.float32)
        version = twins.queue._version
        steps.append((exact, batch, own, twins.ours(*batch), twins.plain(*exact)))
        twins.check_state()
        assert twins.queue._version > version
    for which in (2, 0, 3, 1):
        exact, batch, own, got, expected = steps[which]
        assert got.dtype == torch.float32
        bound = max(2e-6, 4 * error(own, expected))
        assert error(got, expected) <= bound
        weight = torch.randn(got.shape, generator=generator)
        (want,) = torch.autograd.grad(expected, exact[0], weight.double())
        (plain32,) = torch.autograd.grad(own, exact[0], weight)
        for retain in (True, False):
            (grad,) = torch.autograd.grad(got, batch[0], weight.to(DEVICE), retain_graph=retain)
            assert grad.dtype == dtype
            assert error(grad, want) <= max(ROUNDING[dtype], 4 * error(plain32, want))


def test_strides_and_a_sum(generator):
    twins = Twins(generator, 7, 6, 5, 3)
    (q, k, labels), batch = twins.batch()
    twins.queue = twins.queue.T.contiguous().T
    twins.pointers = torch.stack((twins.pointers, twins.pointers), dim=1)[:, 0]
    query = batch[0].detach().T.contiguous().T.requires_grad_()
    key = torch.stack((batch[1], batch[1]), dim=2)[:, :, 1]
    got = twins.ours(query, key, torch.stack((batch[2], batch[2]), dim=1)[:, 1].int())
    expected = twins.plain(q, k, labels)
    twins.check_state()
    assert error(got, expected) <= 2e-6
    for weigh in (lambda out: out.sum(), lambda out: out.T.square().sum()):  # expanded, and transposed
        grads = [
            torch.autograd.grad(weigh(out), x, retain_graph=True)[0]
            for out, x in ((got, query), (expected, q))
        ]
        assert error(*grads) <= 1e-5


def test_keys_that_are_not_finite_do_not_reach_the_old_graph(generator):
    twins = Twins(generator, 6, 5, 4, 3)
    exact, batch = twins.batch()
    first = twins.ours(*batch)
    _, (q, k, labels) = twins.batch()
    k[0], k[1] = torch.nan, torch.inf
    second = twins.ours(q, k, labels)
    want = torch.autograd.grad(twins.plain(*exact).square().sum(), exact[0])[0]
    assert error(torch.autograd.grad(first.square().sum(), batch[0])[0], want) <= 1e-5
    # Only the rows of these keys are not finite.
    assert second.isfinite().all(dim=1).tolist() == [False, False, True, True, True, True]
    third = twins.ours(*twins.batch()[1])
    assert not third.isfinite().any()


def test_parts_for_compiled_graphs(generator):
    twins = Twins(generator, 8, 6, 5, 3)
    exact, batch = twins.batch()
    settings, (q, k, labels) = twins.settings, batch
    with torch.no_grad():
        out = settings.forward(q, k, labels, twins.queue)
        weight = torch.randn(out.shape, generator=generator)
        grad = settings.backward(weight.to(DEVICE), out, q, k, labels, twins.queue)
        settings.enqueue(k, labels, twins.queue, twins.pointers)
    expected = twins.plain(*exact)
    twins.check_state()
    assert error(out, expected) <= 2e-6
    assert error(grad, torch.autograd.grad(expected, exact[0], weight.double())[0]) <= 1e-5


def test_keys_of_other_ranks_are_enqueued(generator):
    twins = Twins(generator, 5, 6, 4, 2)
    exact, batch = twins.batch()
    other = twins.batch()[0]
    expected = plain.log_probabilities(*exact[:2], exact[2], twins.exact.clone(), twins.keys, T)
    keys, labels = torch.cat((exact[1], other[1])), torch.cat((exact[2], other[2]))
    plain.enqueue(keys, labels, twins.exact, twins.exact_pointers, twins.keys)
    enqueued = (keys.float().to(DEVICE), labels.to(DEVICE))
    got = twins.history.step(*batch, twins.queue, twins.pointers, twins.settings, enqueued)
    twins.check_state()
    assert error(got, expected) <= 2e-6


@kernels
def test_pointers_out_of_range_stay_within_the_queue(generator):
    twins = Twins(generator, 3, 4, 2, 5)
    _, (q, k, labels) = twins.batch()
    twins.pointers.copy_(torch.tensor([-1, 7]))
    before = twins.queue.clone()
    twins.ours(q, k, labels * 0 + 1)
    changed = (twins.queue != before).any(dim=0).nonzero().flatten()
    assert changed.tolist() == [5 + place for place in (2, 3, 4)]
    twins.ours(q, k, labels * 0)
    assert twins.pointers.tolist() == [2, 0]


def step(twins, batch):
    out = twins.ours(*batch)
    return out, torch.autograd.grad(out, batch[0], torch.ones_like(out))[0]


@gpu
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_never_waits_for_the_device(dtype, generator):
    twins = Twins(generator, 48, 64, 20, 8, dtype)
    _, batch = twins.batch()
    step(twins, batch)  # compiles
    with never_waiting():
        step(twins, batch)


@gpu
def test_captured_and_replayed(generator):
    twins = Twins(generator, 48, 64, 20, 8)
    _, batch = twins.batch()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step(twins, batch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(twins, batch)
    twins.exact, twins.exact_pointers = twins.queue.cpu().double(), twins.pointers.cpu()
    for _ in range(3):
        exact, other = twins.batch()
        with torch.no_grad():
            for x, y in zip(batch, other, strict=True):
                x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        expected = twins.plain(*exact)
        want = torch.autograd.grad(expected, exact[0], torch.ones_like(expected))[0]
        twins.check_state()
        assert error(captured[0], expected) <= 2e-6
        assert error(captured[1], want) <= 1e-4
