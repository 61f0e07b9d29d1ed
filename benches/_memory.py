"""How much memory a step needs beyond what was there before it.

Two measures, since neither sees all: :func:`peak` counts the tensors that are alive at once, to the byte,
from the profiler's record of libtorch's allocator; :func:`resident` is what the process grows by, with
whatever else is allocated (our kernels' own buffers), but accurate only to some pages, and only in a fresh
process.

``python -m benches._memory METHOD`` measures a method's footprints and prints them as JSON.
"""

import ctypes
import gc
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benches._case import OURS, Footprint, Method, Verdict

#: What is accepted beyond the expected bytes: sums over rows and classes, and the threads' stacks.
SLACK = 1.05
#: Linux's prctl(2): without huge pages a page is resident when it was touched.
_PR_SET_THP_DISABLE = 41


def peak(step: Callable[[], Any]) -> int:
    """The most bytes of tensors that one call holds at once, not counting what it releases first (the last
    step's gradients)."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()  # so that the profiler knows the size of what the next call releases
        with torch.autograd.profiler.record_function(_SECOND):
            step()
    events = sorted(profile.kineto_results.events(), key=lambda event: event.start_ns())
    start = next(event.start_ns() for event in events if event.name() == _SECOND)
    sizes = [e.nbytes() for e in events if e.name() == "[memory]" and e.start_ns() >= start]
    level = highest = 0
    releasing = True
    for size in sizes:
        releasing = releasing and size < 0
        level = level + size if not releasing else 0
        highest = max(highest, level)
    return highest


_SECOND = "benches: second step"


def resident(footprint: Footprint) -> int:
    """The bytes by which one step of ours makes this process grow."""
    footprint.case.set_up()[OURS].step()  # starts threads and loads code
    gc.collect()
    step = footprint.case.set_up()[OURS].step
    before = _status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the present size
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    text = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s*(\d+) kB", text, re.MULTILINE)[1])


def verdicts(method: Method) -> Iterable[Verdict]:
    """Each footprint against what is expected of it, measured in another process."""
    if not method.footprints or not sys.platform.startswith("linux"):
        return
    # glibc then takes each larger block from the system and gives it back at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benches._memory", method.stem, str(torch.get_num_threads())]
    root = pathlib.Path(__file__).parent.parent
    run = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured = json.loads(run.stdout.splitlines()[-1])
    for footprint, (tensors, grown) in zip(method.footprints, measured, strict=True):
        share = max(tensors, grown) / footprint.expected
        yield Verdict(
            f"{footprint.case.setting}: {share:.3g} times the memory of {footprint.holds} "
            f"(at most {SLACK:g}; tensors {tensors / 2**20:.1f} MiB, the process {grown / 2**20:.1f} MiB)",
            share <= SLACK,
        )


def main(stem: str, threads: str) -> None:
    """Print a list of (tensors, resident), one for each footprint."""
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    torch.set_num_threads(int(threads))
    method = importlib.import_module(f"benches.{stem}").METHOD
    grown = [resident(footprint) for footprint in method.footprints]
    tensors = [peak(footprint.case.set_up()[OURS].step) for footprint in method.footprints]
    print(json.dumps(list(zip(tensors, grown, strict=True))))


if __name__ == "__main__":
    main(*sys.argv[1:])
