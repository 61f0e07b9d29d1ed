"""What the tests on a device share. On a machine with a GPU they run there, with the kernels if
TLLIB_RS_CUDA=1. Without a GPU, tests/test_cuda_sources.py runs them on the CPU, where kernels are emulated,
and tests/test_composites.py with libtorch's operations."""

import os
import shutil
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch.utils._triton import has_triton

EMULATED = bool(os.environ.get("TLLIB_RS_CUDA_EMULATOR"))
OPERATIONS = os.environ.get("TLLIB_RS_COMPOSITE") == "1" and not torch.cuda.is_available()
HERE = EMULATED or OPERATIONS or torch.cuda.is_available()
ON_GPU = HERE and not (EMULATED or OPERATIONS)
DEVICE = "cuda" if ON_GPU else "cpu"

KERNELS = os.environ.get("TLLIB_RS_CUDA") == "1"

somewhere = pytest.mark.skipif(not HERE, reason="NOT RUN: needs a GPU")
kernels = pytest.mark.skipif(not KERNELS, reason="NOT RUN: needs TLLIB_RS_CUDA=1")
gpu = pytest.mark.skipif(not ON_GPU, reason="NOT RUN: needs a GPU")
inductor = pytest.mark.skipif(
    not (has_triton() and any(map(shutil.which, ("cc", "gcc", "clang")))),
    reason="NOT RUN: needs Triton and a C compiler",
)

#: The accepted error of a result, relative to its largest number.
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def on_cpu(result):
    """A loss and its gradients."""
    return result[0].cpu(), tuple(g.cpu() for g in result[1])


def placed(view):
    """``view`` on the device with its strides and storage offset: ``to`` would give a copy another layout."""
    whole = view.new_empty(0).set_(view.untyped_storage())
    return whole.to(DEVICE).as_strided(view.shape, view.stride(), view.storage_offset())


def occupy(seconds, *streams):
    """Keeps the streams, or the current one, busy for about so long: what is queued on them meanwhile comes
    later."""
    for stream in streams or (torch.cuda.current_stream(),):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(int(1.8e9 * seconds))  # cycles of a GPU's clock


@contextmanager
def never_waiting():
    """Raises if anything inside waits for the device. torch reports waits that are made through it; after any
    other, such as one of the driver's, nothing is left of the work that was queued before."""
    occupy(0.3)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
        queued = torch.cuda.Event()
        queued.record()
        assert not queued.query(), "the device had nothing to do any more: something waited for it"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
