"""Class balance."""

import pickle
import re

import pytest
import torch
from torch.nn import functional as F

from tests import golden
from tests.plain.self_ensemble import class_balance as plain
from tllib_rs.self_training.self_ensemble import ClassBalanceLoss


@pytest.mark.parametrize("case", golden.cases("self_ensemble"), ids=repr)
def test_golden(case, precision):
    inputs = case.inputs(precision)
    loss = ClassBalanceLoss(**case.ctor)
    if case.raises:
        # tllib raises RuntimeError for means outside [0, 1]; bad values are ValueError throughout here.
        with pytest.raises(ValueError, match="ClassBalanceLoss: p must "):
            loss(inputs["p"])
        return
    case.requires_grad(inputs)
    value = loss(inputs["p"])
    case.backward(value, inputs, precision)
    case.check("loss", value, precision)
    case.check_grads(inputs, precision)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([[1.0, 0.0]], TypeError, "ClassBalanceLoss: p must be a torch.Tensor, got list"),
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "p must be float32, .* got int64"),
        (torch.zeros(3), ValueError, r"p must have shape \(minibatch, C\) with C > 0, got shape \[3\]"),
        (torch.zeros(2, 4), ValueError, r"p must have shape \(minibatch, 3\), got shape \[2, 4\]"),
        (torch.full((2, 3), -0.1), ValueError, r"column means in \[0, 1\], got a mean of -0.1"),
        (torch.full((2, 3), 1.5), ValueError, r"got a mean of 1.5 in shape \[2, 3\]"),
    ],
)
def test_bad_probabilities(bad, error, message):
    with pytest.raises(error, match=message):
        ClassBalanceLoss(3)(bad)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (0, ValueError, "ClassBalanceLoss: num_classes must be above 0, got 0"),
        (2.5, TypeError, "num_classes must be an integer, got float"),
        ("3", TypeError, "num_classes must be an integer, got str"),
    ],
)
def test_bad_num_classes(bad, error, message):
    with pytest.raises(error, match=message):
        ClassBalanceLoss(bad)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 7), (257, 2), (300, 3), (13, 131), (5, 1009)])
@pytest.mark.parametrize("layout", ["plain", "transposed", "strided"])
def test_shapes_and_strides(shape, layout, generator):
    rows, cols = shape
    base = torch.rand(2 * rows + 1, 2 * cols + 1, generator=generator, dtype=torch.float64) / 2
    p = base[:rows, :cols].contiguous()
    if layout == "transposed":
        p = p.T.contiguous().T
    elif layout == "strided":
        p = base[1 : 2 * rows + 1 : 2, 1 : 2 * cols + 1 : 2]
    if cols == 1:
        p = p.clone().clamp(0.1, 0.9)
    ours, theirs = (p.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    loss, expected = ClassBalanceLoss(cols)(ours), plain(theirs, cols)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_that_tllib_refuses(dtype, generator):
    p = torch.rand(33, 5, generator=generator, dtype=torch.float64).to(dtype)
    ours, exact = p.clone().requires_grad_(), p.double().requires_grad_()
    loss, expected = ClassBalanceLoss(5)(ours), plain(exact, 5)
    assert loss.dtype == dtype
    loss.backward()
    expected.backward()
    epsilon = max(torch.finfo(dtype).eps, 1e-12)
    assert abs(loss.double() - expected) <= epsilon * expected
    assert (ours.grad.double() - exact.grad).abs().max() <= epsilon * exact.grad.abs().max()


def test_nan_and_empty_batches_give_nan():
    p = torch.tensor([[0.5, float("nan")], [0.5, 0.5]], requires_grad=True)
    loss = ClassBalanceLoss(2)(p)
    loss.backward()
    assert loss.isnan()
    assert p.grad[:, 1].isnan().all()
    assert p.grad[:, 0].eq(0).all()
    assert ClassBalanceLoss(3)(torch.zeros(0, 3)).isnan()


@pytest.mark.parametrize("columns", [(0.3, 0.7), (0.0, 1.0), (1e-13, 0.5), (1.0, 0.0)])
def test_composite_has_the_same_clamps(columns):
    """The composite serves torch.func and second derivatives."""
    p = torch.tensor([columns, columns], dtype=torch.float64)
    loss = ClassBalanceLoss(2)
    fused, leaf = torch.func.grad_and_value(loss)(p)[::-1], p.clone().requires_grad_()
    value = loss(leaf)
    (grad,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(fused[0], value.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(fused[1], grad, rtol=1e-9, atol=0)


def test_composite_gives_nan_where_it_cannot_raise():
    p = torch.tensor([[1.5, 0.5]], dtype=torch.float64)
    grad, value = torch.func.grad_and_value(ClassBalanceLoss(2))(p)
    assert value.isnan()
    assert grad[0, 0].isnan()


def test_second_derivatives(generator):
    p = torch.rand(3, 4, generator=generator, dtype=torch.float64) / 2 + 0.2
    loss = ClassBalanceLoss(4)
    assert torch.autograd.gradcheck(loss, p.requires_grad_())
    assert torch.autograd.gradgradcheck(loss, p)


def test_large_batch_in_float32(generator):
    p = torch.rand(65_536, 3, generator=generator)
    p /= p.sum(dim=1, keepdim=True)
    ours, exact = p.clone().requires_grad_(), p.double().requires_grad_()
    loss, expected = ClassBalanceLoss(3)(ours), plain(exact, 3)
    loss.backward()
    expected.backward()
    assert abs(loss.double() - expected) <= 2e-6 * expected
    assert (ours.grad.double() - exact.grad).abs().max() <= 2e-6 * exact.grad.abs().max()


def test_state_is_empty_and_the_target_uniform():
    loss = ClassBalanceLoss(4)
    assert not loss.state_dict()
    assert loss.uniform_distribution.eq(0.25).all()
    assert repr(loss) == "ClassBalanceLoss(num_classes=4)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_prior_of_one_s_own(dtype, generator):
    p = torch.rand(9, 4, generator=generator).softmax(dim=1).to(dtype).requires_grad_()
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4])
    loss = ClassBalanceLoss(4)
    loss.uniform_distribution = prior
    assert loss.uniform_distribution is prior
    value = loss(p)
    exact = p.detach().double().requires_grad_()
    expected = F.binary_cross_entropy(exact.mean(dim=0), prior.double())
    rounding = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-7
    assert value.dtype == dtype
    assert abs(value.double() - expected) <= 2 * rounding * expected
    (got,), (want,) = torch.autograd.grad(value, p), torch.autograd.grad(expected, exact)
    assert (got.double() - want).abs().max() <= 4 * rounding * want.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(p).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(pickle.loads(pickle.dumps(loss))(p), value)
    with pytest.raises(ValueError, match=r"p must have shape \(minibatch, 4\)"):
        loss(p[:, :3])
    prior.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert abs(loss(p).double() - F.binary_cross_entropy(exact.mean(dim=0), prior.double())) <= 2 * rounding


@pytest.mark.parametrize("compiled", [False, True])
def test_a_prior_of_one_s_own_where_means_are_0_and_1(compiled):
    """As in torch's binary cross entropy, and ours against the uniform prior: finite."""
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4], requires_grad=True)
    loss = ClassBalanceLoss(4)
    loss.uniform_distribution = prior
    p = torch.tensor([200.0, 0, 0, 0]).softmax(dim=0).expand(3, 4).clone().requires_grad_()
    value = (torch.compile(loss, backend="aot_eager") if compiled else loss)(p)
    expected = F.binary_cross_entropy(p.mean(dim=0), prior)
    torch.testing.assert_close(value, expected)
    with torch.autograd.set_detect_anomaly(True):
        loss(p).backward()
    inputs = (p, prior)
    torch.testing.assert_close(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs))


def refuse_alike(own, bad):
    with pytest.raises((TypeError, ValueError)) as expected:
        ClassBalanceLoss(4)(bad)
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        own(bad)


def test_mean_above_1_and_a_prior_of_one_s_own():
    own = ClassBalanceLoss(4)
    own.uniform_distribution = torch.tensor([0.1, 0.2, 0.3, 0.4])
    refuse_alike(own, torch.full((2, 4), 1.5))


def test_what_a_prior_of_one_s_own_refuses():
    own = ClassBalanceLoss(4)
    own.uniform_distribution = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for bad in (torch.ones(2, 4, dtype=torch.int64), [[0.25] * 4]):
        refuse_alike(own, bad)
    for nothing in (torch.empty(0, 4), torch.full((2, 4), float("nan"))):
        assert own(nothing).isnan()


@pytest.mark.parametrize(
    ("prior", "error", "message"),
    [
        (0.25, TypeError, "uniform_distribution must be a tensor, got float"),
        (torch.ones(3), ValueError, r"uniform_distribution must have shape \[4\], got shape \[3\]"),
        (torch.tensor([0.5, 0.6, 0.0, -0.1]), ValueError, "uniform_distribution must hold probabilities"),
    ],
)
def test_bad_priors(prior, error, message):
    loss = ClassBalanceLoss(4)
    with pytest.raises(error, match=message):
        loss.uniform_distribution = prior
    assert loss.uniform_distribution.eq(0.25).all()
