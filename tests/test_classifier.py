"""The classifiers of the methods that share tllib's plain one."""

import pytest
import torch
from torch import nn

from tests import golden
from tllib_rs.modules import classifier
from tllib_rs.self_training import mcc, self_ensemble

CLASSES = {
    "tllib.self_training.mcc.ImageClassifier": mcc.ImageClassifier,
    "tllib.self_training.self_ensemble.ImageClassifier": self_ensemble.ImageClassifier,
}
CASES = golden.cases("image_classifiers", lambda case: case.entry["class"] in CLASSES)


def _ending(name):
    return [case for case in CASES if case.name.endswith(name)]


def _build(case, **changes):
    sizes = case.ctor["num_classes"], case.ctor["bottleneck_dim"]
    return CLASSES[case.entry["class"]](nn.Linear(5, 6), *sizes, pool_layer=nn.Identity(), **changes)


def _loaded(case, inputs):
    model = _build(case)
    state = {name.removeprefix("state:"): x for name, x in inputs.items() if name.startswith("state:")}
    model.load_state_dict(state, strict=True)
    return model


def _layout(state):
    return [[name, list(x.shape), str(x.dtype).removeprefix("torch.")] for name, x in state.items()]


def test_every_recorded_case_is_used():
    assert len(CASES) == len(_ending("_eval")) + len(_ending("_train")) + len(_ending("_init_seed0")) == 6


@pytest.mark.parametrize("case", _ending("_eval"), ids=repr)
def test_evaluation_mode_returns_predictions(case, precision):
    inputs = case.requires_grad(case.inputs(precision))
    outputs = _loaded(case, inputs).eval()(inputs["x"])
    case.backward(outputs, inputs, precision)
    case.check("outputs", outputs, precision)
    case.check_grads(inputs, precision)


@pytest.mark.parametrize("case", _ending("_train"), ids=repr)
def test_training_mode_returns_predictions_and_features(case, precision):
    inputs = case.inputs(precision)
    inputs["x"].requires_grad_()
    model = _loaded(case, inputs).train()
    outputs, features = model(inputs["x"])
    loss = 0.37 * ((outputs * inputs["cot:outputs"]).sum() + (features * inputs["cot:features"]).sum())
    loss.backward()
    for name, value in (("outputs", outputs), ("features", features), ("loss", loss)):
        case.check(name, value, precision)
    buffers = dict(model.named_buffers())
    recorded = [name for name in case.entry["outputs"] if name.startswith("buffers_after:")]
    assert len(recorded) == len(buffers)
    for name in recorded:
        case.check(name, buffers[name.removeprefix("buffers_after:")], precision)
    grads = {name: p.grad for name, p in model.named_parameters()} | {"x": inputs["x"].grad}
    assert set(grads) == set(case.entry["grads"])
    for name, grad in grads.items():
        case.check_grad(name, grad, precision)


@pytest.mark.parametrize("case", _ending("_init_seed0"), ids=repr)
def test_initial_weights_under_a_seed(case):
    """They are equal only if the modules are made in tllib's order."""
    assert "rng_order" in case.flags
    torch.manual_seed(case.entry["seed"])
    state = _build(case).state_dict()
    assert [f"init:{name}" for name in state] == list(case.entry["outputs"])
    for name, value in state.items():
        case.check_drawn(f"init:{name}", value)


@pytest.mark.parametrize("case", _ending("_eval"), ids=repr)
def test_state_dict_and_parameter_groups(case):
    assert _layout(_build(case).state_dict()) == case.entry["state_dict"]
    assert _build(case).features_dim == case.entry["features_dim"]
    defaults = CLASSES[case.entry["class"]](nn.Linear(5, 6), 7, pool_layer=nn.Identity())
    assert _layout(defaults.state_dict()) == case.entry["state_dict_defaults"]
    for name, groups in case.entry["groups"].items():
        kind, rate = name.split("_lr")
        found = _build(case, finetune=kind == "finetune").get_parameters(float(rate))
        for group, expected in zip(found, groups, strict=True):
            parameters = list(group["params"])
            assert len(parameters) == expected["n_params"]
            assert sum(p.numel() for p in parameters) == expected["numel"]
            assert group["lr"] == pytest.approx(expected["lr"], rel=1e-12)
            assert [key for key in group if key != "params"] == expected["keys"]


class Pyramid(nn.Module):
    """A convolutional backbone."""

    out_features = 4

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.convolution(x)


def test_default_pooling_averages_and_flattens():
    model = classifier.ImageClassifier(Pyramid(), 5).eval()
    x = torch.randn(2, 3, 8, 8)
    predictions, features = model(x, return_feat=True)
    torch.testing.assert_close(features, model.backbone(x).mean(dim=(2, 3)))
    torch.testing.assert_close(predictions, model.head(features))
    assert model.features_dim == 4
    assert isinstance(model.bottleneck, nn.Identity)


def test_own_head_is_kept():
    head = nn.Linear(3, 9)
    model = classifier.Classifier(nn.Linear(5, 6), 9, nn.Linear(6, 3), 3, head, pool_layer=nn.Identity())
    assert model.head is head
    assert model.eval()(torch.zeros(2, 5)).shape == (2, 9)


@pytest.mark.parametrize("width", [-1, 0, None])
def test_bottleneck_without_a_width(width):
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match="bottleneck_dim must be above 0 with a bottleneck"):
            classifier.Classifier(nn.Linear(5, 6), 9, nn.Linear(6, 3), width)
