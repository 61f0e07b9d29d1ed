"""The kept results: one file for each machine, with the last run of each method."""

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

from benches._case import OURS, Verdict
from benches._measure import Result
from tllib_rs import info

RESULTS = pathlib.Path(__file__).parent / "results"


def environment() -> dict[str, str]:
    """The report of :mod:`tllib_rs.info`, the processor, and how busy it is: ratios hold on a busy machine
    only between providers that use as many threads."""
    load = f"{os.getloadavg()[0]:.1f} processes in the last minute"
    return {"processor": _processor(), "load": load} | info.report()


def record(results: Sequence[Result], verdicts: Iterable[Verdict], quick: bool) -> dict[str, Any]:
    """A method's run, as data. Durations in seconds a call, memory in bytes."""
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
        providers[name] = figures | {"blocks": len(measurement.times), "memory": result.memory.get(name)}
    ratios = {name: result.ratio(name) for name in result.measurements if name != OURS}
    case = result.case
    return {
        "setting": case.setting,
        "loss": case.loss,
        "sizes": dict(case.sizes),
        "providers": providers,
        "ratios": ratios,
        "left out": dict(result.left_out),
    }


def latest() -> dict[str, Any]:
    """The kept runs of the machine that ran last, by method; empty if there are none."""
    kept = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    return max(kept, key=lambda runs: max(run["date"] for run in runs.values()), default={})


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
        # All but the results, which are being written.
        others = ["--", ":/", f":(exclude,top){RESULTS.parent.name}/{RESULTS.name}"]
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", *others], capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return head.stdout.strip() + (" with changes" if changed.stdout.strip() else "") or "unknown"
