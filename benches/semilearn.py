"""USB's thresholding hook of FlexMatch: a step of the one that USB has, before, and of ours, after."""

import importlib.util
import itertools
import types
import warnings

import torch

from benches._case import OURS, PLAIN, Case, Method, Provider, seeded

BATCH, CLASSES, CUTOFF = 448, 100, 0.95
SAMPLES = [1_000, 50_000, 1_000_000]
BATCHES = 64


def _hooks():
    """USB's and ours. Imported when a case runs: semilearn takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations in what semilearn imports
        from semilearn.algorithms.flexmatch import FlexMatchThresholdingHook as Original

        from tllib_rs.integrations.semilearn import FlexMatchThresholdingHook
    return {OURS: FlexMatchThresholdingHook, PLAIN: Original}


def _case(samples: int) -> Case:
    def set_up():
        generator = seeded()
        # Half of the samples are not selected yet.
        state = torch.randint(-CLASSES, CLASSES, (samples,), generator=generator).clamp_(min=-1)
        batches = []
        for _ in range(BATCHES):
            indices = torch.randint(samples, (BATCH,), generator=generator).unique()
            logits = 4 * torch.randn(len(indices), CLASSES, generator=generator)
            batches.append((logits.softmax(dim=1), indices))
        algorithm = types.SimpleNamespace(p_cutoff=CUTOFF)

        def provider(kind):
            hook = kind(samples, CLASSES)
            hook.selected_label = state.clone()
            forever = itertools.cycle(batches)

            def step():
                probabilities, indices = next(forever)
                return hook.masking(algorithm, probabilities, indices, softmax_x_ulb=False)

            def result():
                masks = [step() for _ in range(3)]
                return [*masks, hook.classwise_acc.clone(), hook.selected_label.clone()]

            return Provider(step, result)

        return {name: provider(kind) for name, kind in _hooks().items()}

    return Case(f"N = {samples:,}", set_up, quick=samples < 1_000_000)


_INSTALLED = importlib.util.find_spec("semilearn") is not None
if not _INSTALLED:
    print("semilearn is not installed, its hook is left out")
METHOD = Method("semilearn", [_case(samples) for samples in SAMPLES] if _INSTALLED else [])
