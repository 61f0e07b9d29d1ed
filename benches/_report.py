"""What is printed, and what is kept."""

import datetime
import json
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tabulate import tabulate

from benches._case import OURS, Verdict
from benches._measure import Result
from tllib_rs import info

RESULTS = pathlib.Path(__file__).parent / "results"


_UNITS = [("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)]


def seconds(value: float, *, spread: tuple[float, float] | None = None) -> str:
    """A duration, and in brackets two others in the same unit."""
    unit, size = next((u for u in _UNITS if value >= u[1]), _UNITS[-1])
    between = f" ({_digits(spread[0] / size)}-{_digits(spread[1] / size)})" if spread else ""
    return f"{_digits(value / size)}{between} {unit}"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def environment() -> dict[str, str]:
    """The report of :mod:`tllib_rs.info`, the processor, and how busy it is: ratios hold on a busy machine
    only between providers that use as many threads."""
    load = f"{os.getloadavg()[0]:.1f} processes in the last minute"
    return {"processor": _processor(), "load": load} | info.report()


def print_environment() -> None:
    """Print :func:`environment`."""
    print(tabulate(environment().items(), tablefmt="plain"))


def print_method(stem: str, results: Sequence[Result], verdicts: Iterable[Verdict]) -> None:
    """A table of medians (p20 to p80), one of ratios, and the verdicts."""
    # Each provider once, in the order of first appearance.
    names = list(dict.fromkeys(name for result in results for name in result.measurements))
    others = [name for name in names if name != OURS]
    rows = [
        [result.case.setting]
        + [_spread(result, name) for name in names]
        + [_digits(result.ratio(name)) if name in result.measurements else "" for name in others]
        for result in results
    ]
    print(f"\n{stem}")
    print(tabulate(rows, ["", *names, *(f"{name}/{OURS}" for name in others)], disable_numparse=True))
    print_verdicts(verdicts)


def print_verdicts(verdicts: Iterable[Verdict]) -> None:
    """One line each."""
    for verdict in verdicts:
        print(f"  {'met   ' if verdict.met else 'MISSED'}  {verdict.text}")


def _spread(result: Result, name: str) -> str:
    if name not in result.measurements:
        return ""
    p20, p50, p80 = result.percentiles(name)
    return seconds(p50, spread=(p20, p80))


def record(results: Sequence[Result], verdicts: Iterable[Verdict], quick: bool) -> dict[str, Any]:
    """A method's run, as data. Durations in seconds a call."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "environment": environment(),
        "quick": quick,
        "cases": [_case(result) for result in results],
        "verdicts": [{"text": verdict.text, "met": verdict.met} for verdict in verdicts],
    }


def _case(result: Result) -> dict[str, Any]:
    providers = {}
    for name, measurement in result.measurements.items():
        p20, p50, p80 = result.percentiles(name)
        figures = {"p20": p20, "p50": p50, "p80": p80, "iqr": measurement.iqr}
        providers[name] = figures | {"blocks": len(measurement.times)}
    ratios = {name: result.ratio(name) for name in result.measurements if name != OURS}
    return {"setting": result.case.setting, "providers": providers, "ratios": ratios}


def save(stem: str, run: Mapping[str, Any], path: pathlib.Path | None = None) -> pathlib.Path:
    """Put a method's run into this machine's file, in place of the method's last one."""
    path = path or RESULTS / f"{_slug()}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(sorted((kept | {stem: run}).items())), indent=1) + "\n")
    return path


def _slug() -> str:
    parts = f"{platform.machine()} {_processor()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", parts.lower()).strip("-")


def _processor() -> str:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _commit() -> str:
    git = ["git", "-C", str(RESULTS.parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return head.stdout.strip() + (" with changes" if changed.stdout.strip() else "") or "unknown"
