"""tllib with our classes inside, on the stand-in package of tests/standin."""

import copy
import importlib
import pathlib
import pickle
import subprocess
import sys

import pytest
import torch

import tllib_rs
from tllib_rs.patch import PROVIDED, patch_tllib

STANDIN = str(pathlib.Path(__file__).parent / "standin")


def _of_the_standin(name):
    return name.partition(".")[0] in ("tllib", "torchvision")


@pytest.fixture(autouse=True)
def _standin(monkeypatch):
    """The stand-in is the tllib and the torchvision of a test, and is removed afterwards."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _of_the_standin(name)}
    monkeypatch.syspath_prepend(STANDIN)
    finders = list(sys.meta_path)
    yield
    for name in list(sys.modules):
        if _of_the_standin(name):
            del sys.modules[name]
    sys.modules.update(before)
    assert sys.meta_path == finders, "a test left the patch in place"


@pytest.fixture
def patched():
    with patch_tllib() as patch:
        yield patch


def _run(source):
    """Run statements as a script would, and return its names."""
    names = {"__name__": "script"}
    exec(compile(source, "script.py", "exec"), names)
    return names


@pytest.mark.parametrize("stem", PROVIDED)
def test_every_provided_module_is_ours_from_the_start(patched, stem):
    ours = importlib.import_module(f"tllib_rs.{stem}")
    for public in ours.__all__:
        got = _run(f"from tllib.{stem} import {public}")[public]
        assert got is getattr(ours, public)
    assert f"tllib.{stem}" in patched.served


def test_the_list_is_complete():
    """A module of ours that mirrors one of tllib's cannot be forgotten in the list."""
    root = pathlib.Path(tllib_rs.__file__).parent
    for folder in ("modules", "self_training", "vision"):
        for file in (root / folder).rglob("*.py"):
            parts = file.relative_to(root).with_suffix("").parts
            if not any(part.startswith("_") for part in parts):
                assert ".".join(parts) in PROVIDED


def test_stand_in_breaks_where_tllib_does():
    with pytest.raises(ImportError, match="cannot import name 'model_urls'"):
        importlib.import_module("tllib.vision.models.reid.loss")
    grl = importlib.import_module("tllib.modules.grl")
    with pytest.raises(AttributeError, match="'numpy' has no attribute 'float'"):
        grl.WarmStartGradientReverseLayer()(torch.zeros(2))


@pytest.mark.parametrize(
    "statement",
    [
        "from tllib.vision.models.reid.loss import SoftTripletLoss",
        "import tllib.vision.models.reid.loss as loss; SoftTripletLoss = loss.SoftTripletLoss",
        "import tllib.vision.models.reid.loss as _, tllib; "
        "SoftTripletLoss = tllib.vision.models.reid.loss.SoftTripletLoss",
        "from tllib.vision.models.reid import loss; SoftTripletLoss = loss.SoftTripletLoss",
        "import importlib as i; SoftTripletLoss = "
        "i.import_module('tllib.vision.models.reid.loss').SoftTripletLoss",
    ],
)
def test_below_a_package_that_breaks(patched, statement):
    from tllib_rs.vision.models.reid.loss import SoftTripletLoss

    if statement.startswith("from tllib.vision.models.reid import"):
        # This imports from the package, below one that fails to import: that one's own error.
        with pytest.raises(ImportError, match="cannot import name 'model_urls'"):
            _run(statement)
        return
    assert _run(statement)["SoftTripletLoss"] is SoftTripletLoss


@pytest.mark.parametrize("first", ["", "import tllib.vision.models.reid.loss as loss\n"])
@pytest.mark.parametrize(
    "statement",
    [
        "import tllib.vision.models",
        "from tllib.vision import models",
        "from tllib.vision.models import resnet18",
        "import tllib.vision.models.reid.identifier",
    ],
)
def test_a_package_that_breaks_raises_its_own_error(patched, statement, first):
    with pytest.raises(ImportError, match="cannot import name 'model_urls' from 'torchvision") as raised:
        _run(first + statement)
    files = [pathlib.Path(str(entry.path)).name for entry in raised.traceback]
    assert files[-2:] == ["__init__.py", "resnet.py"]
    assert "patch.py" not in files


def test_a_placeholder_raises_the_error_of_its_package(patched):
    with pytest.raises(ImportError, match="cannot import name 'model_urls'"):
        _run("import tllib.vision.models.reid.loss; tllib.vision.models.resnet18")


def test_an_unknown_attribute_is_missing_as_without_us(patched):
    with pytest.raises(AttributeError, match=r"module 'tllib\.vision' has no attribute 'nothing'"):
        _run("import tllib.vision; tllib.vision.nothing")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'tllib\.self_training\.nothing'"):
        _run("import tllib.self_training.nothing")


def test_tllib_s_own_modules_get_ours(patched):
    names = _run("import tllib.alignment.dann; from tllib import modules; import tllib.modules.classifier")
    ours = importlib.import_module("tllib_rs.modules.classifier").Classifier
    assert issubclass(names["tllib"].alignment.dann.ImageClassifier, ours)
    assert names["modules"].Classifier is ours
    loss = names["tllib"].alignment.dann.DomainLoss()(torch.ones(2, 3), torch.full((2, 2), 0.5))
    assert torch.isfinite(loss)  # no np.float is used


def test_imported_modules_get_ours():
    mcc, dann = map(importlib.import_module, ("tllib.self_training.mcc", "tllib.alignment.dann"))
    modules = sys.modules["tllib.modules"]
    own = importlib.import_module("tllib_rs.self_training.mcc")
    classifier = importlib.import_module("tllib_rs.modules.classifier")
    entropy = importlib.import_module("tllib_rs.modules.entropy").entropy
    before = {module: dict(vars(module)) for module in (mcc, dann, modules)}
    old = mcc.MinimumClassConfusionLoss
    with patch_tllib() as patch:
        assert mcc.MinimumClassConfusionLoss is own.MinimumClassConfusionLoss
        assert _run("from tllib.self_training.mcc import *")["ImageClassifier"] is own.ImageClassifier
        assert mcc.ClassifierBase is dann.ClassifierBase is modules.Classifier is classifier.Classifier
        assert mcc.entropy is dann.entropy is entropy
        assert patch["tllib.self_training.mcc.MinimumClassConfusionLoss"] is old
        assert patch["tllib.self_training.mcc.ClassifierBase"] is before[dann]["ClassifierBase"]
        assert "tllib.self_training.mcc" not in patch.served
        assert "tllib.self_training.uda" in patch.served
        assert len(list(patch)) == len(patch) > 10
    assert mcc.MinimumClassConfusionLoss is old
    assert type(mcc) is type(sys)
    for module, names in before.items():
        assert vars(module) == names


def test_what_was_replaced_goes_on_working():
    """``super(ItsName, self)`` looks the name up in the module: it must find its own class."""
    mcc, dann = map(importlib.import_module, ("tllib.self_training.mcc", "tllib.alignment.dann"))
    old, made = mcc.ImageClassifier, mcc.MinimumClassConfusionLoss(2.0)
    backbone = torch.nn.Linear(3, 4)
    backbone.out_features = 4
    z = torch.randn(5, 3)
    with patch_tllib() as patch:
        again = patch["tllib.self_training.mcc.MinimumClassConfusionLoss"](2.0)
        torch.testing.assert_close(again(z), made(z))
        torch.testing.assert_close(mcc.MinimumClassConfusionLoss(2.0)(z), made(z))
        assert isinstance(old(backbone, 2, 3), old)
        assert isinstance(dann.ImageClassifier(backbone, 2), dann.ImageClassifier)
        # They are different classes, as documented.
        assert not isinstance(made, mcc.MinimumClassConfusionLoss)


def test_undo_forgets_what_was_made_with_ours():
    with patch_tllib():
        under = importlib.import_module("tllib.alignment.dann")
    assert not [name for name in sys.modules if name.partition(".")[0] == "tllib"]
    fresh = importlib.import_module("tllib.alignment.dann")
    assert fresh is not under
    assert fresh.ClassifierBase.__module__ == "tllib.modules.classifier"
    assert importlib.import_module("tllib.self_training.mcc").__file__.startswith(STANDIN)


def test_undo_keeps_what_was_there():
    meter = importlib.import_module("tllib.utils.meter")
    with patch_tllib():
        assert importlib.import_module("tllib.self_training.uda").__name__ == "tllib_rs.self_training.uda"
    assert sys.modules["tllib.utils.meter"] is meter
    assert importlib.import_module("tllib.self_training.uda").__name__ == "tllib.self_training.uda"


def test_calls_nest():
    with patch_tllib() as outer:
        with patch_tllib() as inner:
            assert inner is outer
        assert "tllib.self_training.mcc" in sys.modules
        assert "in place" in repr(outer)
    assert "tllib.self_training.mcc" not in sys.modules
    other = importlib.import_module("tllib.utils.meter")
    outer.undo()
    assert "undone" in repr(outer)
    assert sys.modules["tllib.utils.meter"] is other
    with patch_tllib() as again:
        assert again is not outer
        outer.undo()
        served = importlib.import_module("tllib.self_training.mcc")
        assert served.__name__ == "tllib_rs.self_training.mcc"


def test_a_missing_module_of_ours_is_no_silence(monkeypatch):
    monkeypatch.setitem(sys.modules, "tllib_rs.self_training.mcc", None)
    with pytest.raises(ImportError, match=r"tllib_rs\.self_training\.mcc"):
        patch_tllib()
    assert "tllib.self_training.uda" not in sys.modules


def test_assignment_to_a_replaced_name(monkeypatch):
    mcc = importlib.import_module("tllib.self_training.mcc")
    with patch_tllib():
        ours = mcc.MinimumClassConfusionLoss
        with monkeypatch.context() as other:
            other.setattr(mcc, "MinimumClassConfusionLoss", int)
            assert mcc.MinimumClassConfusionLoss is int
        assert mcc.MinimumClassConfusionLoss is ours


def test_from_imports_need_no_tllib_package(monkeypatch, tmp_path):
    """Even if `tllib` itself fails to import, what we provide in its name is there."""
    package = tmp_path / "tllib"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('broken at the top')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with patch_tllib():
        assert _run("from tllib.self_training.uda import StrongWeakConsistencyLoss")
        with pytest.raises(OSError, match="broken at the top"):
            _run("import tllib")
        with pytest.raises(OSError, match="broken at the top"):
            _run("import tllib.self_training.uda")


def test_packages_without_an_init(monkeypatch, tmp_path):
    for folder in ("tllib/self_training", "tllib/vision/models/reid"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "tllib/self_training/extra.py").write_text("from .uda import StrongWeakConsistencyLoss\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if p != STANDIN)])
    with patch_tllib():
        names = _run("import tllib.vision.models.reid.loss, tllib.self_training.extra")
        assert names["tllib"].vision.models.reid.loss.__name__ == "tllib_rs.vision.models.reid.loss"
        assert names["tllib"].self_training.extra.StrongWeakConsistencyLoss


def test_objects_pickle_and_copy(patched):
    loss = _run("from tllib.self_training.mcc import MinimumClassConfusionLoss as L")["L"](2.5)
    assert pickle.loads(pickle.dumps(loss)).temperature == copy.deepcopy(loss).temperature == 2.5


def test_importing_us_is_light():
    source = "import sys, tllib_rs; print([m for m in sys.modules if m.startswith(('tllib_rs.', 'tllib.'))])"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['tllib_rs._version', 'tllib_rs.patch']"
