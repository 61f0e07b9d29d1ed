"""Consistency of class confusion."""

import pytest
import torch

from tests import golden
from tests.plain.cc_loss import cc_loss as plain
from tllib_rs import _core
from tllib_rs.self_training.cc_loss import CCConsistency


@pytest.mark.parametrize("case", golden.cases("cc_loss"), ids=repr)
def test_golden(case, precision):
    inputs = case.requires_grad(case.inputs(precision))
    loss, fraction = CCConsistency(**case.ctor)(inputs["logits"], inputs["logits_strong"])
    if "python_int" in case.flags:
        assert type(loss) is int
        assert type(fraction) is int
    else:
        case.backward(loss, inputs, precision)
        assert fraction.dtype == torch.float32
    case.check("loss", loss, precision)
    case.check("selected_fraction", fraction, precision)
    case.check_grads(inputs, precision)
    if case.name.startswith("large80"):
        # tllib: 0/0 = NaN in float32 where a probability underflows. Ours is what float64 gives.
        assert loss.isfinite()
        assert inputs["logits_strong"].grad.isfinite().all()


def test_default_threshold():
    assert CCConsistency(1.0).thr == 0.7
    assert repr(CCConsistency(2.0)) == "CCConsistency(temperature=2.0, thr=0.7)"
    assert not CCConsistency(2.0).state_dict()


MATRIX = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("logits", "strong", "error", "message"),
    [
        ([[1.0]], MATRIX, TypeError, "CCConsistency: logits must be a torch.Tensor, got list"),
        (MATRIX, None, TypeError, "CCConsistency: logits_strong must be a torch.Tensor, got NoneType"),
        (MATRIX.long(), MATRIX, TypeError, "logits must be float32, .* got int64"),
        (MATRIX, MATRIX.bool(), TypeError, "logits_strong must be float32, .* got bool"),
        (torch.zeros(3), MATRIX, ValueError, r"logits must have shape \(minibatch, C\) .* got shape \[3\]"),
        (torch.zeros(2, 0), torch.zeros(2, 0), ValueError, r"got shape \[2, 0\]"),
        (MATRIX, torch.zeros(3, 3), ValueError, r"have the shape of logits, \[2, 3\], got shape \[3, 3\]"),
        (MATRIX, MATRIX.to("meta"), RuntimeError, "logits_strong must be on the device of logits"),
    ],
)
def test_bad_logits(logits, strong, error, message):
    with pytest.raises(error, match=message):
        CCConsistency(1.0)(logits, strong)


def test_bad_arguments():
    for temperature in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="CCConsistency: temperature must be a finite number above 0"):
            CCConsistency(temperature)
    with pytest.raises(TypeError, match="temperature must be a number, got str"):
        CCConsistency("1")
    with pytest.raises(ValueError, match="CCConsistency: thr must be a number, got NaN"):
        CCConsistency(1.0, float("nan"))
    loss = CCConsistency(1.0)
    loss.temperature = 0.0
    with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
        loss(MATRIX, MATRIX)


def _middle(weak, temperature):
    """A threshold between the confidences of a batch, equal to none of them."""
    ordered = (weak / temperature).softmax(dim=1).amax(dim=1).sort().values
    return ordered[(len(ordered) - 1) // 2 :][:2].mean().item() if len(ordered) > 1 else 0.0


def _compare(weak, strong, temperature, thr, rtol=1e-10):
    ours, theirs = strong.clone().requires_grad_(), strong.to(torch.float64, copy=True).requires_grad_()
    loss, fraction = CCConsistency(temperature, thr)(weak, ours)
    expected, expected_fraction = plain(weak.double(), theirs, temperature, thr)
    (3 * loss).backward()
    (3 * expected).backward()
    assert fraction == expected_fraction
    assert abs(loss.double() - expected) <= rtol * expected
    assert (ours.grad.double() - theirs.grad).abs().max() <= rtol * theirs.grad.abs().max()


# Few rows of many classes avoid the C x C matrix, many rows of few classes form it; the last ones use
# libtorch's products.
@pytest.mark.parametrize(
    "shape",
    [(1, 2), (13, 7), (257, 5), (5, 23), (7, 29), (11, 307), (2, 1009), (3, 1), (300, 80), (40, 700)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_shapes_through_and_around_the_matrix(shape, dtype, generator):
    weak, strong = (2 * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    if shape[1] == 1:
        # One class: both matrices are 1, whatever the logits.
        strong.requires_grad_()
        loss, _ = CCConsistency(1.0)(weak, strong)
        loss.backward()
        assert loss == 0
        assert strong.grad.eq(0).all()
        return
    for thr in (0.0, _middle(weak, 1.0)):
        rtol = 1e-10 if dtype == torch.float64 else 2e-6
        _compare(weak, strong, 1.0, thr, rtol)


# The last two use libtorch's products.
@pytest.mark.parametrize("shape", [(400, 53), (500, 130), (70, 900)])
def test_products_in_float32_are_no_worse_than_those_of_the_plain_formula(shape, generator):
    weak, strong = (2 * torch.randn(shape, generator=generator) for _ in range(2))
    leaves = [x.requires_grad_() for x in (strong.clone(), strong.clone(), strong.double())]
    ours, single, exact = (
        CCConsistency(1.0, 0.0)(weak, leaves[0])[0],
        plain(weak, leaves[1], 1.0, 0.0)[0],
        plain(weak.double(), leaves[2], 1.0, 0.0)[0],
    )
    torch.autograd.backward([ours, single, exact])
    grads = [x.grad.double() for x in leaves]
    for value, other, reference in ((ours, single, exact), grads):
        scale = reference.abs().max()
        error, theirs = (value - reference).abs().max() / scale, (other - reference).abs().max() / scale
        assert error <= max(4 * theirs, 2e-6)


@pytest.mark.parametrize("shape", [(9, 5), (3, 41)])
def test_near_predictions_keep_their_digits(shape, generator):
    """As many as the plain formula in float64 keeps."""
    weak = torch.randn(shape, generator=generator, dtype=torch.float64)
    strong = weak + 1e-6 * torch.randn(shape, generator=generator, dtype=torch.float64)
    loss, _ = CCConsistency(1.0, 0.0)(weak, strong)
    # The plain formula has 10 of 16 digits left in each entry of the difference.
    torch.testing.assert_close(loss, plain(weak, strong, 1.0, 0.0)[0], rtol=1e-8, atol=0)
    assert loss > 0
    assert CCConsistency(1.0, 0.0)(weak, weak)[0] == 0


def test_strides(generator):
    base = 2 * torch.randn(2, 22, 26, generator=generator, dtype=torch.float64)
    weak, strong = base[0, ::2, 1::2], base[1].T[:13, :11].T
    ours, theirs = strong.detach().requires_grad_(), strong.clone().contiguous().requires_grad_()
    loss, _ = CCConsistency(1.0, 0.3)(weak, ours)
    expected, _ = CCConsistency(1.0, 0.3)(weak.contiguous(), theirs)
    loss.backward()
    expected.backward()
    assert loss == expected
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 5), (31, 10), (3, 41)])
def test_half_types(dtype, shape, generator):
    weak, strong = (2 * torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    ours, exact = strong.clone().requires_grad_(), strong.double().requires_grad_()
    loss, _ = CCConsistency(1.0, 0.0)(weak, ours)
    expected, _ = plain(weak.double(), exact, 1.0, 0.0)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.double() - expected) <= 2e-6 * expected
    assert (ours.grad.double() - exact.grad).abs().max() <= torch.finfo(dtype).eps * exact.grad.abs().max()


def test_nothing_selected_and_empty_batches_give_plain_zeros():
    strong = torch.zeros(2, 3, requires_grad=True)
    for outputs in (
        CCConsistency(1.0, 0.9)(torch.zeros(2, 3), strong),
        CCConsistency(1.0, 0.9)(torch.full((2, 3), float("nan")), strong),
        CCConsistency(1.0)(torch.zeros(0, 3), torch.zeros(0, 3)),
        CCConsistency(1.0, 0.9)(torch.zeros(2, 3, dtype=torch.float64), strong),
    ):
        assert outputs == (0, 0)
        assert [type(x) for x in outputs] == [int, int]


def test_nan_counts_in_selected_rows_only():
    nan = float("nan")
    weak = torch.tensor([[9.0, 0.0], [0.0, 0.0]])
    strong = torch.tensor([[1.0, 0.0], [nan, 0.0]], requires_grad=True)
    loss, fraction = CCConsistency(1.0)(weak, strong)
    loss.backward()
    assert loss.isfinite()
    assert fraction == 0.5
    assert strong.grad.isfinite().all()
    assert CCConsistency(1.0, 0.0)(weak, strong)[0].isnan()


def test_absent_classes_have_columns_of_zeros():
    weak = torch.tensor([[9e3, 0.0, -9e3], [0.0, 9e3, -9e3]])
    strong = torch.zeros(2, 3, requires_grad=True)
    loss, _ = CCConsistency(1.0)(weak, strong)
    loss.backward()
    # N is diag(1, 1, 0) and N' a third everywhere.
    assert loss.item() == pytest.approx((2 * (2 / 3) ** 2 + 7 / 9) / 3)
    assert strong.grad.isfinite().all()
    same = weak.clone().requires_grad_()
    CCConsistency(1.0)(weak, same)[0].backward()
    assert same.grad.eq(0).all()


@pytest.mark.parametrize("shape", [(9, 5), (3, 41)])
def test_composite_agrees(shape, generator):
    """The composite serves torch.func, other devices and second derivatives; it returns tensors."""
    weak, strong = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    loss = CCConsistency(2.0, _middle(weak, 2.0))
    grad, (value, fraction) = torch.func.grad_and_value(lambda s: loss(weak, s), has_aux=True)(strong)
    leaf = strong.clone().requires_grad_()
    expected, expected_fraction = loss(weak, leaf)
    expected.backward()
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    assert fraction == expected_fraction
    assert 0 < fraction < 1


@pytest.mark.parametrize("gap", [90.0, 95.0, 103.0, 110.0])
def test_classes_of_subnormal_probability(gap, generator):
    """Their sums have no reciprocal in float32."""
    weak, strong = torch.randn(2, 6, 4, generator=generator)
    weak[:, 3] -= gap
    strong[:, 3] -= gap
    loss, _ = CCConsistency(1.0, 0.0)(weak, strong.requires_grad_())
    loss.backward()
    assert loss.isfinite()
    assert strong.grad.isfinite().all()


@pytest.mark.parametrize("gap", [600.0, 660.0])
def test_classes_of_the_smallest_probabilities(gap, generator):
    """In float64 they have reciprocals."""
    weak, strong = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    weak[:, 3] -= gap
    strong[:, 3] -= gap
    strong.requires_grad_()
    got, expected = CCConsistency(1.0, 0.1)(weak, strong)[0], plain(weak, strong, 1.0, 0.1)[0]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    grads = (torch.autograd.grad(x, strong)[0] for x in (got, expected))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_composite_without_a_selected_row_is_zero():
    loss = CCConsistency(1.0)
    grad, value = torch.func.grad_and_value(lambda s: loss(torch.zeros(2, 3), s)[0])(torch.ones(2, 3))
    assert value == 0
    assert grad.eq(0).all()


def test_second_derivatives(generator):
    weak, strong = (2 * torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    strong.requires_grad_()
    loss = CCConsistency(1.0, 0.5)
    (first,) = torch.autograd.grad(loss(weak, strong)[0], strong, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), strong)
    other = strong.detach().requires_grad_()
    (first,) = torch.autograd.grad(plain(weak, other, 1.0, 0.5)[0], other, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), other)
    torch.testing.assert_close(second, expected, rtol=1e-9, atol=1e-14)


def test_second_derivatives_notice_a_change_of_the_weak_logits():
    weak, strong = torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2, requires_grad=True)
    loss, _ = CCConsistency(1.0)(weak, strong)
    weak.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation: CCConsistency's logits"):
        torch.autograd.grad(loss, strong, create_graph=True)


def test_compiled_returns_tensors(generator):
    weak, strong = (2 * torch.randn(9, 5, generator=generator) for _ in range(2))
    loss = CCConsistency(1.0, 0.3)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaf, other = strong.clone().requires_grad_(), strong.clone().requires_grad_()
    value, fraction = compiled(weak, leaf)
    expected, expected_fraction = loss(weak, other)
    value.backward()
    expected.backward()
    assert fraction == expected_fraction
    if _core.has_kernels("cpu"):
        assert value == expected
        assert torch.equal(leaf.grad, other.grad)
    else:  # The compiler has autograd differentiate the composite, which sums in another order.
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-8)
    value, fraction = torch.compile(CCConsistency(1.0, 1.1), fullgraph=True, backend="aot_eager")(weak, leaf)
    assert value == 0
    assert fraction == 0
