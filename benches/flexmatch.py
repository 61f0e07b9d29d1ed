"""FlexMatch: one step is the thresholds of a batch and the update with it."""

import dataclasses
import itertools
import random
from collections.abc import Callable, Mapping

import torch

from benches._case import LIMIT, OURS, PLAIN, TLLIB, Case, Method, Provider, Verdict, faster, seeded, within
from benches._families import Drawn, log_uniform
from benches._providers import original
from tests.plain.flexmatch import DynamicThresholdingModule as Plain
from tllib_rs.self_training.flexmatch import DynamicThresholdingModule

THRESHOLD = 0.95
SAMPLES = [1_000, 10_000, 50_000, 100_000, 1_000_000, 1_281_167, 10_000_000, 100_000_000]
#: Counting in Python is run up to this many samples.
COUNTED = 1_281_167
BARS = {50_000: [faster(PLAIN, 10.0)], 1_281_167: [faster(PLAIN, 300.0)]}
MAPPING_BAR = 3.0
#: The most that a step at the most samples may cost, relative to one at the fewest.
FLAT = 1.5
#: Different batches, so that the labels they touch do not all stay in the nearest cache.
BATCHES = 64


def _mapping(status):
    return status / (2 - status)


class Bincount(Plain):
    """Counting in one torch operation: what a careful user writes in place of the loop."""

    def status(self):
        counts = torch.bincount(self.net_outputs + 1, minlength=self.num_classes + 1)
        if counts.max() == len(self.net_outputs):
            return torch.zeros(self.num_classes, device=counts.device)
        return counts[1:] / counts.max()


@dataclasses.dataclass(frozen=True)
class Setting:
    """The sizes of a step, and how the thresholds begin."""

    samples: int
    batch: int = 448
    classes: int = 100
    warmup: bool = True


def _set_up(setting: Setting) -> Callable[[], Mapping[str, Provider]]:
    def set_up():
        generator = seeded()

        def integers(high, size):
            return torch.randint(high, (size,), generator=generator)

        def batch():
            # On a device it is undefined which of equal indices plain keeps.
            drawn = integers(setting.samples, 2 * setting.batch).unique()
            drawn = drawn[torch.randperm(len(drawn), generator=generator)[: setting.batch]]
            return drawn, integers(2, len(drawn)).float(), integers(setting.classes, len(drawn))

        # Half of the samples are not selected yet.
        state = integers(2 * setting.classes, setting.samples).sub_(setting.classes).clamp_(min=-1)
        batches = [batch() for _ in range(BATCHES)]

        def provider(kind):
            module = kind(THRESHOLD, setting.warmup, _mapping, setting.classes, setting.samples, state.device)
            module.net_outputs.copy_(state)
            forever = itertools.cycle(batches)

            def step():
                idxes, mask, labels = next(forever)
                threshold = module.get_threshold(labels)
                module.update(idxes, mask, labels)
                return threshold

            def result():
                thresholds = [step() for _ in range(3)]
                return [*thresholds, module.net_outputs.clone()]

            return Provider(step, result)

        kinds = {OURS: DynamicThresholdingModule, "bincount": Bincount}
        if setting.samples <= COUNTED:
            tllib = original("self_training.flexmatch", "DynamicThresholdingModule")
            kinds |= {PLAIN: Plain, TLLIB: tllib}
        status = torch.rand(setting.batch, generator=generator)
        limit = Provider(lambda: THRESHOLD * _mapping(status), None)
        return {name: provider(kind) for name, kind in kinds.items() if kind} | {LIMIT: limit}

    return set_up


def _case(samples: int) -> Case:
    bars = [within(LIMIT, MAPPING_BAR), *BARS.get(samples, ())]
    set_up = _set_up(Setting(samples))
    return Case(f"N = {samples:,}", set_up, bars, quick=samples < 1_000_000, sizes={"N": samples})


def _drawn(generator: random.Random) -> Drawn:
    largest = {"samples": 1 << 20, "batch": 4096, "classes": 10_000}
    sizes = {name: log_uniform(generator, 2, most) for name, most in largest.items()}
    setting = Setting(**sizes, warmup=generator.choice([True, False]))
    case = Case(f"{setting}".removeprefix("Setting"), _set_up(setting))
    return Drawn(case, case)


def _verdicts(results):
    few, many = (results.get(f"N = {n:,}") for n in (SAMPLES[0], SAMPLES[-1]))
    if few and many:
        growth = many.median(OURS) / few.median(OURS)
        yield Verdict(
            f"flat: {growth:.2f} times the cost at {SAMPLES[-1] // SAMPLES[0]:,} times the samples "
            f"(at most {FLAT})",
            growth <= FLAT,
        )


METHOD = Method("flexmatch", [_case(samples) for samples in SAMPLES], _verdicts, families=[_drawn])
