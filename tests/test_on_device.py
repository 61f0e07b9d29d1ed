"""The fused CUDA kernels: every form of each, in every element type, judged like the kernels of the CPU."""

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.losses import LOSSES
from tests.on_device import (
    DEVICE,
    EMULATED,
    KERNELS,
    ROUNDING,
    gpu,
    inductor,
    kernels,
    never_waiting,
    occupy,
    on_cpu,
    placed,
    somewhere,
)
from tests.test_losses import assert_agree, leaves, run
from tllib_rs.modules.entropy import entropy
from tllib_rs.self_training.dst import WorstCaseEstimationLoss
from tllib_rs.self_training.pi_model import L2ConsistencyLoss
from tllib_rs.self_training.pseudo_label import ConfidenceBasedSelfTrainingLoss
from tllib_rs.vision.models.reid.loss import CrossEntropyLossWithLabelSmooth

pytestmark = somewhere
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)

#: One for each form of a kernel over rows, and a batch with more rows than a grid has blocks.
SHAPES = [(9, 100), (300, 7), (8, 200), (7, 345), (6, 1000), (5, 1500), (4, 3000), (3, 5003)]
#: The same for the grid of a GPU, which holds a row for each warp of thousands of blocks.
LARGE_SHAPES = [(40_000, 7), (20_000, 100), (12_000, 200), (9_000, 345),
                (6_000, 1000), (3_000, 1500), (2_000, 3000), (1_500, 5003)]  # fmt: skip
every_form = pytest.mark.parametrize("shape", SHAPES, ids=str)
#: Losses that are means over rows of logits.
LOGITS = ("uda", "pseudo_label", "reid_cross_entropy", "label_smooth", "dst")


def made(loss, generator, dtype, *shape):
    """The inputs, rounded to ``dtype``: in float64 on the CPU, and in ``dtype`` on the device."""
    held = [x.to(dtype) if x.is_floating_point() else x for x in loss.inputs(generator, *shape)]
    exact = leaves(loss, [x.double() if x.is_floating_point() else x for x in held])
    return exact, leaves(loss, [x.to(DEVICE) for x in held], dtype)


@every_loss
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@every_form
def test_every_form(loss, generator, dtype, shape):
    check_form(loss, generator, dtype, shape)


def of_pairs(loss):
    """Whether it looks at every pair of rows."""
    return "triplet" in loss.name or "pairwise" in loss.name


#: Losses whose gradient is 0 in rows that are not selected.
SELECTING = [loss for loss in LOSSES if loss.name in ("uda", "pseudo_label")]


@gpu
@pytest.mark.parametrize(
    ("loss", "dtype"),
    # Of thousands of rows in a half type, some are at the threshold after rounding and not before.
    [
        (x, t)
        for x in LOSSES
        for t in ROUNDING
        if not of_pairs(x) and (t == torch.float32 or x not in SELECTING)
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_every_form_in_turns(loss, generator, dtype, shape):
    check_form(loss, generator, dtype, shape)


def check_form(loss, generator, dtype, shape):
    exact, typed = made(loss, generator, dtype, *shape)
    expected = run(loss, loss.plain, exact)
    got = on_cpu(run(loss, loss.ours, typed))
    rounding = ROUNDING[dtype]
    if dtype == torch.float32:
        own = run(loss, loss.plain, leaves(loss, exact, dtype))
        pairs = zip([own[0], *own[1]], [expected[0], *expected[1]], strict=True)
        errors = [(a.double() - b).abs().max() / b.abs().max().clamp_min(1e-12) for a, b in pairs]
        rounding = max(rounding, 4 * float(max(errors)))
    value = rounding
    if dtype == torch.float32 and loss.name in ("triplet", "soft_triplet"):
        # A difference of distances, each of which is rounded to half a unit in its last place.
        largest = torch.cdist(exact[0].detach(), exact[-1].detach()).max()
        value = max(value, float(torch.finfo(dtype).eps * largest / expected[0].abs()))
    assert_agree((got[0], ()), (expected[0], ()), dtype, value)
    for mine, theirs in zip(got[1], expected[1], strict=True):
        assert_agree((mine, ()), (theirs, ()), dtype, rounding)


@every_loss
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_gradient_of_the_loss_itself(loss, generator, dtype):
    """It is the stored one, unchanged."""
    exact, typed = made(loss, generator, dtype, 9, 101)
    expected = run(loss, loss.plain, exact, weight=1.0)
    assert_agree(on_cpu(run(loss, loss.ours, typed, weight=1.0)), expected, dtype, 4 * ROUNDING[dtype])


#: So large that backward is told of such rows, emulated or not: rows of a multiple of 16 bytes, and others.
LARGE = [(700, 100), (700, 101)] if EMULATED else [(60_000, 100), (60_000, 101)]


@pytest.mark.parametrize("loss", SELECTING, ids=repr)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_gradients_that_are_zero_in_some_rows(loss, generator, dtype, shape):
    exact, typed = made(loss, generator, dtype, *shape)
    for weight in (1.0, 0.37):
        expected = run(loss, loss.plain, exact, weight)
        # A row at the threshold may be selected in one precision and not in the other.
        got = on_cpu(run(loss, loss.ours, typed, weight))
        zero = got[1][0].eq(0).all(dim=1)
        assert 0 < zero.sum() < shape[0]
        same = zero == expected[1][0].eq(0).all(dim=1)
        assert same.float().mean() > 0.98
        if same.all():
            assert_agree(got, expected, dtype, 4 * ROUNDING[dtype])
    # Whatever the incoming gradient is, the stored one is multiplied by it.
    _, (grad,) = on_cpu(run(loss, loss.ours, typed, weight=torch.inf))
    assert grad[zero].isnan().all()
    assert not grad[~zero].isfinite().any()


@every_form
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.name in LOGITS], ids=repr)
def test_logits_that_are_not_finite(loss, generator, shape):
    """What is NaN or infinite in the plain formulation is so here, row by row, at any place in the row."""
    inputs = [x.float() if x.is_floating_point() else x for x in loss.inputs(generator, *shape)]
    last = shape[1] - 1
    for x in (x for x in inputs if x.dim() == 2):
        x[0, last] = -torch.inf
        x[1, 0] = torch.inf
        x[2] = -torch.inf
    at = [(k, row) for k, x in enumerate(inputs) if x.dim() == 2 for row in range(3)]
    for k, row in at:
        one = [x[row : row + 1] if n == k else x[-1:] for n, x in enumerate(inputs)]
        expected = run(loss, loss.plain, leaves(loss, one, torch.float32))
        got = run(loss, loss.ours, leaves(loss, [x.to(DEVICE) for x in one], torch.float32))
        for a, b in zip([got[0], *got[1]], [expected[0], *expected[1]], strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-6, equal_nan=True)


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "one element in": lambda x: torch.cat([x[:, :1], x], dim=1)[:, 1:],
    "every second": lambda x: x.repeat_interleave(2, 0).repeat_interleave(2, 1)[1::2, 1::2],
    "one row": lambda x: x[:1].expand(x.shape),
}


@every_loss
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(9, 101), (3, 5003)], ids=str)
def test_layouts(loss, generator, layout, dtype, shape):
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in loss.inputs(generator, *shape)]
    views = [LAYOUTS[layout](x) if x.dim() == 2 else x for x in inputs]

    def of(tensors):
        for k, x in enumerate(tensors):
            x.requires_grad_(k not in loss.constant and x.is_floating_point())
        return run(loss, loss.ours, tensors)

    got, expected = of([placed(x) for x in views]), of([x.contiguous().to(DEVICE) for x in views])
    # Kernels do the same in every layout. libtorch may add in another order, which changes a float32 sum of n numbers
    # by up to sqrt(n) roundings, and so a number in a half type by a unit.
    kernel = KERNELS and loss.name != "pairwise_distances"
    another_order = max(2e-6, torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * shape[1] ** 0.5)
    assert_agree(got, expected, dtype, 2e-6 if kernel else another_order)


@every_loss
def test_graph_is_kept_and_gradients_add_up(loss, generator):
    _, inputs = made(loss, generator, torch.float32, 6, 9)
    wanted = [x for x in inputs if x.requires_grad]
    value = loss.first(loss.ours(*inputs)).sum()
    once = torch.autograd.grad(value, wanted, retain_graph=True)
    thrice = torch.autograd.grad(3 * value, wanted)
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


def levels(generator, shape):
    """Logits of a few values, so that many are the largest; and the first column with the largest."""
    z = torch.randint(0, 4, shape, generator=generator).float()
    return z, torch.tensor([row.index(max(row)) for row in z.tolist()])


@every_form
def test_pseudo_label_is_the_first_of_equals(shape, generator):
    targets, expected = levels(generator, shape)
    # A NaN makes all probabilities NaN: the first is the label, and the row is not confident.
    targets[-1, -1] = torch.nan
    expected[-1] = 0
    logits = torch.zeros(shape).to(DEVICE)
    _, mask, labels = ConfidenceBasedSelfTrainingLoss(0.0)(logits, targets.to(DEVICE))
    assert (mask.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert torch.equal(labels.cpu(), expected)
    assert mask.tolist() == [1.0] * (shape[0] - 1) + [0.0]


@every_form
def test_dst_predictions_are_the_first_of_equals(shape, generator):
    main, expected = levels(generator, shape)
    # The first NaN counts as the largest.
    main[-1, shape[1] // 2 :] = torch.nan
    expected[-1] = shape[1] // 2
    labeled, unlabeled = (torch.zeros(shape).to(DEVICE).requires_grad_() for _ in range(2))
    WorstCaseEstimationLoss(2.0)(main.to(DEVICE), labeled, main.to(DEVICE), unlabeled).backward()
    assert torch.equal((labeled.grad < 0).nonzero()[:, 1].cpu(), expected)
    assert torch.equal((unlabeled.grad > 0).nonzero()[:, 1].cpu(), expected)


def test_dst_of_different_numbers_of_classes(generator):
    inputs = [torch.randn(*shape, generator=generator) for shape in [(9, 7), (9, 7), (30, 345), (30, 345)]]
    (dst,) = (loss for loss in LOSSES if loss.name == "dst")
    expected = run(dst, dst.plain, leaves(dst, inputs))
    got = run(dst, dst.ours, leaves(dst, [x.to(DEVICE) for x in inputs], torch.float32))
    assert_agree(on_cpu(got), expected, torch.float32, 2e-6)


@kernels
@pytest.mark.parametrize("label", [-1, 7, -(2**40), 2**40])
def test_label_smooth_of_a_label_that_is_no_column(label, generator):
    """Checking for one would wait for the device. It is not read, and the loss is NaN."""
    z = torch.randn(6, 7, generator=generator).to(DEVICE).requires_grad_()
    labels = torch.tensor([0, 1, label, 3, 4, 5]).to(DEVICE)
    loss = CrossEntropyLossWithLabelSmooth(7)(z, labels)
    loss.backward()
    assert loss.isnan()
    assert z.grad.isnan().all(dim=1).tolist() == [False, False, True, False, False, False]
    assert z.grad.isnan().any(dim=1).sum() == 1


def test_label_smooth_of_strided_labels_and_labels_that_changed(generator):
    z = torch.randn(5, 4, generator=generator).to(DEVICE).requires_grad_()
    labels = torch.tensor([3, 1, 0, 2, 1]).to(DEVICE)
    strided = torch.stack((labels, labels - 9), dim=1)[:, 0]
    criterion = CrossEntropyLossWithLabelSmooth(4)
    loss = criterion(z, strided)
    torch.testing.assert_close(loss, criterion(z, labels))
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    assert grad.requires_grad
    loss = criterion(z, strided)
    strided.zero_()
    with pytest.raises(RuntimeError, match="inplace operation: CrossEntropyLossWithLabelSmooth's labels"):
        torch.autograd.grad(loss, z, create_graph=True)


@every_form
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mask", ["bool", "int64", "float16 with gradient", "one float64", "one on the CPU"])
def test_pi_model_with_masks_of_any_kind(shape, reduction, mask, generator):
    p1, p2 = (torch.rand(shape, generator=generator).to(DEVICE).requires_grad_() for _ in range(2))
    rows = torch.randint(0, 3, shape[:1], generator=generator)
    made = {
        "bool": rows.bool().to(DEVICE),
        "int64": placed(torch.stack((rows, rows), dim=1)[:, 0]),
        "float16 with gradient": rows.half().to(DEVICE).requires_grad_(),
        "one float64": torch.tensor(0.7, dtype=torch.float64, device=DEVICE),
        "one on the CPU": torch.tensor(0.7),
    }[mask]
    wanted = [x for x in (p1, p2, made) if x.requires_grad]

    def of(call, dtype):
        value = call(dtype)
        return value.detach().cpu(), [g.cpu() for g in torch.autograd.grad((0.37 * value).sum(), wanted)]

    def plain(dtype):
        each = ((p1.to(dtype) - p2.to(dtype)) ** 2).sum(dim=1) * made
        return each if reduction == "none" else each.mean()

    got = of(lambda _: L2ConsistencyLoss(reduction)(p1, p2, made), None)
    expected = of(plain, torch.float64)
    assert got[0].dtype == torch.float32
    assert [g.dtype for g in got[1]] == [x.dtype for x in wanted]
    assert_agree((got[0], got[1][:2]), (expected[0], expected[1][:2]), torch.float32, 2e-6)
    # A gradient in float16 is rounded to it once more, subnormal ones to multiples of 2^-24.
    for a, b in zip(got[1][2:], expected[1][2:], strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2**-10, atol=2**-24)


@gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_entropy_under_autocast(reduction, generator):
    p = torch.rand(6, 7, generator=generator).half().cuda()
    with torch.autocast("cuda"):
        h = -(p * torch.log(p + 1e-5)).sum(dim=1)
        got = entropy(p, reduction)
    assert got.dtype == h.dtype
    expected = h.mean() if reduction == "mean" else h
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


@gpu
@every_loss
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_never_waits_for_the_device(loss, generator, dtype):
    _, inputs = made(loss, generator, dtype, 64, 31)
    run(loss, loss.ours, inputs)  # compiles
    with never_waiting():
        run(loss, loss.ours, inputs)


#: One for each way that a loss and its backward pass are launched, also with rows that need no scaling.
CAPTURED = [
    (loss, shape, dtype)
    for loss in LOSSES
    for dtype in (torch.float32, torch.bfloat16)
    for shape in [(64, 31), (300, 345), (70, 1000), (5, 5003), *(LARGE[:1] if loss in SELECTING else [])]
]


@gpu
@pytest.mark.parametrize(("loss", "shape", "dtype"), CAPTURED, ids=str)
def test_captured_and_replayed(loss, shape, dtype, generator):
    _, inputs = made(loss, generator, dtype, *shape)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(loss, loss.ours, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(loss, loss.ours, inputs)
    _, others = made(loss, torch.Generator().manual_seed(7), dtype, *shape)
    with torch.no_grad():
        for x, other in zip(inputs, others, strict=True):
            x.copy_(other)
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    # A last digit: libtorch's products may be summed in another order in a graph.
    rounding = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert_agree(captured, run(loss, loss.ours, others), dtype, rounding)


#: Hundreds of blocks, so that kernels of several streams run together: a warp for each row, and a block.
at_once = pytest.mark.parametrize("shape", [(3000, 345), (3000, 5003)], ids=str)


@gpu
@every_loss
@at_once
def test_streams_of_their_own(loss, shape, generator):
    _, inputs = made(loss, generator, torch.float32, *shape)
    expected = run(loss, loss.ours, inputs)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]

    def turns():
        results = []
        for _ in range(4):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(run(loss, loss.ours, inputs))
        return results

    # Memory for each stream, and what a first call needs: getting it may wait for the device.
    turns()
    torch.cuda.synchronize()
    occupy(0.1, *streams)
    results = turns()
    assert not any(stream.query() for stream in streams), "the turns ran one after another"
    torch.cuda.synchronize()
    # Without kernels index_add_ sums the gradients of triplets, in no fixed order.
    rounding = 1e-6 if "triplet" in loss.name and not KERNELS else 0.0
    for result in results:
        assert_agree(result, expected, torch.float32, rounding)


@gpu
@pytest.mark.parametrize(
    "loss",
    # The products of graphs that are captured on one stream share libtorch's workspace.
    [loss for loss in LOSSES if not of_pairs(loss) and loss.name != "cc_loss"],
    ids=repr,
)
@at_once
def test_graphs_of_one_stream_replayed_on_two(loss, shape, generator):
    _, inputs = made(loss, generator, torch.float32, *shape)
    expected = run(loss, loss.ours, inputs)
    torch.cuda.synchronize()
    graphs, results = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph in graphs:
        with torch.cuda.graph(graph):
            results.append(run(loss, loss.ours, inputs))
        graph.replay()  # the first time it is copied to the device
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in graphs]
    occupy(0.1, *streams)
    for _ in range(4):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    assert not any(stream.query() for stream in streams), "the graphs ran one after another"
    torch.cuda.synchronize()
    for result in results:
        assert_agree(result, expected, torch.float32, 0.0)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NOT RUN: needs two GPUs")
@every_loss
def test_a_device_that_is_not_the_current_one(loss, generator):
    _, inputs = made(loss, generator, torch.float32, 64, 100)
    expected = run(loss, loss.ours, inputs)
    moved = [x.detach().to("cuda:1").requires_grad_(x.requires_grad) for x in inputs]
    with torch.cuda.device(0):
        got = run(loss, loss.ours, moved)
    assert got[0].device.index == 1
    assert_agree(on_cpu(got), on_cpu(expected), torch.float32, 1e-6)


@gpu
@every_loss
def test_a_thread_without_a_context(loss, generator):
    """Its first use of CUDA is a loss: torch makes a context current only in its own calls."""
    _, inputs = made(loss, generator, torch.float32, 64, 100)
    expected = run(loss, loss.ours, inputs)

    def alone():
        assert ctypes.CDLL("libcuda.so.1").cuCtxSetCurrent(None) == 0
        return run(loss, loss.ours, inputs)

    with ThreadPoolExecutor(1) as thread:
        got = thread.submit(alone).result()
    assert_agree(got, expected, torch.float32, 1e-6)


ANOTHER_CONTEXT = """
import ctypes
import torch
from tllib_rs.self_training.mcc import MinimumClassConfusionLoss

driver, loss = ctypes.CDLL("libcuda.so.1"), MinimumClassConfusionLoss(2.0)
y, side = torch.randn(40, 300, device="cuda"), torch.cuda.Stream()
expected = loss(y)
torch.cuda.synchronize()

def within(context):
    assert driver.cuCtxPushCurrent_v2(context) == 0
    try:
        value = loss(y)
        now = ctypes.c_void_p()
        assert driver.cuCtxGetCurrent(ctypes.byref(now)) == 0
        assert now.value == context.value, "another context was left behind"
        return value
    finally:
        assert driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())) == 0

device, context = ctypes.c_int(), ctypes.c_void_p()
assert driver.cuDeviceGet(ctypes.byref(device), 0) == 0
assert driver.cuCtxCreate_v2(ctypes.byref(context), 0, device) == 0
assert driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())) == 0
with torch.cuda.stream(side):
    loss(y)  # what it frees serves the next call: torch would allocate in the context that is current
    value = within(context)
torch.cuda.synchronize()
print(torch.equal(value, expected))
try:
    within(context)
except RuntimeError as error:
    print(error)
"""


@kernels
@gpu
def test_another_context_of_the_device():
    """A stream of torch's works there. The context's default stream cannot be told from torch's: it is
    refused. In a process of its own: torch is not made for this."""
    command = [sys.executable, "-c", ANOTHER_CONTEXT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    first, _, second = done.stdout.partition("\n")
    assert first == "True", done.stderr[-2000:]
    assert "the current context is not the primary one of cuda:0" in second, done.stderr[-2000:]


@gpu
@every_loss
def test_backward_that_is_captured_alone_can_be_replayed(loss, generator):
    """A second replay gives what the first gave: nothing was scaled twice. (The memory that backward read is
    returned to its stream, on which nothing is allocated here.)"""
    _, inputs = made(loss, generator, torch.float16, 64, 31)
    expected = run(loss, loss.ours, inputs)[1]
    wanted = [x for x in inputs if x.requires_grad]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        value = (0.37 * loss.first(loss.ours(*inputs))).sum()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        grads = torch.autograd.grad(value, wanted)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b)


@gpu
@inductor
@every_loss
def test_compiled_with_graphs(loss, generator):
    """There, everything that is kept must be memory that the graph knows."""
    _, inputs = made(loss, generator, torch.float32, 64, 31)
    compiled = torch.compile(loss.ours, mode="reduce-overhead")
    expected = run(loss, loss.ours, inputs)
    for _ in range(4):  # a first run, one that is recorded, and replays
        torch.compiler.cudagraph_mark_step_begin()
        value, grads = run(loss, compiled, inputs)
        # Inductor's formulation of MCC rounds in other places: 9e-7 on a CPU.
        assert_agree((value.clone(), [g.clone() for g in grads]), expected, torch.float32, 3e-6)


FIRST_CALL = """
import torch
from tllib_rs.self_training.mcc import MinimumClassConfusionLoss
from tllib_rs.self_training.uda import StrongWeakConsistencyLoss

y, target = (torch.randn(40, 300, device="cuda") for _ in range(2))
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    values = MinimumClassConfusionLoss(2.0)(y), StrongWeakConsistencyLoss(0.0, 1.0)(y, target)
graph.replay()
torch.cuda.synchronize()
print([v.item() == f(*x).item() for v, f, x in zip(
    values, (MinimumClassConfusionLoss(2.0), StrongWeakConsistencyLoss(0.0, 1.0)), ((y,), (y, target))
)])
"""


@kernels
@gpu
@pytest.mark.parametrize("damage", [None, 0, 7, 1000], ids=lambda n: f"files of {n} bytes" if n else f"{n}")
def test_first_call_of_a_process_is_captured(damage, tmp_path):
    """Code is loaded while a graph is captured, and made again if the files that keep it were truncated."""

    def called():
        environment = os.environ | {"TLLIB_RS_CACHE": str(tmp_path)}
        command = [sys.executable, "-c", FIRST_CALL]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    first = called()
    assert first.stdout.strip() == "[True, True]", first.stderr[-2000:]
    kept = sorted(tmp_path.iterdir())
    sizes = [file.stat().st_size for file in kept]
    assert [file.suffix for file in kept] == [".bin"] * 2
    if damage is None:
        return
    for file in kept:
        file.write_bytes(file.read_bytes()[:damage])
    again = called()
    assert again.stdout.strip() == "[True, True]", again.stderr[-2000:]
    assert [file.stat().st_size for file in kept] == sizes
