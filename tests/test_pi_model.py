"""Consistency losses of the Pi model."""

import math

import pytest
import torch

from tests import golden
from tests.on_device import EMULATED
from tllib_rs.self_training.pi_model import ConsistencyLoss, L2ConsistencyLoss, sigmoid_warm_up

#: The distances that the manifest describes in words.
DISTANCES = {
    "(p1 - p2).abs().sum(dim=1)": lambda p1, p2: (p1 - p2).abs().sum(dim=1),
    "(p2 * (log p2 - log p1)).sum(dim=1)": lambda p1, p2: (p2 * (p2.log() - p1.log())).sum(dim=1),
    "(p1 - p2) ** 2, shape (N, C)": lambda p1, p2: (p1 - p2) ** 2,
}


@pytest.mark.parametrize("case", golden.cases("pi_model", lambda c: "p1" in c.entry["inputs"]), ids=repr)
def test_golden(case, precision):
    inputs = case.requires_grad(case.inputs(precision))
    arguments = dict(case.ctor)
    if case.name == "l2_reduction_other":
        # tllib takes any unknown name for 'none'; here it is an error, and 'none' gives its values.
        with pytest.raises(ValueError, match="reduction must be 'none', 'mean' or 'sum', got \"batchmean\""):
            L2ConsistencyLoss(**arguments)
        arguments["reduction"] = "none"
    if "distance_measure" in arguments:
        arguments["distance_measure"] = DISTANCES[arguments["distance_measure"]]
        criterion = ConsistencyLoss(**arguments)
    else:
        criterion = L2ConsistencyLoss(**arguments)
    mask = {"mask": inputs["mask"]} if "mask" in inputs else {}
    loss = criterion(inputs["p1"], inputs["p2"], **mask)
    case.backward(loss, inputs, precision)
    case.check("loss", loss, precision)
    case.check_grads(inputs, precision)


def test_golden_warm_up():
    (case,) = golden.cases("pi_model", lambda c: c.name == "sigmoid_warm_up_table")
    inputs = case.inputs(torch.float64)
    lengths = inputs["warm_up_epochs"].tolist()
    table = [[sigmoid_warm_up(epoch, length) for length in lengths] for epoch in inputs["epochs"].tolist()]
    case.check("table", torch.tensor(table, dtype=torch.float64), torch.float64)
    table = [[sigmoid_warm_up(epoch, length) for length in lengths] for epoch in range(101)]
    case.check("table_int", torch.tensor(table, dtype=torch.float64), torch.float64)


def test_warm_up_is_a_float_and_refuses_negative_lengths():
    assert type(sigmoid_warm_up(3, 7)) is float
    assert math.isnan(sigmoid_warm_up(math.nan, 7))
    for error in (AssertionError, ValueError):  # the first as in tllib
        with pytest.raises(error, match="warm_up_epochs must be at least 0, got -1"):
            sigmoid_warm_up(0, -1)


@pytest.mark.parametrize(
    ("p1", "p2", "mask", "error", "message"),
    [
        ([1.0], torch.zeros(2, 3), 1.0, TypeError, "L2ConsistencyLoss: p1 must be a torch.Tensor, got list"),
        (torch.zeros(2, 3), None, 1.0, TypeError, "p2 must be a torch.Tensor, got NoneType"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3), 1.0, TypeError, r"p1 must be float32, .*, got int64"),
        (torch.zeros(3), torch.zeros(3), 1.0, ValueError, r"p1 must have shape \(minibatch, C, ...\)"),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 4),
            1.0,
            ValueError,
            r"p2 must have the shape of p1, \[2, 3\], got shape \[2, 4\]",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 3),
            torch.ones(3),
            ValueError,
            r"mask must broadcast to the shape of the rows, \[2\], got shape \[3\]",
        ),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 1), ValueError, r"got shape \[2, 1\]"),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 3),
            "1",
            TypeError,
            "mask must be a torch.Tensor or a number, got str",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 3),
            torch.ones(2, dtype=torch.complex64),
            TypeError,
            "mask must hold real numbers or booleans, got a complex dtype",
        ),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), 1.0, RuntimeError, "p2 must be on the device"),
    ],
)
def test_bad_inputs(p1, p2, mask, error, message):
    with pytest.raises(error, match=message):
        L2ConsistencyLoss()(p1, p2, mask)


@pytest.mark.parametrize("layout", [torch.clone, lambda x: x.t().contiguous().t()], ids=["rows", "columns"])
@pytest.mark.parametrize("difference", [1e-3, 200, 511, 512, 30_000])
def test_float16_gradients_of_large_differences(difference, layout):
    if EMULATED and difference > 500:
        pytest.skip("kernels of a device do not know the differences when they scale")
    p1, p2 = torch.zeros(2, 40, 8, dtype=torch.float16)
    p2[:, 0] = difference
    p1, p2 = layout(p1).requires_grad_(), layout(p2).requires_grad_()
    mask = torch.linspace(0, 1, 40)
    loss = L2ConsistencyLoss()(p1, p2, mask)
    torch.testing.assert_close(loss.item(), (p2[:, 0].double().square() * mask.double()).mean().item())
    for grad, sign in zip(torch.autograd.grad(loss, (p1, p2)), (-1, 1), strict=True):
        expected = (sign * 2 / 40 * p2[:, 0].double() * mask.double()).half()
        torch.testing.assert_close(grad[:, 0], expected, rtol=1e-3, atol=1e-7)
        assert grad[:, 1:].eq(0).all()


@pytest.mark.parametrize(
    "mask", [1.0, torch.rand(6), torch.rand(6).half(), torch.rand(6) > 0.5, torch.tensor(0.5)]
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_compiled_half_types_are_rounded_once(dtype, reduction, mask):
    torch._dynamo.reset()
    p1, p2 = 200 * torch.rand(2, 6, 4).to(dtype)
    loss = L2ConsistencyLoss(reduction)
    expected = loss(p1, p2, mask)
    got = torch.compile(loss, backend="aot_eager", fullgraph=True)(p1, p2, mask)
    torch.testing.assert_close(got, expected, rtol=1e-6 if expected.dtype == torch.float32 else 0.0, atol=0.0)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("rows", [32, 48, 100])
def test_float16_gradients_of_small_differences(rows, soft, generator):
    logits = torch.randn(rows, 31, generator=generator)
    p1 = logits.softmax(dim=1).half()
    p2 = (logits + 0.02 * torch.randn(rows, 31, generator=generator)).softmax(dim=1).half().requires_grad_()
    mask = torch.rand(rows, generator=generator).square() if soft else torch.ones(rows)
    (2.0**15 * L2ConsistencyLoss()(p1, p2, mask)).backward()
    exact = 2.0**16 / rows * mask[:, None].double() * (p2.detach().double() - p1.double())
    close = (p2.grad.double() - exact).abs() <= 0.01 * exact.abs()
    assert close.double().mean() >= (0.9 if soft else 0.98)


def test_bad_arguments():
    for make in (L2ConsistencyLoss, lambda reduction: ConsistencyLoss(torch.sub, reduction)):
        with pytest.raises(ValueError, match="ConsistencyLoss: reduction must be 'none', 'mean' or 'sum'"):
            make("avg")
        with pytest.raises(TypeError, match="ConsistencyLoss: reduction must be a str, got int"):
            make(1)
        loss = make("mean")
        loss.reduction = "avg"
        for call in (loss, torch.compile(loss, backend="eager")):
            with pytest.raises(ValueError, match="reduction must be"):
                call(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(TypeError, match="ConsistencyLoss: distance_measure must be callable, got str"):
        ConsistencyLoss("l2")


@pytest.mark.parametrize("reduction", ["none", None, "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.int64, torch.float16, torch.float64])
def test_types_promote_as_in_the_formula(reduction, dtype, mask_dtype):
    p1, p2 = torch.rand(5, 3).to(dtype), torch.rand(5, 3).to(dtype)
    mask = 0.5 if mask_dtype is None else (torch.arange(5) % 2).to(mask_dtype)
    got = L2ConsistencyLoss(reduction)(p1, p2, mask)
    rows = ((p1 - p2) ** 2).sum(dim=1) * mask
    expected = {"mean": rows.mean, "sum": rows.sum}.get(reduction, lambda: rows)()
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("mask", [torch.tensor(0.3), torch.tensor([0.3]), torch.rand(4), torch.rand(8)[::2]])
def test_mask_of_any_layout_gets_its_gradient(mask):
    p1, p2 = torch.rand(4, 3, requires_grad=True), torch.rand(3, 4).t().requires_grad_()
    mask = mask.clone().requires_grad_() if mask.dim() != 1 or len(mask) != 4 else mask.requires_grad_()
    L2ConsistencyLoss()(p1, p2, mask).backward()
    got = (p1.grad, p2.grad, mask.grad)
    expected = torch.autograd.grad((((p1 - p2) ** 2).sum(dim=1) * mask).mean(), (p1, p2, mask))
    torch.testing.assert_close(got, expected)


def test_more_dimensions_and_empty_batches():
    p1, p2 = torch.rand(2, 3, 4, 5, requires_grad=True), torch.rand(2, 3, 4, 5)
    loss = L2ConsistencyLoss("sum")(p1, p2, torch.ones(5))
    torch.testing.assert_close(loss, (p1 - p2).pow(2).sum())
    empty = torch.zeros(0, 3, requires_grad=True)
    assert L2ConsistencyLoss()(empty, empty.detach()).isnan()
    assert L2ConsistencyLoss("sum")(empty, empty.detach()) == 0
    assert L2ConsistencyLoss("none")(empty, empty.detach(), torch.ones(0)).shape == (0,)
    no_classes = torch.zeros(3, 0, requires_grad=True)
    loss = L2ConsistencyLoss()(no_classes, no_classes.detach(), torch.ones(3))
    loss.backward()
    assert loss == 0
    assert no_classes.grad.shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 3, 7, 40])
@pytest.mark.parametrize("transposed", [False, True])
def test_an_incoming_gradient_for_each_row(transposed, width, dtype):
    # As many rows as several groups of them, an incoming gradient with a stride, and one of no elements.
    for rows in (1100, 0):
        p1, p2 = (torch.rand(rows, width).to(dtype) for _ in range(2))
        if transposed:
            p1, p2 = (p.T.contiguous().T for p in (p1, p2))
        incoming = torch.rand(2 * rows).to(dtype)[::2]
        expected = 2 * (p1.double() - p2.double()) * incoming.double().unsqueeze(1)
        for wanted in ((True, True), (True, False), (False, True)):
            given = [p.detach().requires_grad_(want) for p, want in zip((p1, p2), wanted, strict=True)]
            inputs = [p for p in given if p.requires_grad]
            values = [value for value, want in zip((expected, -expected), wanted, strict=True) if want]
            losses = L2ConsistencyLoss("none")(*given)
            for kept in (True, False):
                got = torch.autograd.grad(losses, inputs, incoming, retain_graph=kept)
                # The stored gradient is rounded once before it is multiplied, and once after.
                for grad, value in zip(got, values, strict=True):
                    torch.testing.assert_close(
                        grad.double(), value, rtol=2 * torch.finfo(dtype).eps, atol=1e-7
                    )


def test_small_float16_gradients_survive_a_large_mean():
    p1 = torch.full((65_536, 2), 0.5, dtype=torch.float16, requires_grad=True)
    L2ConsistencyLoss()(p1, p1.detach() - 0.25).backward(torch.tensor(1024.0, dtype=torch.float16))
    torch.testing.assert_close(p1.grad, torch.full_like(p1, 1024 * 2 * 0.25 / 65_536))


def test_an_assigned_measure_is_taken(generator):
    loss, p = L2ConsistencyLoss(), torch.rand(2, 5, 3, generator=generator)
    loss.distance_measure = lambda p1, p2: (p1 - p2).abs().sum(dim=1)
    torch.testing.assert_close(loss(*p), (p[0] - p[1]).abs().sum(dim=1).mean())


def test_compiled_refuses_what_eager_refuses(generator):
    compiled = torch.compile(L2ConsistencyLoss(), backend="aot_eager")
    for other in ((1, 3), (5,), (5, 3, 2)):
        with pytest.raises(Exception, match="L2ConsistencyLoss: p2 must"):
            compiled(torch.rand(5, 3, generator=generator), torch.rand(other, generator=generator))
