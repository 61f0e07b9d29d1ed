"""``python -m benches --device cuda``: the same cases on a device.

By wall clock (with synchronization) and by the device's events, with the launches that a step makes and the
time that the host needs to make them. A copy, which reads and writes as many bytes as a loss and its
gradients must, is one more limit.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

import torch
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from benches import _report
from benches._case import (
    COMPILED,
    COPY,
    LIMIT,
    OURS,
    PLAIN,
    Bar,
    Case,
    Method,
    Provider,
    Verdict,
    faster,
    within,
)
from benches._losses import MATRIX
from benches._measure import Effort, Result, measure
from benches._providers import prepare, reason

#: Microseconds of the host: for a forward pass, and for a backward pass.
FORWARD_HOST, BACKWARD_HOST = 30.0, 20.0
#: The bars of acceptance on a device, by method and setting, which replace those of the CPU.
BARS: Mapping[tuple[str, str], Sequence[Bar]] = {
    ("mcc", "(64, 100)"): [faster(PLAIN, 8)],
    ("mcc", "(4096, 1000)"): [faster(PLAIN, 50)],
    ("flexmatch", "N = 1,281,167"): [faster(PLAIN, 300)],
    ("mean_teacher", "ResNet-50"): [faster(PLAIN, 8), faster("foreach", 1)],
    ("mean_teacher", "ViT-L"): [within(LIMIT, 1.2)],
    ("reid_loss", "soft triplet (256, 2048)"): [faster(PLAIN, 3)],
    ("self_tuning", "C = 200"): [faster(PLAIN, 50)],
}
#: For every loss over rows: bars at a small shape, and at the largest against a copy (one pass, both ways).
SMALL, SMALL_BARS = "(64, 100)", [faster(PLAIN, 4)]
COPIED, COPY_BARS = "(65536, 1000)", [within(COPY, 1.5)]
#: Losses that have no kernel on a device.
COMPOSITES = ("cc_loss",)
#: Losses that have to read the logits twice.
TWICE = ("mcc",)
HEADS = ["", "", "", "wall", "device", "of ours", "launches", "host forward", "host backward"]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one provider's step costs besides its wall time."""

    #: Seconds between two events of the device around a step; ``None`` on the CPU.
    device: float | None
    launches: int
    #: Seconds until a call returns: of the forward pass, where it can be run separately, and of the rest.
    forward: float | None
    rest: float


def run(methods: Iterable[Method], effort: Effort, device: str) -> list[Verdict]:
    """Time every case on ``device``; print a table of each method, and the verdicts."""
    verdicts = []
    for method in methods:
        rows, found = [], []
        for case in method.cases:
            if not (case.quick or effort.thorough) or _too_large(method.stem, case):
                continue
            case = dataclasses.replace(case, bars=_bars(method.stem, case))
            try:
                of_case, judged = _run_case(method.stem, case, effort, device)
            except Exception as error:  # the fault of this case, on a machine that is lent for minutes
                of_case, judged = [], [failure(case, error)]
            rows += of_case
            found += judged
        print(tabulate(rows, HEADS, disable_numparse=True))
        _report.print_verdicts(found)
        verdicts += found
    return verdicts


def failure(case: Case, error: Exception) -> Verdict:
    """The verdict that a case could not be measured, which does not keep the others from being measured."""
    return Verdict(f"{case.setting}: not measured: {reason(error)}", False)


def _run_case(
    stem: str, case: Case, effort: Effort, device: str
) -> tuple[list[Sequence[str]], Sequence[Verdict]]:
    """Rows of the table, and verdicts."""
    providers, left_out = prepare(case, compiled=effort.compiled, device=device)
    measured = measure(providers, effort, label=stem, sub_label=case.setting)
    result = Result(case, measured, {}, left_out)
    costs = {name: cost(provider, device) for name, provider in providers.items()}
    rows = [_row(stem, result, name, costs[name]) for name in providers]
    return rows, [*result.verdicts(), *_host_verdicts(case, costs[OURS])]


def _too_large(stem: str, case: Case) -> bool:
    """Whether several matrices of C x C are more than a device holds."""
    return stem in COMPOSITES and case.sizes.get("C", 0) > MATRIX


def _bars(stem: str, case: Case) -> list[Bar]:
    bars = list(BARS.get((stem, case.setting), ()))
    if "B" in case.sizes and stem not in COMPOSITES:
        bars.append(faster(COMPILED, 1))
        bars += SMALL_BARS if case.setting.endswith(SMALL) else []
        bars += COPY_BARS if case.setting.endswith(COPIED) and stem not in TWICE else []
    return bars


def _row(stem: str, result: Result, name: str, cost: Cost) -> list[str]:
    def seconds(value):
        return "" if value is None else _report.seconds(value)

    ratio = "" if name == OURS else f"{result.ratio(name):.3g}"
    wall = _report.seconds(result.median(name))
    host = seconds(cost.forward), seconds(cost.rest)
    return [stem, result.case.setting, name, wall, seconds(cost.device), ratio, str(cost.launches), *host]


def _host_verdicts(case: Case, cost: Cost) -> Iterable[Verdict]:
    if cost.forward is None or cost.device is None:
        return
    for part, took, most in (("forward", cost.forward, FORWARD_HOST), ("backward", cost.rest, BACKWARD_HOST)):
        text = f"{case.setting}: the host takes {1e6 * took:.3g} us for the {part} pass (at most {most:g})"
        yield Verdict(text, 1e6 * took <= most)


def cost(provider: Provider, device: str, rounds: int = 30) -> Cost:
    """The cost of one provider, after its first calls."""
    cuda = torch.device(device).type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    for _ in range(3):
        provider.step()
    step = _host(provider.step, wait, rounds)
    forward = provider.forward and _host(provider.forward, wait, rounds)
    rest = step - forward if forward else step
    return Cost(_events(provider.step, rounds) if cuda else None, _launches(provider.step), forward, rest)


def _host(call: Callable, wait: Callable, rounds: int) -> float:
    """Seconds until ``call`` returns, with nothing queued before it."""
    times = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def _events(step: Callable, rounds: int) -> float:
    """Seconds of the device for ``step``."""
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # About a millisecond, in which the host queues the step: otherwise a small one is over as soon as it
        # is queued, and the time between the events is the host's.
        torch.cuda._sleep(2_000_000)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)


def _launches(step: Callable) -> int:
    """Kernels, copies and fills that a step launches on the device."""
    if not torch.cuda.is_available():
        return 0
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events())
