"""Entropy of predictions."""

import pytest
import torch

from tests import golden
from tests.plain.entropy import entropy as plain
from tllib_rs.modules.entropy import entropy


@pytest.mark.parametrize("case", golden.cases("entropy"), ids=repr)
def test_golden(case, precision):
    inputs = case.requires_grad(case.inputs(precision))
    h = entropy(inputs["predictions"], **case.ctor)
    case.backward(h, inputs, precision)
    case.check("h", h, precision)
    case.check_grads(inputs, precision)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([[0.5, 0.5]], TypeError, "entropy: predictions must be a torch.Tensor, got list"),
        (torch.ones(2, 3, dtype=torch.int64), TypeError, "must be float32, float64, .* got int64"),
        (torch.ones(3), ValueError, r"must have shape \(minibatch, C, \.\.\.\), got shape \[3\]"),
    ],
)
def test_bad_predictions(bad, error, message):
    with pytest.raises(error, match=message):
        entropy(bad)


def test_reductions_that_return_rows(generator):
    p = torch.rand(3, 4, generator=generator).softmax(dim=1)
    for call in (entropy, torch.compile(entropy, backend="eager")):
        for reduction in (None, "sum"):
            assert torch.equal(call(p, reduction), entropy(p, "none"))


def test_bad_reduction():
    with pytest.raises(TypeError, match="entropy: reduction must be a str, got int"):
        entropy(torch.rand(3, 4), 3)
    with pytest.raises(ValueError, match="entropy: reduction must be 'none', 'mean' or 'sum'"):
        entropy(torch.ones(2, 3), "average")


def test_default_is_one_entropy_a_row():
    assert entropy(torch.ones(2, 3)).shape == (2,)
    assert entropy(torch.ones(2, 3, 4, 5)).shape == (2, 4, 5)
    assert entropy(torch.ones(0, 3)).shape == (0,)
    assert entropy(torch.ones(0, 3), "mean").isnan()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep", [True, False])
def test_incoming_gradients_of_rows(dtype, keep, generator):
    p = torch.rand(6, 300, generator=generator, dtype=torch.float64).softmax(1).to(dtype).requires_grad_()
    # Every other number of a larger tensor, one number for all rows, and ones.
    for incoming in (
        torch.randn(12, generator=generator).to(dtype)[::2],
        torch.tensor(0.37, dtype=dtype).expand(6),
        torch.ones(6, dtype=dtype),
    ):
        (got,) = torch.autograd.grad(entropy(p), p, incoming, retain_graph=keep)
        exact = p.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(plain(exact), exact, incoming.double())
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
        assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max()
