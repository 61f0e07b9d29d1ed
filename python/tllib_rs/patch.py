"""tllib with our classes inside: ``patch_tllib()``.

A module of tllib that is not imported yet is ours from the start: it is put into ``sys.modules`` under
tllib's name, so that tllib's own file never runs and its packages need not be importable. In a module that is
already imported, the public names are replaced.

Python finds ``tllib.vision.models.reid.loss`` in ``sys.modules`` without importing the packages above it,
which is why ``from tllib.vision.models.reid.loss import SoftTripletLoss`` works although
``tllib.vision.models`` cannot be imported today. ``import tllib.vision.models.reid.loss`` also reads the
attributes along the path, and those are added to tllib's packages here. A package that fails to import still
raises its own error wherever it is imported directly; a placeholder replaces it only on the path to one of
our modules. If ``tllib`` itself cannot be imported, ``import tllib...`` fails as it does unpatched (the name
that it binds is ``tllib``), and so does ``from tllib.self_training import mcc``, which imports the package;
``from tllib.self_training.mcc import ...`` works.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType, TracebackType
from typing import Any

__all__ = ["PROVIDED", "Patch", "patch_tllib"]

#: Every module that we provide, by its path below ``tllib`` and below ``tllib_rs``.
PROVIDED = (
    "modules.classifier",
    "modules.entropy",
    "modules.grl",
    "self_training.cc_loss",
    "self_training.dst",
    "self_training.flexmatch",
    "self_training.mcc",
    "self_training.mean_teacher",
    "self_training.pi_model",
    "self_training.pseudo_label",
    "self_training.self_ensemble",
    "self_training.self_tuning",
    "self_training.uda",
    "vision.models.reid.loss",
)


def _parents(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name


_MODULES = {f"tllib.{stem}": f"tllib_rs.{stem}" for stem in PROVIDED}
_PACKAGES = frozenset(parent for name in _MODULES for parent in _parents(name))


class Patch(Mapping[str, Any]):
    """What :func:`patch_tllib` replaced, by dotted name, with :meth:`undo`.

    Also a context manager, which undoes the patch at its end.
    """

    def __init__(self) -> None:
        self._originals: dict[str, Any] = {}
        self._uses = 0
        self._before: frozenset[str] = frozenset()
        self._served: dict[str, ModuleType] = {}
        self._finder = _PackageFinder()
        self._rebound: list[tuple[ModuleType, str, Any]] = []
        self._reclassed: list[tuple[ModuleType, type[ModuleType]]] = []

    def __getitem__(self, name: str) -> Any:
        return self._originals[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._originals)

    def __len__(self) -> int:
        return len(self._originals)

    def __repr__(self) -> str:
        state = "in place" if self._uses else "undone"
        return f"<tllib patch, {state}: {len(self)} names replaced, {len(self._served)} modules served>"

    @property
    def served(self) -> tuple[str, ...]:
        """The modules that are ours from the start, under tllib's names."""
        return tuple(self._served)

    def undo(self) -> None:
        """Restore what was replaced. Does nothing if it is already undone.

        tllib's modules that were imported meanwhile contain our classes: they are removed from
        ``sys.modules``, and the next import loads them again. If :func:`patch_tllib` was called several
        times, only the last undo takes effect.
        """
        if not self._uses:
            return
        self._uses -= 1
        if not self._uses:
            self._restore()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def _apply(self) -> None:
        # All of ours are imported before anything changes: one that is missing raises here.
        ours = {name: importlib.import_module(own) for name, own in _MODULES.items()}
        self._before = frozenset(_imported())
        replacements = self._replace(ours)
        self._rebind(replacements)
        for name, module in ours.items():
            if name not in self._before:
                self._served[name] = sys.modules[name] = module
        for name in _PACKAGES & self._before:
            self._reclass(sys.modules[name], self._finder.attributes(name))
        sys.meta_path.insert(0, self._finder)

    def _replace(self, ours: Mapping[str, ModuleType]) -> dict[int, tuple[Any, Any]]:
        """Replace the public names of imported modules; returns (original, ours) by the original's id."""
        replacements = {}
        for name in ours.keys() & self._before:
            module, own = sys.modules[name], ours[name]
            attributes = {}
            for public in own.__all__:
                attributes[public] = _Replaced(getattr(own, public))
                if public in vars(module):
                    original = self._originals[f"{name}.{public}"] = vars(module)[public]
                    replacements[id(original)] = (original, getattr(own, public))
            self._reclass(module, attributes)
        return replacements

    def _rebind(self, replacements: Mapping[int, tuple[Any, Any]]) -> None:
        """Replace names that tllib's modules imported from each other by ``from ... import``."""
        for name in self._before:
            module = sys.modules[name]
            for bound, value in list(vars(module).items()):
                original, own = replacements.get(id(value), (None, None))
                if original is None or getattr(original, "__module__", None) == name:
                    # In the defining module the original stays a global: its methods call
                    # ``super(ItsName, self)``, which must still find the original.
                    continue
                self._rebound.append((module, bound, original))
                self._originals[f"{name}.{bound}"] = original
                setattr(module, bound, own)

    def _reclass(self, module: ModuleType, attributes: Mapping[str, Any]) -> None:
        self._reclassed.append((module, type(module)))
        module.__class__ = type("module", (type(module),), dict(attributes))

    def _restore(self) -> None:
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        for name in _imported():
            if name not in self._before:
                _forget(name)
        for module, kind in reversed(self._reclassed):
            module.__class__ = kind
        for module, bound, original in self._rebound:
            setattr(module, bound, original)
        self._served, self._reclassed, self._rebound = {}, [], []


class _Replaced:
    """A public name of an imported module: attribute access on the module returns ours.

    The module's own functions look it up in its ``__dict__``, which keeps the original.
    """

    def __init__(self, value: Any):
        self.value = value

    def __get__(self, module: ModuleType | None, kind: type | None = None) -> Any:
        return self.value

    def __set__(self, module: ModuleType, value: Any) -> None:
        self.value = value


class _PackageFinder:
    """Finds tllib's packages where they are, and gives them the attributes that lead to our modules."""

    def __init__(self) -> None:
        self._broken: dict[str, ModuleType] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that the other finders give, with module creation hooked."""
        if name not in _PACKAGES:
            return None
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            if finder is self or find is None:
                continue
            if (spec := find(name, path, target)) is not None:
                self._create_with_attributes(spec)
                return spec
        return None

    def attributes(self, package: str) -> dict[str, "_Child"]:
        """The attributes of ``package`` that lead to our modules."""
        names = [n for n in (*_MODULES, *_PACKAGES) if n.rpartition(".")[0] == package]
        return {name.rpartition(".")[2]: _Child(name, self) for name in names}

    def child(self, name: str) -> Any:
        """One of our modules, or a package on the path to one."""
        if name in sys.modules or name in self._broken:
            return sys.modules.get(name) or self._broken[name]
        try:
            return importlib.import_module(name)
        except Exception:
            kind = type("module", (_Broken,), dict(self.attributes(name)))
            return self._broken.setdefault(name, kind(name))

    def _create_with_attributes(self, spec: importlib.machinery.ModuleSpec) -> None:
        # Not a wrapper around the loader: its frame would appear in the traceback of every error that tllib
        # raises while it is imported.
        loader = spec.loader or _NamespaceLoader()
        create = loader.create_module

        def create_module(spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
            module = create(spec)
            if spec.name not in _PACKAGES:
                return module
            base = ModuleType if module is None else type(module)
            kind = type("module", (base,), dict(self.attributes(spec.name)))
            if module is None:
                return kind(spec.name)
            module.__class__ = kind
            return module

        loader.create_module = create_module  # type: ignore[method-assign]
        spec.loader = loader


class _Child:
    """The attribute of a package that leads to one of our modules, until an import binds the real one."""

    def __init__(self, name: str, finder: _PackageFinder):
        self.name, self.finder = name, finder

    def __get__(self, package: ModuleType | None, kind: type | None = None) -> Any:
        if sys._getframe(1).f_globals is vars(importlib._bootstrap):  # type: ignore[attr-defined]
            # ``from package import name``: without the attribute Python imports the module itself, and a
            # package that fails to import raises its own error, with its own traceback.
            raise AttributeError(self.name)
        return self.finder.child(self.name)


class _Broken(ModuleType):
    """Placeholder for a package that fails to import, on the path to one of our modules below it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(self.__name__), name)  # raises the package's own error


class _NamespaceLoader:
    """For packages without an ``__init__``, which have no loader yet when they are found."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def _imported() -> list[str]:
    return [
        name
        for name, module in list(sys.modules.items())
        if (name == "tllib" or name.startswith("tllib.")) and isinstance(module, ModuleType)
    ]


def _forget(name: str) -> None:
    module = sys.modules.pop(name)
    parent, _, child = name.rpartition(".")
    if parent in sys.modules and vars(sys.modules[parent]).get(child) is module:
        delattr(sys.modules[parent], child)


_patch = Patch()


def patch_tllib() -> Patch:
    """Replace the classes and functions of tllib that we provide by ours.

    In modules that are already imported the names are replaced, also where other modules of tllib imported
    them by ``from ... import``; modules that are imported later are ours from the start (see
    :mod:`tllib_rs.patch`). Names that your own code imported from tllib earlier are not replaced: patch
    first, then import.

    The classes are not tllib's classes. Existing objects keep working and keep their class, so
    ``isinstance`` of an old object and a new class is False, as it is for existing subclasses of tllib's
    own class; state dicts load in both directions.

    Returns:
        What was replaced in imported modules, ``{"tllib.self_training.mcc.ImageClassifier": <class ...>}``,
        with ``undo()``; also a context manager. A second call returns the same object and needs a second
        ``undo()``.

    Raises:
        ImportError: one of our modules cannot be imported. Nothing is replaced then.

    Examples::

        >>> replaced = tllib_rs.patch_tllib()
        >>> from tllib.self_training.mcc import MinimumClassConfusionLoss  # ours
        >>> replaced.undo()
        >>> with tllib_rs.patch_tllib():
        ...     import train
    """
    global _patch
    if not _patch._uses:
        patch = Patch()
        patch._apply()
        _patch = patch
    _patch._uses += 1
    return _patch
