"""Interleaved timing, on ``torch.utils.benchmark``."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.benchmark import Measurement, Timer

from benches._case import OURS, Case, Provider, Verdict, check


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    #: Seconds that the calls of one block should take.
    block: float
    #: Blocks of each provider, fewer where they would take longer than ``budget``.
    rounds: int
    #: Seconds for all blocks of one provider; three blocks are run whatever they take.
    budget: float


FULL = Effort(block=0.02, rounds=25, budget=4.0)
QUICK = Effort(block=0.002, rounds=5, budget=0.1)


@dataclass(frozen=True)
class Result:
    """The measurements of a case's providers, by name. The k-th times belong to one round."""

    case: Case
    measurements: Mapping[str, Measurement]

    def median(self, name: str) -> float:
        """Seconds a call, the median of blocks."""
        return self.measurements[name].median

    def percentiles(self, name: str) -> tuple[float, float, float]:
        """p20, p50 and p80 of the blocks, in seconds a call."""
        p20, p50, p80 = np.percentile(self.measurements[name].times, [20, 50, 80])
        return float(p20), float(p50), float(p80)

    def ratio(self, name: str) -> float:
        """How many times faster ours is than ``name``: the median over rounds."""
        ours, others = self.measurements[OURS].times, self.measurements[name].times
        return statistics.median(other / own for own, other in zip(ours, others, strict=False))

    def verdicts(self) -> Iterable[Verdict]:
        """The case's bars."""
        for name, bar in (self.case.bars or {}).items():
            if name in self.measurements:
                ratio = self.ratio(name)
                yield Verdict(
                    f"{self.case.setting}: {ratio:.3g} times {name} (at least {bar:g})", ratio >= bar
                )


def run_case(method: str, case: Case, effort: Effort) -> Result:
    """Set a case up, compare its providers, and time them."""
    providers = case.set_up()
    check(case, providers)
    return Result(case, measure(providers, effort, label=method, sub_label=case.setting))


def measure(providers: Mapping[str, Provider], effort: Effort, **labels: str) -> dict[str, Measurement]:
    """Time the steps of all providers, round robin."""
    timers = {
        name: Timer(
            "step()",
            globals={"step": provider.step},
            # The timer's own default is one thread.
            num_threads=torch.get_num_threads(),
            description=name,
            **labels,
        )
        for name, provider in providers.items()
    }
    plans = {name: _plan(timer, effort) for name, timer in timers.items()}
    blocks: dict[str, list[Measurement]] = {name: [] for name in timers}
    for round_ in range(effort.rounds):
        # Another order each round, so that nobody always follows the same neighbour.
        names = list(timers)
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            calls, rounds = plans[name]
            if round_ < rounds:
                blocks[name].append(timers[name].timeit(calls))
    return {name: Measurement.merge(parts)[0] for name, parts in blocks.items()}


def _plan(timer: Timer, effort: Effort) -> tuple[int, int]:
    """Calls in a block, and blocks."""
    once = timer.timeit(1).median
    calls = max(1, int(effort.block / max(once, 1e-9)))
    # A block also warms up, with two calls or a hundredth of its own.
    rounds = int(effort.budget / (once * (calls + max(2, calls // 100))))
    return calls, min(effort.rounds, max(3, rounds))
