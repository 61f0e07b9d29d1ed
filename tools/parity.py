"""Compare with the original tllib, live: ``TLLIB_DIR=<checkout> python tools/parity.py [--seed N]``.

Every loss runs on fresh random inputs, and small networks train with both libraries side by side for 20
steps; values, gradients and losses must agree. Without ``TLLIB_DIR`` an installed tllib is taken; where there
is none either, one line says so and nothing is compared.

``original.py`` says how tllib's modules are imported.
"""

import argparse
import dataclasses
import importlib
import math
import random
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from original import Source, find_tllib, tllib_from
from parity_trainings import REID, STEPS, TRAININGS, compare_training, default_dtype

ROWS, CLASSES = 24, 7
#: Accepted: in float64 this relative error; in float32 four times tllib's own error or this one.
REL64, REL32 = 1e-10, 2e-6


def ours(stem: str, name: str) -> Any:
    """The same names out of our package."""
    return getattr(importlib.import_module(f"tllib_rs.{stem}"), name)


# ------------------------------------------------------------------------------------------------ losses


@dataclasses.dataclass(frozen=True)
class Loss:
    """One call on random inputs."""

    name: str
    #: The callable, from where the names come from.
    build: Callable[[Source], Callable[..., Any]]
    #: Its inputs, float64 or int64.
    inputs: Callable[[torch.Generator], Iterable[torch.Tensor]]


def logits(count: int, scale: float = 3.0) -> Callable[[torch.Generator], Iterable[torch.Tensor]]:
    """Matrices of logits, exact in float32."""
    return lambda g: [scale * torch.randn(ROWS, CLASSES, generator=g) for _ in range(count)]


def probabilities(count: int) -> Callable[[torch.Generator], Iterable[torch.Tensor]]:
    """Matrices whose rows sum to 1."""
    return lambda g: [z.softmax(dim=1) for z in logits(count)(g)]


def features(count: int) -> Callable[[torch.Generator], Iterable[torch.Tensor]]:
    """Matrices of features, and the identities of their rows."""

    def make(g: torch.Generator) -> Iterable[torch.Tensor]:
        return [*logits(count, 1.0)(g), identities(g)]

    return make


def identities(g: torch.Generator) -> torch.Tensor:
    """A label for each row."""
    return torch.randint(5, (ROWS,), generator=g)


def with_mask(g: torch.Generator) -> Iterable[torch.Tensor]:
    """Two predictions and a mask."""
    return [*probabilities(2)(g), (torch.rand(ROWS, generator=g) > 0.4).float()]


def memory(g: torch.Generator) -> Iterable[torch.Tensor]:
    """Features with identities, twice."""
    return [*features(1)(g), *features(1)(g)]


def with_labels(g: torch.Generator) -> Iterable[torch.Tensor]:
    """Logits and a class for each row."""
    return [*logits(1)(g), torch.randint(CLASSES, (ROWS,), generator=g)]


def call(stem: str, name: str, *arguments: Any, **options: Any) -> Callable[[Source], Any]:
    """An instance of a class."""
    return lambda source: source(stem, name)(*arguments, **options)


def function(stem: str, name: str, *last: Any) -> Callable[[Source], Any]:
    """A function, with its last arguments given."""
    return lambda source: lambda *inputs: source(stem, name)(*inputs, *last)


def warm_reversal(source: Source) -> Callable[..., Any]:
    """The reversal layer after some steps."""
    layer = source("modules.grl", "WarmStartGradientReverseLayer")(alpha=1.3, lo=0.1, hi=0.9, max_iters=11)
    for _ in range(5):
        layer.step()
    return layer


SOFT = (REID, "SoftTripletLoss")
LOSSES = [
    Loss("cc_loss", call("self_training.cc_loss", "CCConsistency", 1.5, 0.4), logits(2)),
    Loss("cc_loss, nothing chosen", call("self_training.cc_loss", "CCConsistency", 1.5, 1.1), logits(2)),
    Loss("dst", call("self_training.dst", "WorstCaseEstimationLoss", 1.7), logits(4)),
    Loss("dst shift_log", function("self_training.dst", "shift_log"), probabilities(1)),
    Loss("entropy", function("modules.entropy", "entropy"), probabilities(1)),
    Loss("entropy mean", function("modules.entropy", "entropy", "mean"), probabilities(1)),
    Loss("grl", call("modules.grl", "GradientReverseLayer"), logits(1)),
    Loss("grl warm start", warm_reversal, logits(1)),
    Loss("mcc", call("self_training.mcc", "MinimumClassConfusionLoss", 2.5), logits(1)),
    Loss("pi_model", call("self_training.pi_model", "L2ConsistencyLoss"), probabilities(2)),
    Loss("pi_model mask, sum", call("self_training.pi_model", "L2ConsistencyLoss", "sum"), with_mask),
    Loss(
        "pi_model callable",
        call("self_training.pi_model", "ConsistencyLoss", lambda p, q: (p - q).abs().sum(dim=1), "none"),
        probabilities(2),
    ),
    Loss(
        "pseudo_label",
        call("self_training.pseudo_label", "ConfidenceBasedSelfTrainingLoss", 0.6),
        logits(2),
    ),
    Loss("reid cross entropy", call(REID, "CrossEntropyLoss"), logits(2)),
    Loss(
        "reid label smooth",
        call(REID, "CrossEntropyLossWithLabelSmooth", CLASSES, epsilon=0.2),
        with_labels,
    ),
    Loss("reid pairwise", function(REID, "pairwise_euclidean_distance"), logits(2, 1.0)),
    Loss("reid soft triplet", call(*SOFT), features(2)),
    Loss("reid soft triplet margin", call(*SOFT, margin=0.3), features(2)),
    Loss("reid soft triplet normalized", call(*SOFT, normalize_feature=True), features(2)),
    Loss("reid triplet", call(REID, "TripletLoss", 0.3), features(1)),
    Loss("reid triplet xbm", call(REID, "TripletLossXBM"), memory),
    Loss("self_ensemble", call("self_training.self_ensemble", "ClassBalanceLoss", CLASSES), probabilities(1)),
    Loss("uda", call("self_training.uda", "StrongWeakConsistencyLoss", 0.5, 0.8), logits(2)),
]


def evaluate(loss: Loss, source: Source, inputs: Iterable[torch.Tensor], dtype: torch.dtype) -> list[Any]:
    """Outputs, then the gradient of each floating-point input (None where there is none)."""
    with default_dtype(dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() if x.is_floating_point() else x for x in inputs]
        outputs = loss.build(source)(*leaves)
        outputs = [torch.as_tensor(o) for o in (outputs if isinstance(outputs, tuple) else (outputs,))]
        weights = torch.Generator().manual_seed(1)
        total = sum(
            (o * torch.rand(o.shape, generator=weights, dtype=torch.float64).to(dtype)).sum()
            for o in outputs
            if o.requires_grad
        )
        if isinstance(total, torch.Tensor):
            total.backward()
        return [o.detach() for o in outputs] + [x.grad for x in leaves if x.is_floating_point()]


def error(value: torch.Tensor | None, reference: torch.Tensor | None) -> float:
    """The largest difference over the largest reference; tllib leaves a gradient out where it is zero."""
    if value is None or reference is None:
        other = reference if value is None else value
        return 0.0 if other is None or not other.any() else math.inf
    if value.shape != reference.shape:
        return math.inf
    difference = (value.double() - reference.double()).abs().max().item()
    if math.isnan(difference):
        return math.inf
    return difference / max(reference.double().abs().max().item(), 1e-30) if difference else 0.0


def compare(loss: Loss, tllib: Source, generator: torch.Generator) -> float:
    """The worst error as a share of what is accepted."""
    inputs = [x.float() if x.is_floating_point() else x for x in loss.inputs(generator)]
    runs = {
        (source, dtype): evaluate(loss, source, inputs, dtype)
        for source in (tllib, ours)
        for dtype in (torch.float64, torch.float32)
    }
    shares = []
    for i, reference in enumerate(runs[tllib, torch.float64]):
        own = error(runs[tllib, torch.float32][i], reference)
        shares.append(error(runs[ours, torch.float64][i], reference) / REL64)
        shares.append(error(runs[ours, torch.float32][i], reference) / max(4 * own, REL32))
    return max(shares)


# -------------------------------------------------------------------------------------------------- main


def report(name: str, share: Callable[[], float]) -> bool:
    """Run one comparison and print its line."""
    try:
        worst = share()
    except Exception as problem:
        print(f"FAILED  {name:<34} {type(problem).__name__}: {problem}")
        return False
    print(f"{'ok' if worst <= 1 else 'FAILED':<7} {name:<34} {worst:8.2g} of what is accepted")
    return worst <= 1


def main() -> int:
    """Compare everything; the exit status says whether all agreed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    seed = parser.parse_args().seed
    package = find_tllib()
    if package is None:
        print(
            "parity: no tllib here (none is installed, and TLLIB_DIR names no checkout): nothing was compared"
        )
        return 0
    print(f"parity with {package}, --seed {seed}")
    torch.set_num_threads(1)
    tllib = tllib_from(package)
    generator = torch.Generator().manual_seed(seed)
    agreed = [report(loss.name, lambda loss=loss: compare(loss, tllib, generator)) for loss in LOSSES]
    for name, make in TRAININGS.items():
        agreed.append(
            report(f"{STEPS} steps of {name}", lambda make=make: compare_training(make, tllib, ours, seed))
        )
    print(f"{sum(agreed)} of {len(agreed)} agree")
    return 0 if all(agreed) else 1


if __name__ == "__main__":
    sys.exit(main())
