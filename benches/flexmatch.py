"""FlexMatch: one step is the thresholds of a batch and the update with it."""

import itertools

import torch

from benches._case import LIMIT, OURS, PLAIN, TLLIB, Case, Method, Provider, Verdict, original
from tests.plain.flexmatch import DynamicThresholdingModule as Plain
from tllib_rs.self_training.flexmatch import DynamicThresholdingModule

BATCH, CLASSES, THRESHOLD = 448, 100, 0.95
SAMPLES = [1_000, 50_000, 1_281_167, 10_000_000]
BARS = {50_000: {PLAIN: 10.0}, 1_281_167: {PLAIN: 300.0}}
#: At most what a step at 10^7 samples may cost of one at 10^3.
FLAT = 1.5
#: Different batches, so that the labels they touch do not all stay in the nearest cache.
BATCHES = 64


def _mapping(status):
    return status / (2 - status)


def _case(samples: int) -> Case:
    def set_up():
        generator = torch.Generator().manual_seed(0)

        def integers(high, size):
            return torch.randint(high, (size,), generator=generator)

        everyone = torch.arange(samples)
        known = (torch.rand(samples, generator=generator) < 0.5).float()
        first = integers(CLASSES, samples)
        batches = [
            (integers(samples, BATCH), integers(2, BATCH).float(), integers(CLASSES, BATCH))
            for _ in range(BATCHES)
        ]

        def provider(kind):
            module = kind(THRESHOLD, True, _mapping, CLASSES, samples, "cpu")
            module.update(everyone, known, first)
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

        tllib = original("self_training.flexmatch")
        kinds = {
            OURS: DynamicThresholdingModule,
            PLAIN: Plain,
            TLLIB: tllib and tllib.DynamicThresholdingModule,
        }
        status = torch.rand(BATCH, generator=generator)
        limit = Provider(lambda: THRESHOLD * _mapping(status), None)
        return {name: provider(kind) for name, kind in kinds.items() if kind} | {LIMIT: limit}

    return Case(f"N = {samples:,}", set_up, BARS.get(samples), quick=samples < 1_000_000)


def _verdicts(results):
    few, many = (results.get(f"N = {n:,}") for n in (SAMPLES[0], SAMPLES[-1]))
    if few and many:
        growth = many.median(OURS) / few.median(OURS)
        yield Verdict(
            f"flat: {growth:.2f} times the cost at {SAMPLES[-1] // SAMPLES[0]:,} times the samples "
            f"(at most {FLAT})",
            growth <= FLAT,
        )


METHOD = Method("flexmatch", [_case(samples) for samples in SAMPLES], _verdicts)
