"""Small losses while other processes keep every core busy.

Work that is split over threads waits for the slowest of them, and on a busy machine one of them is not
running: a loss that starts threads for a small batch then takes hundreds of times as long.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator

from tabulate import tabulate

from benches import _report
from benches._case import OURS, PLAIN, Method, Verdict
from benches._measure import Effort, measure
from benches._providers import prepare

#: The most by which a loaded machine may multiply the quiet time: with one busy process per core, half the
#: processor time is left, and the scheduler's time slices come on top.
FEW = 4.0


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """``processes`` endless loops in the background."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def run(methods: Iterable[Method], effort: Effort) -> list[Verdict]:
    """Time ours and plain on the quiet and on the loaded machine; print both."""
    rows, verdicts = [], []
    for method in methods:
        for case in method.cases:
            if not case.small:
                continue
            providers, _ = prepare(case, compiled=False)
            compared = {name: providers[name] for name in (OURS, PLAIN)}
            labels = {"label": method.stem, "sub_label": case.setting}
            quiet = measure(compared, effort, **labels)
            with busy(os.cpu_count() or 1):
                loaded = measure(compared, effort, **labels)
            for name in compared:
                before, after = quiet[name].median, loaded[name].median
                slower = after / before
                # A block's share of a core varies: the mean shows what the median hides.
                durations = map(_report.seconds, (before, after, loaded[name].mean))
                rows.append([method.stem, case.setting, name, *durations, f"{slower:.3g}"])
                if name == OURS:
                    text = (
                        f"{method.stem} {case.setting}: {slower:.3g} times its quiet time (at most {FEW:g})"
                    )
                    verdicts.append(Verdict(text, slower <= FEW))
    heads = ["", "", "", "quiet", "loaded", "loaded, mean", "loaded/quiet"]
    print(tabulate(rows, heads, disable_numparse=True))
    _report.print_verdicts(verdicts)
    return verdicts
