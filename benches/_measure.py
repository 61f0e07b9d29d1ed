"""Interleaved timing, on ``torch.utils.benchmark``."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.benchmark import Measurement, Timer

from benches._case import OURS, REPLACED, Bar, Case, Provider, Verdict, faster
from benches._memory import peak
from benches._providers import prepare


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    #: Seconds that the calls of one block should take.
    block: float
    #: Blocks of each provider, fewer where they would take longer than ``budget``.
    rounds: int
    #: Seconds for all blocks of one provider; three blocks are run whatever they take.
    budget: float
    #: Whether to include settings that take seconds, and memory.
    thorough: bool = True
    #: Whether to include torch.compile, which takes seconds for each setting.
    compiled: bool = True


FULL = Effort(block=0.02, rounds=25, budget=1.0)
QUICK = Effort(block=0.002, rounds=5, budget=0.1, thorough=False, compiled=False)


@dataclass(frozen=True)
class Result:
    """The measurements of a case's providers, by name. The k-th times belong to one round."""

    case: Case
    measurements: Mapping[str, Measurement]
    #: Bytes of tensors that a step has at once beyond what was there before it, by provider.
    memory: Mapping[str, int] = field(default_factory=dict)
    #: Why a provider is missing.
    left_out: Mapping[str, str] = field(default_factory=dict)

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

    def bars(self) -> Iterable[Bar]:
        """The case's own, and that ours is no slower than any of :data:`REPLACED` that was measured."""
        yield from self.case.bars
        judged = {bar.provider for bar in self.case.bars if bar.at_least}
        yield from (faster(name, 1) for name in REPLACED if name in self.measurements and name not in judged)

    def verdicts(self) -> Iterable[Verdict]:
        """Whether each bar is met. One whose provider is missing is not, unless the table says why."""
        for bar in self.bars():
            if bar.provider in self.left_out:
                continue
            text, met = self._judged(bar)
            yield Verdict(f"{self.case.setting}: {text}", met)

    def _judged(self, bar: Bar) -> tuple[str, bool]:
        if bar.provider not in self.measurements:
            return f"{bar.provider} was not measured", False
        ratio = self.ratio(bar.provider)
        if bar.at_least:
            text = f"{ratio:.3g} times as fast as {bar.provider} (at least {bar.factor:g})"
            return text, ratio >= bar.factor
        ratio = 1 / ratio
        return f"{ratio:.3g} times the {bar.provider} (at most {bar.factor:g})", ratio <= bar.factor


def run_case(method: str, case: Case, effort: Effort) -> Result:
    """Set a case up, compare its providers, and time them."""
    providers, left_out = prepare(case, compiled=effort.compiled)
    measurements = measure(providers, effort, label=method, sub_label=case.setting)
    memory = {name: peak(p.step) for name, p in providers.items()} if effort.thorough else {}
    return Result(case, measurements, memory, left_out)


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
        # Another order each round, so that no provider always follows the same one.
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
