"""Gradient reversal."""

import copy
import math

import pytest
import torch
from torch import nn

from tests import golden
from tllib_rs.modules.grl import (
    GradientReverseFunction,
    GradientReverseLayer,
    WarmStartGradientReverseLayer,
)


def warm_start_cases():
    """One call of the layer at a given iteration."""
    return golden.cases("grl", lambda c: c.name.startswith("forward_backward"))


@pytest.mark.parametrize("case", warm_start_cases(), ids=repr)
def test_golden_warm_start(case, precision):
    inputs = case.requires_grad(case.inputs(precision))
    layer = WarmStartGradientReverseLayer(**case.ctor)
    for _ in range(int(case.name.removeprefix("forward_backward_iter"))):
        layer.step()
    y = layer(inputs["x"])
    case.backward(y, inputs, precision)
    assert torch.equal(y, inputs["x"])
    case.check("y", y, precision)
    case.check("iter_num_after", layer.iter_num, precision)
    case.check_grads(inputs, precision)


@pytest.mark.parametrize("case", golden.cases("grl", lambda c: c.name.startswith("plain")), ids=repr)
def test_golden_plain(case, precision):
    inputs = case.requires_grad(case.inputs(precision))
    coeff = () if case.name == "plain_default" else (0.25,)
    y = GradientReverseLayer()(inputs["x"], *coeff)
    case.backward(y, inputs, precision)
    case.check("y", y, precision)
    case.check_grads(inputs, precision)


def test_golden_coefficients():
    (case,) = golden.cases("grl", lambda c: c.name == "coefficients")
    iterations = case.inputs(torch.float64)["iters"].tolist()

    def coefficient(config, iteration):
        layer = WarmStartGradientReverseLayer(**config)
        layer.iter_num = iteration
        x = torch.zeros((), dtype=torch.float64, requires_grad=True)
        return -torch.autograd.grad(layer(x), x)[0].item()

    table = [[coefficient(config, i) for i in iterations] for config in case.entry["configs"]]
    case.check("coeff", torch.tensor(table, dtype=torch.float64), torch.float64)


def test_golden_auto_step(precision):
    (case,) = golden.cases("grl", lambda c: c.name == "auto_step")
    inputs = case.inputs(precision)
    layer = WarmStartGradientReverseLayer(**case.ctor).eval()
    counts, grads = [], []
    for _ in range(15):
        x = inputs["x"].clone().requires_grad_()
        (layer(x) * inputs["grad_out"]).sum().backward()
        counts.append(layer.iter_num)
        grads.append(x.grad)
    case.check("iter_num_after", torch.tensor(counts), precision)
    case.check_grad("x_per_call", torch.stack(grads), precision)


def test_defaults_state_and_extremes():
    layer = WarmStartGradientReverseLayer()
    assert (layer.alpha, layer.lo, layer.hi, layer.max_iters, layer.auto_step) == (
        1.0,
        0.0,
        1.0,
        1000.0,
        False,
    )
    assert layer.state_dict() == {}
    layer.step()
    assert copy.deepcopy(layer).iter_num == 1
    # e^{-alpha i / N} overflows here.
    layer = WarmStartGradientReverseLayer(alpha=-1e6)
    layer.iter_num = 10_000
    x = torch.zeros(2, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="WarmStartGradientReverseLayer: max_iters must not be 0"):
        WarmStartGradientReverseLayer(max_iters=0)


def test_what_follows_may_write_in_place():
    x = torch.randn(3, 4, requires_grad=True)
    nn.ReLU(inplace=True)(GradientReverseLayer()(x, 0.5)).sum().backward()
    assert torch.equal(x.grad, -0.5 * (x > 0).float())


def test_transforms_and_higher_derivatives():
    x = torch.randn(3, 4)

    def loss(x):
        return GradientReverseFunction.apply(x, 0.5).pow(2).sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), -x)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), -x)
    double = torch.func.jacrev(torch.func.grad(loss))(x).reshape(12, 12)
    torch.testing.assert_close(double, 0.5 * torch.eye(12))


def test_compiles_once_for_all_steps():
    layer = WarmStartGradientReverseLayer(lo=0.1)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(layer, backend=count, fullgraph=True)
    for i in range(8):
        x = torch.randn(3, 4, requires_grad=True)
        y = compiled(x)
        layer.step()  # before the backward: the coefficient is that of the forward
        y.sum().backward()
        expected = 0.9 * math.tanh(0.5 * i / 1000.0) + 0.1
        torch.testing.assert_close(x.grad, torch.full_like(x, -expected))
        if i == 0:
            compiled_first = len(graphs)
    assert len(graphs) == compiled_first


def test_compiles_with_auto_step():
    layer = WarmStartGradientReverseLayer(max_iters=10, auto_step=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for i in range(3):
        x = torch.randn(3, 4, requires_grad=True)
        compiled(x).sum().backward()
        torch.testing.assert_close(x.grad, torch.full_like(x, -math.tanh(0.05 * i)))
    assert layer.iter_num == 3


def test_subclasses_of_the_function_as_for_tllib():
    class Doubled(GradientReverseFunction):
        @staticmethod
        def forward(ctx, input, coeff=1.0):
            return GradientReverseFunction.forward(ctx, input, 2 * coeff)

    x = torch.ones(3, requires_grad=True)
    Doubled.apply(x, 0.5).sum().backward()
    torch.testing.assert_close(x.grad, -torch.ones(3))
    x.grad = None
    GradientReverseFunction.apply(x).sum().backward()
    torch.testing.assert_close(x.grad, -torch.ones(3))
