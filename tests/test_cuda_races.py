"""Races and accesses out of bounds are found: when the CUDA kernels run on the CPU (test_cuda_sources.py),
each access is checked, and the kernels here are wrong on purpose."""

import os
import re
import subprocess
import sys

import pytest

from tests.cuda import HERE, bounds_watch, build_emulator

RACY = HERE / "racy"
KERNELS = re.findall(r"^KERNEL\((\d+), (\w+)", (RACY / "racy.cu").read_text(), re.MULTILINE)
#: What a process reports of a wrong kernel, if not a race: here the first thread runs first, and without a
#: barrier it reads what the last one has not written yet.
FOUND = {
    "never_written": "read of what nobody wrote",
    "no_barrier": "read of what nobody wrote",
    "behind_the_end": "access out of bounds",
    "before_the_start": "access out of bounds",
    "past_an_array": "index out of bounds",
}
LAUNCH = """
import ctypes, sys
class Racy(ctypes.Structure):
    _fields_ = [("out", ctypes.c_void_p), ("done", ctypes.c_void_p), ("right", ctypes.c_int)]
library, kernel, threads, blocks, right = sys.argv[1:]
out, done = (ctypes.c_int * 256)(), ctypes.c_uint()
args = Racy(ctypes.addressof(out), ctypes.addressof(done), right == "right")
launch = ctypes.CDLL(library).tllib_emulated_launch
sys.exit(launch(f"racy/f32/{kernel}".encode(), int(blocks), int(threads), ctypes.byref(args)))
"""


@pytest.fixture(scope="module")
def racy(tmp_path_factory):
    return build_emulator(tmp_path_factory.mktemp("racy"), RACY)


@pytest.mark.parametrize(("threads", "kernel"), KERNELS)
def test_races_are_found(threads, kernel, racy):
    watch = bounds_watch()
    if FOUND.get(kernel) == "access out of bounds" and not watch:
        pytest.skip("NOT RUN: no address sanitizer works here")

    def launch(right):
        command = [sys.executable, "-c", LAUNCH, str(racy), kernel, threads, "3", right]
        return subprocess.run(command, env=os.environ | watch, capture_output=True, text=True, check=False)

    wrong = launch("wrong")
    assert wrong.returncode < 0, "not found"
    assert f"{FOUND.get(kernel, 'race')} in racy/f32/{kernel}" in wrong.stderr
    right = launch("right")
    assert right.returncode == 0, right.stderr
