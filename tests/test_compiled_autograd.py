"""Losses called eagerly whose backward pass runs through torch's compiled autograd."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tests.test_losses import every_loss, leaves, run
from tests.test_self_tuning import Setting
from tllib_rs.self_training.mcc import MinimumClassConfusionLoss
from tllib_rs.vision.models.reid.loss import pairwise_euclidean_distance

MCC = MinimumClassConfusionLoss(2.0)


# From torch's own inspection of what it compiles.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def z(generator):
    """Logits that are differentiated."""
    return torch.randn(16, 6, generator=generator, requires_grad=True)


@contextmanager
def compiled_autograd(graphs=None):
    """Backward passes inside are compiled; each graph is appended to ``graphs``."""

    def compiler(graph):
        if graphs is not None:
            graphs.append(graph)
        return torch.compile(graph, backend="eager")

    with torch._dynamo.compiled_autograd._enable(compiler):
        yield


@every_loss
def test_gradients_are_those_of_the_eager_pass(loss, generator):
    graphs = []
    for _ in range(2):
        inputs = leaves(loss, [2 * x if x.is_floating_point() else x for x in loss.inputs(generator)])
        expected = run(loss, loss.ours, inputs)
        with compiled_autograd(graphs):
            got = run(loss, loss.ours, inputs)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, generator):
    z = torch.randn(64, 10, generator=generator).to(dtype).requires_grad_()
    (expected,) = torch.autograd.grad(MCC(z), z)
    with compiled_autograd():
        (got,) = torch.autograd.grad(MCC(z), z)
    assert got.dtype == dtype
    assert not got.requires_grad
    assert torch.equal(got, expected)


def test_one_graph_serves_other_nodes_of_the_same_kind(generator):
    """Two losses in one pass, each with gradients of its own, and batches of other sizes."""
    graphs = []
    other = MinimumClassConfusionLoss(0.5)
    for rows in (8, 8, 20, 33, 47):
        z, y = (torch.randn(rows, 6, generator=generator, requires_grad=True) for _ in range(2))
        expected = torch.autograd.grad(MCC(z) + 3 * other(y), (z, y))
        with compiled_autograd(graphs):
            got = torch.autograd.grad(MCC(z) + 3 * other(y), (z, y))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(graphs) <= 3


def test_outputs_that_are_no_losses(generator):
    a, b = (torch.randn(n, 5, generator=generator, requires_grad=True) for n in (4, 6))
    weight = torch.randn(4, 6, generator=generator)
    expected = torch.autograd.grad((pairwise_euclidean_distance(a, b) * weight).sum(), (a, b))
    with compiled_autograd():
        got = torch.autograd.grad((pairwise_euclidean_distance(a, b) * weight).sum(), (a, b))
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_a_training_step(generator):
    """Parameters accumulate gradients, and an input that requires none gets none."""
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(32, 6, generator=generator)

    def step():
        net.zero_grad()
        (0.3 * MCC(net(x)) + net(x).square().mean()).backward()
        return [p.grad.clone() for p in net.parameters()]

    expected = step()
    for _ in range(2):
        with compiled_autograd():
            got = step()
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_a_graph_that_is_kept_and_one_that_is_not(z):
    loss = MCC(z)
    with compiled_autograd():
        (first,) = torch.autograd.grad(loss, z, retain_graph=True)
        (second,) = torch.autograd.grad(loss, z)
        assert torch.equal(first, second)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, z)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, z)


def test_an_eager_pass_after_a_compiled_one(z):
    loss = MCC(z)
    with compiled_autograd():
        (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    (third,) = torch.autograd.grad(loss, z)
    assert torch.equal(first, third)


def test_second_derivatives(z):
    def second():
        (first,) = torch.autograd.grad(MCC(z), z, create_graph=True)
        return torch.autograd.grad(first.square().sum(), z)[0]

    expected = second()
    with compiled_autograd():
        got = second()
    torch.testing.assert_close(got, expected)


def test_a_pass_that_fails_leaves_no_gradients_behind(z):
    def fail(_):
        raise ValueError("a hook")

    y = 2 * z
    y.register_hook(fail)
    loss = MCC(y)
    with compiled_autograd(), pytest.raises(ValueError, match="a hook"):
        loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_nothing_outlives_the_graph(z):
    """A node that stayed alive would keep the graph before it alive."""
    y = Doubled.apply(z)
    before = weakref.ref(y.grad_fn)
    loss = MCC(y)
    with compiled_autograd():
        loss.backward()
    (expected,) = torch.autograd.grad(MCC(2 * z), z)
    assert torch.equal(z.grad, expected)
    del loss, y
    gc.collect()
    torch._dynamo.reset()
    assert before() is None


def test_self_tuning(generator):
    setting = Setting(generator)
    batch = setting.new()
    ours, expected = setting.ours(*batch), setting.plain(*batch)
    incoming = torch.randn(ours.shape, generator=generator, dtype=ours.dtype)
    (want,) = torch.autograd.grad(expected, batch[0], incoming)
    with compiled_autograd():
        (got,) = torch.autograd.grad(ours, batch[0], incoming)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
