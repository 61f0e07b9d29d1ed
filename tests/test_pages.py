"""The pages under docs/ all have one structure, and show the signatures that the code has."""

import ast
import importlib
import inspect
import pathlib
import re
from types import ModuleType

import pytest
import torch
from torch import nn

from tllib_rs.patch import PROVIDED

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
METHODS = sorted((DOCS / "methods").glob("*.md"))
HEADINGS = [
    "Purpose",
    "Paper",
    "Formula",
    "Signature",
    "Shapes and errors",
    "Example",
    "Differences from tllib",
    "Benchmark",
]
#: ```py title="the.module": a stub of all its public names.
STUB = re.compile(r'^```py title="([\w.]+)"\n(.*?)^```', re.MULTILINE | re.DOTALL)
STUBS = [
    pytest.param(*found, id=found[0])
    for page in sorted(DOCS.rglob("*.md"))
    for found in STUB.findall(page.read_text())
]


def _stub(module: ModuleType) -> str:
    """All public names of a module as the pages write them, one definition a line."""
    lines = []
    for name in module.__all__:
        value = getattr(module, name)
        lines += _class(value) if inspect.isclass(value) else [_definition(name, value)]
    return "\n".join(lines) + "\n"


def _class(cls: type) -> list[str]:
    bases = ", ".join(_base(base, cls) for base in cls.__bases__ if base is not object)
    members = []
    for name, member in vars(cls).items():
        if name in ("__init__", "__call__") or not (name.startswith("_") or name == "extra_repr"):
            members += _member(name, member)
    head = f"class {cls.__name__}({bases}):" if bases else f"class {cls.__name__}:"
    return [head, *(f"    {line}" for line in members or ["..."])]


def _base(base: type, cls: type) -> str:
    if base.__module__ == cls.__module__:
        return base.__name__
    if base.__module__.startswith("tllib_rs"):
        return f"{base.__module__.rpartition('.')[2]}.{base.__name__}"
    return {nn.Module: "nn.Module", torch.autograd.Function: "Function"}[base]


def _member(name: str, member: object) -> list[str]:
    if isinstance(member, property):
        return ["@property", _definition(name, member.fget)]
    if isinstance(member, staticmethod):
        return ["@staticmethod", _definition(name, member.__func__)]
    return [_definition(name, member)] if inspect.isfunction(member) else []


def _definition(name: str, function: object) -> str:
    signature = str(inspect.signature(function))
    for long, short in (
        ("torch.nn.modules.module.Module", "nn.Module"),
        ("torch.distributed.distributed_c10d.ProcessGroup", "ProcessGroup"),
        ("collections.abc.", ""),
        ("typing.", ""),
        ("torch.distributed.distributed_c10d.", ""),
    ):
        signature = signature.replace(long, short)
    return f"def {name}{signature}: ..."


def test_every_method_has_its_page():
    stems = {"reid_loss", *(s.removeprefix("self_training.") for s in PROVIDED if "self_training" in s)}
    assert {page.stem for page in METHODS} == stems


@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.stem)
def test_one_form(page):
    text = page.read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == HEADINGS
    sections = dict(zip(HEADINGS, re.split(r"^## .*$", text, flags=re.MULTILINE)[1:], strict=True))
    assert re.search(r"\]\(https?://", sections["Paper"])
    assert "$$" in sections["Formula"]
    assert STUB.search(sections["Signature"])
    assert "Error" in sections["Shapes and errors"]
    assert text.count("```python") == sections["Example"].count("```python") == 1


@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.stem)
def test_benchmarks_that_exist_are_named(page):
    """The page of a method with a benchmark shows the command that runs it."""
    named = re.findall(r"python -m benches (\w+)", page.read_text())
    assert named == ([page.stem] if (ROOT / "benches" / f"{page.stem}.py").exists() else [])


def test_every_module_has_its_signatures_on_one_page():
    titles = [stub.values[0] for stub in STUBS]
    assert sorted(titles) == sorted(f"tllib_rs.{stem}" for stem in PROVIDED)


@pytest.mark.parametrize(("module", "block"), STUBS)
def test_signatures(module, block):
    expected = _stub(importlib.import_module(module))
    assert ast.unparse(ast.parse(block)) == ast.unparse(ast.parse(expected)), f"expected:\n{expected}"
