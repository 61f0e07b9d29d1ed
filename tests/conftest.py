"""Shared fixtures."""

import importlib
import pathlib
import sys

import pytest
import torch

STANDIN = str(pathlib.Path(__file__).parent / "standin")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def generator():
    """A seeded generator."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def precision(request):
    """Each precision of the golden values, also as the default dtype, as when they were recorded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.fixture
def standin(monkeypatch):
    """Imports from the stand-in under tllib's names."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "tllib"}
    monkeypatch.syspath_prepend(STANDIN)
    yield lambda stem, name: getattr(importlib.import_module(f"tllib.{stem}"), name)
    for name in list(sys.modules):
        if name.partition(".")[0] == "tllib":
            del sys.modules[name]
    sys.modules.update(before)
