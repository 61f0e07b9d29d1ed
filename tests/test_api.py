"""Every public name, signature and default of tllib 0.4 (tests/api.json), and its state_dict keys.

``api.json`` holds, by module and name: the kind; the parameters in order, each ``[name]`` or ``[name,
default]``, ``*`` and ``**`` as they are written; for classes the base classes under tllib's names, the public
methods that the class itself has, and its properties. Where the manifest of the recorded values names a
state, its keys are tllib's.
"""

import importlib
import inspect
import json
import pathlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests import golden
from tllib_rs.patch import PROVIDED

API = json.loads((pathlib.Path(__file__).parent / "api.json").read_text())
NAMES = [(stem, name) for stem, names in API.items() for name in names]
#: What our constructors take beyond tllib's, by keyword only, with the defaults.
ADDED = {
    ("self_training.mean_teacher", "EMATeacher"): {
        "teacher": None,
        "dtype": None,
        "device": None,
        "unwrap": False,
        "buffers": "leave",
        "schedule": None,
        "track": False,
    },
    ("self_training.flexmatch", "DynamicThresholdingModule"): {
        "process_group": None,
        "layout": "replicated",
        "dtype": torch.int64,
    },
    ("self_training.mcc", "MinimumClassConfusionLoss"): {"process_group": None},
    ("self_training.self_ensemble", "ClassBalanceLoss"): {"process_group": None},
    ("self_training.self_tuning", "SelfTuning"): {"process_group": None},
    ("vision.models.reid.loss", "SoftTripletLoss"): {"process_group": None},
}
PREFIX = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}


def _ours(stem, name):
    return getattr(importlib.import_module(f"tllib_rs.{stem}"), name)


def _parameters(function, bound):
    parameters = list(inspect.signature(function).parameters.values())[bound:]
    return [
        [PREFIX.get(p.kind, "") + p.name] + ([] if p.default is p.empty else [p.default]) for p in parameters
    ]


def _keyword_only(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _base(path):
    module, _, name = path.replace("tllib.", "tllib_rs.", 1).rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_the_modules_are_the_provided_ones():
    assert sorted(API) == sorted(PROVIDED)


@pytest.mark.parametrize(("stem", "name"), NAMES)
def test_signature(stem, name):
    entry, ours = API[stem][name], _ours(stem, name)
    if entry["kind"] == "function":
        assert _same(_parameters(ours, 0), entry["parameters"])
        return
    if entry["parameters"] or "__init__" in vars(ours):
        added = _keyword_only(ours.__init__)
        assert added == ADDED.get((stem, name), {})
        own = [p for p in _parameters(ours.__init__, 1) if p[0] not in added]
        assert _same(own, entry["parameters"])
    for base in map(_base, entry["bases"]):
        assert issubclass(ours, base)
    for method, parameters in entry["methods"].items():
        static = isinstance(inspect.getattr_static(ours, method), staticmethod)
        got = _parameters(getattr(ours, method), 0 if static else 1)
        if issubclass(ours, torch.autograd.Function):
            # torch passes the context, to `forward` or to `setup_context`; callers of `apply` pass the rest.
            got, parameters = ([p for p in each if p != ["ctx"]] for each in (got, parameters))
        assert _same(got, parameters), method
    for attribute in entry["properties"]:
        assert isinstance(inspect.getattr_static(ours, attribute), property)


def _same(got, expected):
    """Equal also in the types of the defaults, so that 1000 is not 1000.0."""
    assert got == expected
    assert [list(map(type, g)) for g in got] == [list(map(type, e)) for e in expected]
    return True


@pytest.mark.parametrize("stem", API)
def test_public_names(stem):
    """All of tllib's names are public here, and a star import brings nothing else."""
    module = importlib.import_module(f"tllib_rs.{stem}")
    assert set(module.__all__) == set(API[stem])


@pytest.mark.parametrize("case", golden.cases("image_classifiers") + golden.cases("self_tuning"), ids=repr)
def test_state_dict_keys(case):
    """Keys in tllib's order, with tllib's shapes."""
    recorded = state_of(case)
    if not recorded or "backbone" not in case.ctor:
        return  # the other cases record no state of their own
    model = build(case)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == recorded
    assert list(model.state_dict()) == list(recorded)


def state_of(case):
    """The recorded state's keys with their shapes, in order."""
    entries = {**case.entry["inputs"], **case.entry["outputs"]}
    return {
        name.partition(":")[2]: entry["shape"]
        for name, entry in entries.items()
        if name.startswith(("state:", "init:"))
    }


def build(case):
    """The model of a recorded case."""
    _, _, stem, name = case.entry["class"].split(".")
    ctor = dict(case.ctor)
    inside, outside = map(int, ctor.pop("backbone").removeprefix("nn.Linear(").rstrip(")").split(","))
    return _ours(f"self_training.{stem}", name)(
        nn.Linear(inside, outside), **ctor | {"pool_layer": nn.Identity()}
    )


def test_states_that_live_in_buffers():
    """SelfTuning holds its queue and both encoders."""
    Classifier, SelfTuning = (_ours("self_training.self_tuning", n) for n in ("Classifier", "SelfTuning"))
    encoders = [Classifier(nn.Linear(3, 2), 5, 4, pool_layer=nn.Identity()) for _ in "qk"]
    state = SelfTuning(*encoders, num_classes=5, K=4).state_dict()
    expected = ["queue_list", "queue_ptr"]
    for encoder in ("encoder_q", "encoder_k"):
        expected += [f"{encoder}.{key}" for key in encoders[0].state_dict()]
    assert list(state) == expected
    assert (state["queue_list"].shape, state["queue_ptr"].dtype) == ((4, 20), torch.int64)


@pytest.mark.parametrize(
    ("stem", "name", "arguments"),
    [
        ("modules.grl", "GradientReverseLayer", ()),
        ("modules.grl", "WarmStartGradientReverseLayer", ()),
        ("self_training.cc_loss", "CCConsistency", (1.0,)),
        ("self_training.dst", "WorstCaseEstimationLoss", (1.0,)),
        ("self_training.mcc", "MinimumClassConfusionLoss", (1.0,)),
        ("self_training.pi_model", "L2ConsistencyLoss", ()),
        ("self_training.pseudo_label", "ConfidenceBasedSelfTrainingLoss", (0.5,)),
        ("self_training.self_ensemble", "ClassBalanceLoss", (3,)),
        ("self_training.uda", "StrongWeakConsistencyLoss", (0.5, 1.0)),
        ("vision.models.reid.loss", "CrossEntropyLoss", ()),
        ("vision.models.reid.loss", "CrossEntropyLossWithLabelSmooth", (3,)),
        ("vision.models.reid.loss", "SoftTripletLoss", ()),
        ("vision.models.reid.loss", "TripletLoss", (0.3,)),
        ("vision.models.reid.loss", "TripletLossXBM", ()),
    ],
)
def test_losses_have_no_state(stem, name, arguments):
    assert _ours(stem, name)(*arguments).state_dict() == {}


def test_importing_a_loss_does_not_import_the_compiler():
    """The compiler takes a second, and workers of a DataLoader import what the script imports."""
    modules = ", ".join(f"tllib_rs.{path}" for path in PROVIDED)
    code = f"import sys, {modules}; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
