"""Checkpoints between tllib and us, in both directions, and of state that tllib cannot save."""

import copy
import importlib
import io

import pytest
import torch
from torch import nn

from tests import golden
from tests.test_api import build
from tllib_rs.self_training.flexmatch import DynamicThresholdingModule
from tllib_rs.self_training.mean_teacher import EMATeacher


def _through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _states(case):
    return {
        name.partition(":")[2]: case.input(name, torch.float32)
        for name in case.entry["inputs"]
        if name.startswith("state:")
    }


MODELS = golden.cases("image_classifiers", lambda c: "pool_layer" in c.ctor and _states(c)) + golden.cases(
    "self_tuning", lambda c: c.entry["class"].endswith(".Classifier") and _states(c) and not c.raises
)


@pytest.mark.parametrize("case", MODELS, ids=repr)
def test_a_state_recorded_from_tllib_loads_strictly(case):
    recorded, model = _states(case), build(case)
    model.load_state_dict(recorded, strict=True)
    saved = _through_a_file(model.state_dict())
    assert list(saved) == list(model.state_dict())
    for key, value in recorded.items():
        torch.testing.assert_close(saved[key], value, rtol=0, atol=0)


def _ours(stem, name):
    return getattr(importlib.import_module(f"tllib_rs.{stem}"), name)


def _classifier(source, stem, name, **arguments):
    return source(stem, name)(nn.Linear(3, 4), 5, pool_layer=nn.Identity(), **arguments)


def _self_tuning(source):
    stem = "self_training.self_tuning"
    encoders = [_classifier(source, stem, "Classifier", projection_dim=6) for _ in "qk"]
    return source(stem, "SelfTuning")(*encoders, 5, K=3)


MAKERS = {
    "classifier": lambda source: _classifier(source, "modules.classifier", "Classifier"),
    "dst": lambda source: _classifier(source, "self_training.dst", "ImageClassifier", width=6),
    "mcc": lambda source: _classifier(source, "self_training.mcc", "ImageClassifier"),
    "self_ensemble": lambda source: _classifier(source, "self_training.self_ensemble", "ImageClassifier"),
    "self_tuning": _self_tuning,
}


@pytest.mark.parametrize("name", MAKERS)
def test_both_ways(standin, name):
    theirs, ours = MAKERS[name](standin), MAKERS[name](_ours)
    for source, target in ((theirs, ours), (ours, theirs)):
        for tensor in source.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape).abs() * 3)
        target.load_state_dict(_through_a_file(source.state_dict()), strict=True)
        for key, value in source.state_dict().items():
            torch.testing.assert_close(target.state_dict()[key], value, rtol=0, atol=0)
    assert list(theirs.state_dict()) == list(ours.state_dict())


def test_teachers_go_both_ways(standin):
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    theirs = standin("self_training.mean_teacher", "EMATeacher")(copy.deepcopy(student), 0.9)
    ours = EMATeacher(copy.deepcopy(student), 0.9)
    for source, target in ((theirs, ours), (ours, theirs)):
        for parameter in source.model.parameters():
            parameter.data.normal_()
        source.update()
        assert target.load_state_dict(_through_a_file(source.state_dict())) is None
        for key, value in source.state_dict().items():
            torch.testing.assert_close(target.state_dict()[key], value, rtol=0, atol=0)
    # What was loaded is what the next update starts from, in the same storage.
    pointers = [p.data_ptr() for p in ours.teacher.parameters()]
    ours.load_state_dict(theirs.state_dict())
    ours.update()
    assert pointers == [p.data_ptr() for p in ours.teacher.parameters()]


def _thresholds(cls=DynamicThresholdingModule):
    return cls(0.95, True, lambda x: x / (2 - x), 4, 12, "cpu")


def _step(module, labels=(0, 1, 1, 3, 1)):
    labels = torch.tensor(labels)
    module.update(torch.arange(len(labels)), torch.ones(len(labels)), labels)
    return module


@pytest.mark.parametrize("bare", [False, True])
def test_flexmatch_saves_and_loads(bare):
    source, target = _step(_thresholds()), _thresholds()
    state = _through_a_file(source.net_outputs if bare else source.state_dict())
    target.load_state_dict(state)
    every = torch.arange(4)
    torch.testing.assert_close(target.get_threshold(every), source.get_threshold(every), rtol=0, atol=0)
    assert torch.equal(target.class_counts(), source.class_counts())
    _step(source, (2, 2))
    _step(target, (2, 2))
    torch.testing.assert_close(target.get_threshold(every), source.get_threshold(every), rtol=0, atol=0)


def test_flexmatch_state_is_a_copy_both_ways():
    module = _step(_thresholds())
    state = module.state_dict()
    before = state["net_outputs"].clone()
    _step(module, (3, 3, 3))
    assert torch.equal(state["net_outputs"], before)
    module.load_state_dict(state)
    state["net_outputs"].fill_(2)
    assert torch.equal(module.net_outputs, before)


def test_flexmatch_takes_and_gives_tllib_s_labels(standin):
    theirs, ours = standin("self_training.flexmatch", "DynamicThresholdingModule"), _thresholds()
    theirs = _step(_thresholds(theirs))
    ours.load_state_dict(_through_a_file(theirs.net_outputs))
    every = torch.arange(4)
    torch.testing.assert_close(ours.get_threshold(every), theirs.get_threshold(every))
    _step(ours, (2, 2, 2))
    theirs.net_outputs = ours.state_dict()["net_outputs"]
    torch.testing.assert_close(ours.get_threshold(every), theirs.get_threshold(every))


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({}, ValueError, r"state_dict must have the one key 'net_outputs', got \[\]"),
        ({"net_outputs": torch.zeros(12).long(), "x": 1}, ValueError, r"got \['net_outputs', 'x'\]"),
        ({"net_outputs": [1]}, TypeError, "or that torch.Tensor itself, got list"),
        ([1, 2], TypeError, "state_dict must be a mapping with net_outputs, .* got list"),
        (torch.zeros(12), TypeError, "net_outputs must be int8, int16, int32 or int64, got float32"),
        (torch.zeros(11).long(), ValueError, r"shape \(n_unlabeled_samples,\) = \[12\], got shape \[11\]"),
        (torch.full((12,), 4), IndexError, "classes below 4, got 4 at position 0"),
        (torch.full((12,), -2), IndexError, "got -2 at position 0"),
    ],
)
def test_flexmatch_rejects_other_states_and_keeps_its_own(state, error, message):
    module = _step(_thresholds())
    before, threshold = module.net_outputs.clone(), module.get_threshold(torch.arange(4))
    with pytest.raises(error, match=f"DynamicThresholdingModule: .*{message}"):
        module.load_state_dict(state)
    assert torch.equal(module.net_outputs, before)
    torch.testing.assert_close(module.get_threshold(torch.arange(4)), threshold)


def _unpickled(stem, name, **attributes):
    """An object of our class with only the attributes that tllib's, and so a pickle of tllib's, has."""
    kind = _ours(stem, name)
    blank = kind.__new__(kind)
    if isinstance(blank, nn.Module):
        nn.Module.__init__(blank)
        buffers = {key: attributes.pop(key) for key in ("queue_list", "queue_ptr") if key in attributes}
        modules = {
            key: attributes.pop(key) for key in list(attributes) if isinstance(attributes[key], nn.Module)
        }
        state = blank.__dict__ | attributes | {"_buffers": buffers, "_modules": modules}
    else:
        state = attributes
    again = kind.__new__(kind)
    set_state = getattr(again, "__setstate__", again.__dict__.update)
    set_state(state)
    return again


def test_whole_objects_that_tllib_pickled_are_ours_under_patch_tllib(generator):
    y = torch.randn(4, 3, generator=generator)
    labels = torch.tensor([0, 0, 1, 1])
    mcc = _unpickled("self_training.mcc", "MinimumClassConfusionLoss", temperature=2.0)
    torch.testing.assert_close(mcc(y), _ours("self_training.mcc", "MinimumClassConfusionLoss")(2.0)(y))
    balance = _unpickled(
        "self_training.self_ensemble", "ClassBalanceLoss", uniform_distribution=torch.ones(3) / 3
    )
    expected = _ours("self_training.self_ensemble", "ClassBalanceLoss")(3)(y.softmax(1))
    torch.testing.assert_close(balance(y.softmax(1)), expected)
    assert copy.deepcopy(balance).num_classes == 3
    triplet = _unpickled("vision.models.reid.loss", "SoftTripletLoss", margin=0.1, normalize_feature=True)
    expected = _ours("vision.models.reid.loss", "SoftTripletLoss")(0.1, True)(y, y, labels)
    torch.testing.assert_close(triplet(y, y, labels), expected)
    settings = {"alpha": 1.0, "lo": 0.0, "hi": 1.0, "max_iters": 10, "auto_step": True}
    layer = _unpickled("modules.grl", "WarmStartGradientReverseLayer", iter_num=3, **settings)
    layer(y)
    assert copy.deepcopy(layer).iter_num == 4


def test_whole_methods_that_tllib_pickled_are_ours_under_patch_tllib(generator):
    student = nn.Linear(3, 2)
    ema = _unpickled(
        "self_training.mean_teacher", "EMATeacher", model=student, alpha=0.5, teacher=copy.deepcopy(student)
    )
    with torch.no_grad():
        student.weight.add_(2)
    ema.update()
    torch.testing.assert_close(ema.teacher.weight, student.weight - 1)
    assert ema.step == 0
    ema.train()
    arguments = {
        "threshold": 0.95,
        "warmup": False,
        "mapping_func": torch.sqrt,
        "num_classes": 3,
        "device": "cpu",
    }
    thresholds = _unpickled("self_training.flexmatch", "DynamicThresholdingModule", n_unlabeled_samples=4,
                            net_outputs=torch.tensor([-1, 0, 0, 2]), **arguments)  # fmt: skip
    torch.testing.assert_close(
        thresholds.get_threshold(torch.arange(3)), 0.95 * torch.tensor([1, 0, 0.5]).sqrt()
    )
    assert thresholds.net_outputs.dtype == torch.int64
    whole = _self_tuning(_ours)
    parts = {key: getattr(whole, key) for key in ("encoder_q", "encoder_k", "queue_list", "queue_ptr")}
    again = _unpickled(
        "self_training.self_tuning", "SelfTuning", K=3, m=0.999, T=0.07, num_classes=5, **copy.deepcopy(parts)
    )
    for module in (whole, again):
        torch.manual_seed(0)
        pgc_logits, _, _ = module(*torch.randn(2, 4, 3, generator=generator.manual_seed(0)), torch.arange(4))
        pgc_logits.sum().backward()
    assert torch.equal(whole.queue_list, again.queue_list)


def test_a_subclass_of_the_teacher_may_have_a_method_step():
    class Stepping(EMATeacher):
        def step(self):
            self.update()

    Stepping(nn.Linear(2, 2), 0.5).step()
