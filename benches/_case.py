"""What a method's file is made of."""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

OURS, PLAIN, LIMIT, TLLIB = "ours", "plain", "limit", "tllib"


class Disagreement(AssertionError):
    """Providers that should compute the same do not."""


@dataclass(frozen=True)
class Provider:
    """One implementation of a case's step."""

    #: What is timed.
    step: Callable[[], Any]
    #: Values and gradients after some steps, to be compared; ``None`` for a limit. Called once, before
    #: ``step``.
    result: Callable[[], Sequence[torch.Tensor]] | None


@dataclass(frozen=True)
class Case:
    """One setting of a method."""

    setting: str
    #: Makes the inputs and the providers. Called when the case runs, so that listing costs nothing.
    set_up: Callable[[], Mapping[str, Provider]]
    #: How many times faster than a provider ours is expected to be, by the provider's name.
    bars: Mapping[str, float] | None = None
    #: Part of ``--quick``.
    quick: bool = True
    #: Small enough that starting threads would cost more than the work: part of ``--loaded``.
    small: bool = False


@dataclass(frozen=True)
class Verdict:
    """A statement about measured figures, and whether it holds."""

    text: str
    met: bool


@dataclass(frozen=True)
class Method:
    """All cases of a method."""

    stem: str
    cases: Sequence[Case]
    #: Verdicts from the results of all cases by setting; see :class:`benches._measure.Result`.
    verdicts: Callable[[Mapping[str, Any]], Iterable[Verdict]] = lambda results: ()


def methods() -> dict[str, Method]:
    """Every method that has a file here, by stem."""
    package = importlib.import_module("benches")
    stems = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    return {stem: importlib.import_module(f"benches.{stem}").METHOD for stem in stems}


def original(module: str) -> ModuleType | None:
    """A module of the original tllib, or ``None`` where it does not import (it needs old versions)."""
    if importlib.util.find_spec("tllib") is None:
        return None
    try:
        return importlib.import_module(f"tllib.{module}")
    except (ImportError, AttributeError) as error:
        print(f"tllib.{module} does not import, left out: {error}")
        return None


def check(case: Case, providers: Mapping[str, Provider], tolerance: float = 1e-4) -> None:
    """Raise :class:`Disagreement` unless all results equal those of the plain formulation, up to
    ``tolerance`` of the largest number in each."""
    results = {name: p.result() for name, p in providers.items() if p.result is not None}
    expected = results.pop(PLAIN)
    for name, got in results.items():
        if len(got) != len(expected):
            raise Disagreement(f"{case.setting}: {name} has {len(got)} results, plain {len(expected)}")
        for k, (x, reference) in enumerate(zip(got, expected, strict=True)):
            if x.shape != reference.shape:
                raise Disagreement(f"{case.setting}: result {k} of {name} has shape {tuple(x.shape)}")
            error = (x.double() - reference.double()).abs().max().item() if x.numel() else 0.0
            scale = reference.double().abs().max().item() if x.numel() else 0.0
            # Written so that NaN fails.
            if not error <= tolerance * scale:
                raise Disagreement(
                    f"{case.setting}: result {k} of {name} is off by {error:.3g}, largest number {scale:.3g}"
                )
