"""FlexMatch at 10^8 samples, and what follows from it for more samples on many ranks.

The measured constants go into the formulas of docs/scaling.md; the tables there are what this prints.
"""

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate

from benches import _report
from benches._case import Verdict
from tests.ranks import run_ranks
from tllib_rs.self_training.flexmatch import DynamicThresholdingModule

BATCH, CLASSES, FEW = 448, 100, 1_000
SAMPLES, QUICK_SAMPLES = 100_000_000, 2_000_000
#: Upper bounds: memory of a sample over its label's bytes, cost of a step over that at FEW samples, seconds.
MEMORY, FLAT, SECONDS = 1.1, 1.5, 10.0
#: What the projection is for.
SETTINGS = [(n, ranks) for n in (10**9, 10**10) for ranks in (8, 1024)]
PROJECTED_CLASSES, LABEL_BYTES, ROOM = 1_000, 2, 64


@dataclass(frozen=True)
class Constants:
    """Seconds, measured."""

    #: To apply one (index, label) pair at a random place among SAMPLES.
    row: float
    #: To count one label again after an outside write.
    recount: float
    #: One exchange between two ranks that carries nothing.
    latency: float
    #: One byte more in it.
    byte: float


def _resident() -> int:
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


def _times(step: Callable[[], object], calls: int, repeats: int = 7) -> list[float]:
    step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            step()
        times.append((time.perf_counter() - start) / calls)
    return times


def _median(step: Callable[[], object], calls: int, repeats: int = 7) -> float:
    return statistics.median(_times(step, calls, repeats))


def _once(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def _module(samples: int, dtype: torch.dtype) -> DynamicThresholdingModule:
    return DynamicThresholdingModule(0.95, True, lambda x: x / (2 - x), CLASSES, samples, "cpu", dtype=dtype)


def _batch(samples: int, size: int, selected: float = 1.0) -> tuple[torch.Tensor, ...]:
    mask = (torch.rand(size) < selected).float()
    return torch.randint(samples, (size,)), mask, torch.randint(CLASSES, (size,))


def _step(samples: int, module: DynamicThresholdingModule) -> float:
    batches = [_batch(samples, BATCH, 0.5) for _ in range(64)]
    turn = iter(range(10**9))

    def step() -> None:
        idxes, mask, labels = batches[next(turn) % len(batches)]
        module.get_threshold(labels)
        module.update(idxes, mask, labels)

    # The fastest block: the others also measure what else uses the cores.
    return min(_times(step, 500))


def _recount(module: DynamicThresholdingModule) -> None:
    module.net_outputs[0] = 1
    module.get_threshold(torch.tensor([0]))


def _one(samples: int, dtype: torch.dtype) -> tuple[dict[str, float], float]:
    before = _resident()
    module = _module(samples, dtype)
    module.class_counts()
    found = {"bytes a sample": (_resident() - before) / samples}
    found["step"] = _step(samples, module)
    found["step, few"] = _step(FEW, _module(FEW, dtype))
    found["recount"] = _median(lambda: _recount(module), 1, 5)
    rows = samples // 100
    row = _median(lambda: module.update(*_batch(samples, rows)), 1, 3)
    row = (row - _median(lambda: _batch(samples, rows), 1, 3)) / rows
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "state.pt"
        found["save"], _ = _once(lambda: torch.save(module.state_dict(), path))
        found["load"], _ = _once(lambda: module.load_state_dict(torch.load(path)))
    return found, row


def _exchange(rank: int, words: int, calls: int) -> float:
    sent = torch.zeros(words, dtype=torch.int64)
    received = sent.new_empty(words * dist.get_world_size())
    return min(_times(lambda: dist.all_gather_into_tensor(received, sent), calls))


def _exchanges(quick: bool) -> tuple[float, float]:
    calls, many = (20, 1 << 14) if quick else (200, 1 << 20)
    small = max(run_ranks(2, _exchange, 8, calls))
    large = max(run_ranks(2, _exchange, many, 5))
    return small, max(0.0, large - small) / (8 * many)


def _projection(c: Constants) -> list[list[str]]:
    rows = []
    room = -(-BATCH // ROOM) * ROOM
    for samples, ranks in SETTINGS:
        word = 4 if samples * (PROJECTED_CLASSES + 1) < 2**31 else 8
        counts = 8 * (PROJECTED_CLASSES + 1)
        received = (ranks - 1) * (room + 1) * word
        summed = 2 * (ranks - 1) / ranks * counts
        for layout, held, traffic, hops, applied in (
            ("replicated", samples, received, ranks - 1, ranks * BATCH),
            ("sharded", samples / ranks, summed, 2 * (ranks - 1), BATCH),
        ):
            rows.append(
                [
                    f"{samples:.0e}".replace("+", ""),
                    f"{ranks:,}",
                    layout,
                    _size(held * LABEL_BYTES),
                    _size(traffic),
                    _report.seconds(hops * c.latency + traffic * c.byte),
                    _report.seconds(applied * c.row),
                    _report.seconds(held * c.recount),
                ]
            )
    return rows


def _size(count: float) -> str:
    power = min(3, max(0, len(str(int(count))) - 1) // 3)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"


def run(quick: bool) -> list[Verdict]:
    """Measure, print, project."""
    samples = QUICK_SAMPLES if quick else SAMPLES
    _one(FEW * 100, torch.int8)  # what the first use brings into memory is not part of the state
    table, verdicts, per_row, recount = [], [], 0.0, 0.0
    for dtype in (torch.int8, torch.int16, torch.int64):
        found, row = _one(samples, dtype)
        name = str(dtype).removeprefix("torch.")
        durations = [_report.seconds(found[k]) for k in ("step", "step, few", "recount", "save", "load")]
        table.append([name, f"{found['bytes a sample']:.3f}", *durations, _report.seconds(row)])
        verdicts += [
            Verdict(
                f"{name}: {found['bytes a sample'] / dtype.itemsize:.3f} times its bytes (at most {MEMORY})",
                found["bytes a sample"] <= MEMORY * dtype.itemsize,
            ),
            Verdict(
                f"{name}: a step costs {found['step'] / found['step, few']:.2f} times one at {FEW:,} samples "
                f"(at most {FLAT})",
                found["step"] <= FLAT * found["step, few"],
            ),
            Verdict(
                f"{name}: saved in {found['save']:.2f} s, loaded in {found['load']:.2f} s "
                f"(at most {SECONDS:g} each)",
                max(found["save"], found["load"]) <= SECONDS,
            ),
        ]
        if dtype.itemsize == LABEL_BYTES:
            per_row, recount = row, found["recount"] / samples
    heads = ["labels", "bytes a sample", "step", f"step at {FEW:,}", "recount", "save", "load", "row"]
    print(f"N = {samples:,}, B = {BATCH}, half of them selected, C = {CLASSES}")
    print(tabulate(table, heads, disable_numparse=True))
    constants = Constants(per_row, recount, *_exchanges(quick))
    print(
        f"\nrow {constants.row * 1e9:.1f} ns, recount {constants.recount * 1e9:.2f} ns a label, "
        f"exchange of two gloo ranks over loopback {constants.latency * 1e6:.0f} us "
        f"+ {constants.byte * 1e9:.2f} ns a byte\n"
        f"int{8 * LABEL_BYTES} labels, B = {BATCH} a rank, all selected, C = {PROJECTED_CLASSES:,}:"
    )
    heads = ["N", "ranks", "layout", "memory", "traffic", "exchange", "apply", "recount"]
    print(tabulate(_projection(constants), heads, disable_numparse=True))
    _report.print_verdicts(verdicts)
    return verdicts
