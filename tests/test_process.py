"""What happens around the calls: the GIL, forked children, instruction sets, the import."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from tests.threads import threads_of
from tllib_rs import _version, info
from tllib_rs.self_training.flexmatch import DynamicThresholdingModule
from tllib_rs.self_training.mcc import MinimumClassConfusionLoss
from tllib_rs.vision.models.reid.loss import pairwise_euclidean_distance

PROBE = """
import os, torch
from tests.losses import LOSSES
from tllib_rs import _core

generator, found = torch.Generator().manual_seed(3), {}
for loss in LOSSES:
    for shape in ((40, 5), (33, 31), (20, 150), (3, 1031)):
        inputs = loss.inputs(generator, *shape)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            for columns in (False, True):
                laid = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
                laid = [x.t().contiguous().t() if columns and x.dim() == 2 else x.clone() for x in laid]
                leaves = [x.requires_grad_() for k, x in enumerate(laid) if k not in loss.constant]
                value = loss.first(loss.ours(*laid))
                grads = torch.autograd.grad(value.sum(), leaves)
                found[loss.name, shape, str(dtype), columns] = [value.detach(), *grads]
torch.save(found, os.environ["RESULTS"])
print(_core.build_info()["isa"])
"""


def python(code, **env):
    """The output of a fresh interpreter."""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def _confusion():
    logits, loss = torch.randn(2000, 3000), MinimumClassConfusionLoss(1.0)
    return lambda: loss(logits)


def _few_rows_from_many():
    queries, gallery = torch.randn(8, 128), torch.randn(100_000, 128)
    return lambda: pairwise_euclidean_distance(queries, gallery)


@pytest.mark.parametrize("make", [_confusion, _few_rows_from_many])
def test_the_gil_is_released_while_a_kernel_runs(make):
    call = make()
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0)

    thread = threading.Thread(target=tick)
    thread.start()
    spans = []
    try:
        # A call takes milliseconds: if every core is busy, the other thread may miss a few.
        for _ in range(30):
            start = time.perf_counter()
            call()
            took = time.perf_counter() - start
            spans.append((start + 0.2 * took, start + 0.8 * took))
    finally:
        done.set()
        thread.join()
    assert any(start < t < end for t in ticks for start, end in spans), "no other thread ran during a call"


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux lists them")
@threads_of(2)
def test_kernels_run_on_the_threads_that_torch_has():
    logits = torch.randn(2000, 2000)
    loss = MinimumClassConfusionLoss(1.0)
    logits.exp()
    before, seen, done = os.listdir("/proc/self/task"), [], threading.Event()

    def watch():
        while not done.is_set():
            seen.append(len(os.listdir("/proc/self/task")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(10):
            loss(logits)
    finally:
        done.set()
        watcher.join()
    assert seen
    assert max(seen) <= len(before) + 1, "more than the watcher was started"


def _child(queue, logits):
    # Only calls of ours until torch has one thread: its own OpenMP threads do not survive a fork.
    (grad,) = torch.autograd.grad(MinimumClassConfusionLoss(1.0)(logits), logits)
    torch.set_num_threads(1)
    module = DynamicThresholdingModule(0.95, False, lambda x: x, 5, 10, "cpu")
    module.update(torch.arange(3), torch.ones(3), torch.arange(3))
    queue.put((bool(grad.isfinite().all()), module.class_counts().tolist()))


@pytest.mark.filterwarnings("ignore:.*fork.*")
@threads_of(2)
def test_a_forked_child_works_after_the_parent_used_threads():
    logits = torch.randn(600, 500, requires_grad=True)
    MinimumClassConfusionLoss(1.0)(logits).backward()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue, logits), daemon=True)
    child.start()
    try:
        assert queue.get(timeout=60) == (True, [7, 1, 1, 1, 0, 0])
        child.join(timeout=60)
        assert child.exitcode == 0
    finally:
        child.kill()


def results(path, level):
    """The losses and gradients of every loss, in narrow and wide rows and columns, with this instruction set."""
    (isa,) = python(PROBE, TLLIB_RS_ISA=level, RESULTS=path)
    assert isa in (level, "neon") or level == ""
    return isa, torch.load(path)


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_every_instruction_set_gives_the_same_results(level, tmp_path):
    best, expected = results(str(tmp_path / "best"), "")
    if best in (level, "neon"):
        pytest.skip("this processor has no other instruction set")
    _, found = results(str(tmp_path / level), level)
    rounding = {torch.float32: 3e-5, torch.float64: 1e-12, torch.float16: 3e-3, torch.bfloat16: 2e-2}
    assert found.keys() == expected.keys()
    for key, tensors in expected.items():
        for a, b in zip(found[key], tensors, strict=True):
            error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-12)
            assert error <= rounding[b.dtype], key


def test_another_torch_is_refused_in_one_sentence():
    _version.check_torch("2.11.0+cpu")
    _version.check_torch("2.11.1")
    with pytest.raises(ImportError) as error:
        _version.check_torch("2.12.0+cu130")
    text = str(error.value)
    assert "built for torch 2.11" in text
    assert "torch 2.12.0+cu130 is installed" in text
    assert "pip install 'torch==2.11.*'" in text
    assert "\n" not in text


def test_the_import_checks_torch_before_the_extension():
    code = (
        "import torch; torch.__version__ = '2.3.1'\ntry:\n import tllib_rs\nexcept ImportError as e: print(e)"
    )
    assert "2.3.1" in " ".join(python(code))


def test_import_is_light():
    code = (
        "import sys, torch; before = set(sys.modules)\nimport tllib_rs\nprint(len(set(sys.modules) - before))"
    )
    assert int(python(code)[0]) < 10


def test_info(capsys):
    info.main()
    printed = capsys.readouterr().out
    words = (
        "tllib_rs",
        "torch",
        "numpy",
        "python",
        "instruction set",
        "matrix products",
        "threads",
        "devices",
    )
    for word in words:
        assert word in printed
    assert torch.__version__ in printed


def test_exceptions_of_libtorch_are_not_reported_as_panics_too():
    """Activation checkpointing ends the second forward by an exception inside operations with numbers."""
    code = """if True:
        import torch
        from torch.utils.checkpoint import checkpoint
        from torch.utils.flop_counter import FlopCounterMode
        from tllib_rs.self_training.mcc import MinimumClassConfusionLoss
        loss, linear = MinimumClassConfusionLoss(2.0), torch.nn.Linear(5, 5)
        x = torch.randn(8, 5, requires_grad=True)
        with FlopCounterMode(display=False):
            checkpoint(lambda z: loss(linear(z)), x, use_reentrant=False).backward()
        print(linear.weight.grad is not None)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (run.stdout, run.stderr) == ("True\n", "")
