"""Implementations that are not ours: the original, other packages, the output of torch.compile."""

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType

import torch

from benches._case import COMPILED, Case, Provider, check
from tools.original import Source, find_tllib, tllib_from


@functools.cache
def _tllib() -> Source | None:
    package = find_tllib()
    return package and tllib_from(package)


def original(module: str, name: str) -> Callable | None:
    """A name from a module of the original tllib, or ``None`` if there is none, or it does not run with
    this torch."""
    source = _tllib()
    if source is None:
        return None
    try:
        return source(module, name)
    except (ImportError, AttributeError) as error:
        print(f"tllib.{module}.{name} does not import, left out: {error}")
        return None


@functools.cache
def package(name: str) -> ModuleType | None:
    """A package of the extra ``bench``, or ``None`` and one printed line where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"{name} is left out: {error}")
        return None


def compiled(function: Callable) -> Callable:
    """``function`` under ``torch.compile``, specialized to the shapes it sees. Compiles at its first call."""
    # One function at several shapes would reach dynamo's recompile limit and silently run uncompiled.
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def prepare(case: Case, *, compiled: bool, device: str = "cpu") -> tuple[dict[str, Provider], dict[str, str]]:
    """Set a case up and compare its providers; return those that run, and why the others do not (inductor
    does not take every formula). Compiling takes seconds, so it is done only if ``compiled``."""
    with torch.device(device):
        providers, left_out = dict(case.set_up()), {}
    if not compiled and providers.pop(COMPILED, None):
        left_out[COMPILED] = "it takes seconds"
    if COMPILED in providers:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own
                providers[COMPILED].step()
        except Exception as error:
            left_out[COMPILED] = reason(error)
            del providers[COMPILED]
    check(case, providers)
    return providers, left_out
