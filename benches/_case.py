"""What a method's file is made of."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

OURS, PLAIN, LIMIT, TLLIB, COMPILED, COPY = "ours", "plain", "limit", "tllib", "compiled", "copy"
#: What ours replaces: it must never be slower than these.
REPLACED = (PLAIN, TLLIB, COMPILED)
TOLERANCE = 1e-4


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
    #: The part of ``step`` before backward, where there is one.
    forward: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Bar:
    """How ours is expected to compare with a provider: see :func:`faster` and :func:`within`."""

    provider: str
    factor: float
    #: True: at least ``factor`` times as fast. False: at most ``factor`` times as long.
    at_least: bool


def faster(provider: str, factor: float) -> Bar:
    """Ours is at least ``factor`` times as fast as ``provider``."""
    return Bar(provider, factor, at_least=True)


def within(provider: str, factor: float) -> Bar:
    """Ours takes at most ``factor`` times as long as ``provider``."""
    return Bar(provider, factor, at_least=False)


@dataclass(frozen=True)
class Case:
    """One setting of a method."""

    setting: str
    #: Makes the inputs and the providers. Called when the case runs, so that listing costs nothing.
    set_up: Callable[[], Mapping[str, Provider]]
    #: In addition to being no slower than any of :data:`REPLACED`.
    bars: Sequence[Bar] = ()
    #: Part of ``--quick``.
    quick: bool = True
    #: Small enough that starting threads would cost more than the work: part of ``--loaded``.
    small: bool = False
    #: Too large for a CPU: part of ``--device`` only.
    on_device: bool = False
    #: Which of a method's losses this is, where it has several.
    loss: str = ""
    #: The numbers in the setting by their symbols, for the growth curves.
    sizes: Mapping[str, int] = field(default_factory=dict)
    #: What :func:`check` accepts of a provider whose formula differs slightly.
    tolerances: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """A statement about measured figures, and whether it holds."""

    text: str
    met: bool


@dataclass(frozen=True)
class Footprint:
    """A loss at a size where its memory is judged; it is measured in a process of its own."""

    case: Case
    #: Bytes that a step is expected to need: a gradient for each differentiated input, and what ``holds``
    #: names besides.
    expected: int
    holds: str = "one gradient for each differentiated input"


@dataclass(frozen=True)
class Method:
    """All cases of a method."""

    stem: str
    cases: Sequence[Case]
    #: Verdicts from the results of all cases by setting; see :class:`benches._measure.Result`.
    verdicts: Callable[[Mapping[str, Any]], Iterable[Verdict]] = lambda results: ()
    footprints: Sequence[Footprint] = ()
    #: Draw settings at random: see :data:`benches._families.Family`.
    families: Sequence[Callable[[Any], Any]] = ()


def seeded() -> torch.Generator:
    """Random numbers for the inputs of a case, on the device that ``torch.device`` makes the default."""
    return torch.Generator(torch.get_default_device()).manual_seed(0)


def methods() -> dict[str, Method]:
    """Every method that has a file here, by stem."""
    package = importlib.import_module("benches")
    stems = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    return {stem: importlib.import_module(f"benches.{stem}").METHOD for stem in stems}


def check(case: Case, providers: Mapping[str, Provider]) -> None:
    """Raise :class:`Disagreement` unless all results equal those of the plain formulation, up to
    :data:`TOLERANCE` of the largest number in each (or what the case says).

    Where the plain formulation is too large to run, the first provider besides ours is what the others
    are compared with.
    """
    results = {name: p.result() for name, p in providers.items() if p.result is not None}
    against = PLAIN if PLAIN in results else next((name for name in results if name != OURS), None)
    if against is None:
        raise Disagreement(f"{case.setting}: nothing to compare ours with")
    expected = results.pop(against)
    for name, got in results.items():
        tolerance = case.tolerances.get(name, TOLERANCE)
        if len(got) != len(expected):
            raise Disagreement(f"{case.setting}: {name} has {len(got)} results, {against} {len(expected)}")
        for k, (x, reference) in enumerate(zip(got, expected, strict=True)):
            if x.shape != reference.shape:
                raise Disagreement(f"{case.setting}: result {k} of {name} has shape {tuple(x.shape)}")
            if torch.equal(x, reference):
                continue
            error = (x.double() - reference.double()).abs().max().item() if x.numel() else 0.0
            scale = reference.double().abs().max().item() if x.numel() else 0.0
            # Written so that NaN fails.
            if not error <= tolerance * scale:
                raise Disagreement(
                    f"{case.setting}: result {k} of {name} is off by {error:.3g}, largest number {scale:.3g}"
                )
