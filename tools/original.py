"""Where the original tllib is, and how it is imported: for whatever compares us with it.

Its modules are imported under packages without their ``__init__`` (which ask for names that torchvision no
longer has, and for packages that no loss needs), and with ``numpy.float`` back; both in this process only.
"""

import importlib
import importlib.util
import os
import pathlib
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

#: Gives a name out of a module: ``source("self_training.mcc", "MinimumClassConfusionLoss")``.
Source = Callable[[str, str], Any]


def find_tllib() -> pathlib.Path | None:
    """The folder of the package ``tllib``: of the checkout that ``TLLIB_DIR`` names, else of the installed
    one; ``None`` where there is none."""
    if folder := os.environ.get("TLLIB_DIR"):
        package = pathlib.Path(folder, "tllib")
        if not (package / "self_training").is_dir():
            sys.exit(f"TLLIB_DIR={folder} holds no tllib/self_training")
        return package
    spec = importlib.util.find_spec("tllib")
    return pathlib.Path(next(iter(spec.submodule_search_locations))) if spec else None


def tllib_from(package: pathlib.Path) -> Source:
    """A function that gives names out of the tllib in ``package``."""
    if not hasattr(np, "float"):
        setattr(np, "float", float)  # noqa: B010  (modules.grl calls it, and linters rewrite the plain form)
    for name in ("", ".modules", ".self_training", ".vision", ".vision.models", ".vision.models.reid"):
        module = sys.modules[f"tllib{name}"] = types.ModuleType(f"tllib{name}")
        module.__path__ = [str(package.joinpath(*name.split(".")))]

    def source(stem: str, name: str) -> Any:
        # Backslashes in its docstrings are errors where warnings are.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(importlib.import_module(f"tllib.{stem}"), name)

    return source
