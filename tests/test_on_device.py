"""The fused CUDA kernels: every form of each, in every element type, by the rule of the CPU.

On a machine with a GPU they run there. Without one, tests/test_cuda_sources.py runs them on the CPU."""

import os

import pytest
import torch

from tests.losses import LOSSES
from tests.test_losses import assert_agree, leaves, run

EMULATED = bool(os.environ.get("TLLIB_RS_CUDA_EMULATOR"))
ENABLED = os.environ.get("TLLIB_RS_CUDA") == "1"
HERE = ENABLED and (EMULATED or torch.cuda.is_available())
ON_GPU = HERE and not EMULATED

pytestmark = pytest.mark.skipif(not HERE, reason="NOT RUN: needs a GPU and TLLIB_RS_CUDA=1")
gpu = pytest.mark.skipif(not ON_GPU, reason="NOT RUN: needs a GPU")
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)

DEVICE = "cpu" if EMULATED else "cuda"
#: One for each form of a kernel over rows, and a batch that is more than the blocks of a grid.
SHAPES = [(9, 100), (300, 7), (7, 345), (5, 1500), (3, 5003)]
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def made(loss, generator, dtype, *shape):
    """The inputs as ``dtype`` holds them: in float64 on the CPU, and in ``dtype`` on the device."""
    held = [x.to(dtype) if x.is_floating_point() else x for x in loss.inputs(generator, *shape)]
    exact = leaves(loss, [x.double() if x.is_floating_point() else x for x in held])
    return exact, leaves(loss, [x.to(DEVICE) for x in held], dtype)


def on_cpu(result):
    return result[0].cpu(), tuple(g.cpu() for g in result[1])


@every_loss
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_form(loss, generator, dtype, shape):
    exact, typed = made(loss, generator, dtype, *shape)
    expected = run(loss, loss.plain, exact)
    got = on_cpu(run(loss, loss.ours, typed))
    rounding = ROUNDING[dtype]
    if dtype == torch.float32:
        own = run(loss, loss.plain, leaves(loss, exact, dtype))
        pairs = zip([own[0], *own[1]], [expected[0], *expected[1]], strict=True)
        errors = [(a.double() - b).abs().max() / b.abs().max().clamp_min(1e-12) for a, b in pairs]
        rounding = max(rounding, 4 * float(max(errors)))
    assert_agree(got, expected, dtype, rounding)


@every_loss
def test_graph_is_kept_and_gradients_add_up(loss, generator):
    _, inputs = made(loss, generator, torch.float32, 6, 9)
    wanted = [x for x in inputs if x.requires_grad]
    value = loss.first(loss.ours(*inputs)).sum()
    once = torch.autograd.grad(value, wanted, retain_graph=True)
    thrice = torch.autograd.grad(3 * value, wanted)
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


@gpu
@every_loss
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_never_waits_for_the_device(loss, generator, dtype):
    _, inputs = made(loss, generator, dtype, 64, 31)
    run(loss, loss.ours, inputs)  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(loss, loss.ours, inputs)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@gpu
@every_loss
def test_captured_and_replayed(loss, generator):
    _, inputs = made(loss, generator, torch.float32, 64, 31)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run(loss, loss.ours, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(loss, loss.ours, inputs)
    _, others = made(loss, torch.Generator().manual_seed(7), torch.float32, 64, 31)
    with torch.no_grad():
        for x, other in zip(inputs, others, strict=True):
            x.copy_(other)
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    assert_agree(captured, run(loss, loss.ours, others), torch.float32, 1e-6)


@gpu
@every_loss
def test_streams_of_their_own(loss, generator):
    _, inputs = made(loss, generator, torch.float32, 64, 100)
    expected = run(loss, loss.ours, inputs)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for turn in range(40):
        with torch.cuda.stream(streams[turn % 4]):
            results.append(run(loss, loss.ours, inputs))
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
