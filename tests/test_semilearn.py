"""USB's own FlexMatch with USB's thresholding hook and with ours: the same masks, trainings and checkpoints."""

import argparse
import copy
import importlib.util
import pickle
import subprocess
import sys
import types
import warnings

import pytest
import torch
from torch import nn

if importlib.util.find_spec("semilearn") is None:
    # pyproject.toml says for which Pythons it cannot be installed. An import that fails is a failure.
    pytest.skip("semilearn is not installed", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations in what semilearn imports
    from semilearn.algorithms.flexmatch import FlexMatch
    from semilearn.algorithms.flexmatch import FlexMatchThresholdingHook as Original

from tllib_rs.integrations.semilearn import FlexMatchThresholdingHook, replace_hook

CLASSES = 5


def algorithm(p_cutoff=0.5):
    """What a hook needs of an algorithm when it is called on its own."""
    return types.SimpleNamespace(p_cutoff=p_cutoff, compute_prob=lambda logits: logits.softmax(dim=-1))


def assert_same_state(ours, theirs):
    assert torch.equal(ours.selected_label, theirs.selected_label)
    assert torch.equal(ours.classwise_acc, theirs.classwise_acc)
    for name in ("selected_label", "classwise_acc"):
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype


def probabilities(generator, rows, sharpness, classes=CLASSES, dtype=torch.float32):
    """More confident with the sharpness; classes differ in how often they are predicted."""
    logits = torch.randn(rows, classes, generator=generator) * sharpness
    return (logits + torch.linspace(0, 1, classes)).softmax(dim=1).to(dtype)


@pytest.mark.parametrize("warmup", [True, False], ids=["warmup", "no_warmup"])
@pytest.mark.parametrize(
    ("samples", "classes", "rows", "p_cutoff", "dtype"),
    [
        (40, CLASSES, 7, 0.5, torch.float32),
        (40, CLASSES, 40, 0.95, torch.float32),
        (3, 2, 3, 0.4, torch.float32),
        (11, 1, 4, 0.5, torch.float64),
        (1000, 100, 64, 0.1, torch.float64),
        (200, CLASSES, 16, 0.7, torch.float16),
        (200, CLASSES, 16, 0.7, torch.bfloat16),
        (100_000, 10, 448, 0.95, torch.float32),
    ],
)
def test_masks_step_by_step(generator, samples, classes, rows, p_cutoff, dtype, warmup):
    ours, theirs = (kind(samples, classes, warmup) for kind in (FlexMatchThresholdingHook, Original))
    passed = 0
    for step in range(60 if samples <= 1000 else 8):
        indices = torch.randperm(samples, generator=generator)[:rows]
        # Confidence grows with the steps, so that no sample passes at first.
        p = probabilities(generator, rows, 0.1 * step, classes, dtype)
        masks = [
            hook.masking(algorithm(p_cutoff), logits_x_ulb=p, idx_ulb=indices, softmax_x_ulb=False)
            for hook in (ours, theirs)
        ]
        assert masks[0].dtype == masks[1].dtype
        assert torch.equal(*masks), f"step {step}"
        assert_same_state(ours, theirs)
        passed += masks[0].sum().item()
    assert passed


def test_one_class_for_all_samples_keeps_the_accuracies(generator):
    """USB does not count where one value fills all samples: the accuracies stay what they were."""
    ours, theirs = FlexMatchThresholdingHook(4, 3), Original(4, 3)
    everyone = torch.arange(4)
    for labels in ([0, 1, 1, 2], [1, 1, 1, 1], [1, 1, 1, 1], [2, 1, 1, 1]):
        p = torch.full((4, 3), 0.05).scatter_(1, torch.tensor(labels)[:, None], 0.9)
        for hook in (ours, theirs):
            hook.masking(algorithm(), logits_x_ulb=p, idx_ulb=everyone, softmax_x_ulb=False)
        assert_same_state(ours, theirs)
    assert ours.classwise_acc.tolist() == [0.0, 1.0, pytest.approx(1 / 3)]


def test_logits_where_usb_s_hook_raises(generator):
    """The hook has no compute_prob; USB's FlexMatch itself always comes with probabilities."""
    logits, indices = torch.randn(6, CLASSES, generator=generator), torch.arange(6)
    with pytest.raises(AttributeError, match="compute_prob"):
        Original(9, CLASSES).masking(algorithm(), logits_x_ulb=logits, idx_ulb=indices)
    of_logits, of_probabilities = (FlexMatchThresholdingHook(9, CLASSES) for _ in range(2))
    for _ in range(3):
        a = of_logits.masking(algorithm(), logits, indices)
        b = of_probabilities.masking(algorithm(), logits.softmax(dim=-1), indices, softmax_x_ulb=False)
        assert torch.equal(a, b)
    assert_same_state(of_logits, of_probabilities)


def test_state_may_be_written(generator):
    ours, theirs = FlexMatchThresholdingHook(20, CLASSES), Original(20, CLASSES)
    for step in range(6):
        p = probabilities(generator, 8, 3.0)
        indices = torch.randperm(20, generator=generator)[:8]
        for hook in (ours, theirs):
            hook.selected_label[step] = step % CLASSES
            if step == 3:
                hook.selected_label = torch.arange(20) % 3 - 1
                hook.classwise_acc = torch.linspace(0, 1, CLASSES)
        masks = [h.masking(algorithm(), p, indices, softmax_x_ulb=False) for h in (ours, theirs)]
        assert torch.equal(*masks)
        assert_same_state(ours, theirs)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        again.masking(algorithm(), p, indices, softmax_x_ulb=False)
        assert not torch.equal(again.selected_label, torch.full((20,), -1))
    with pytest.raises(IndexError):
        ours.masking(algorithm(0.0), p, torch.full((8,), 20), softmax_x_ulb=False)


class Net(nn.Module):
    """What USB expects of a network: features and logits by name."""

    def __init__(self, num_classes, **_):
        super().__init__()
        self.body, self.head = nn.Linear(6, 12), nn.Linear(12, num_classes)

    def forward(self, x):
        features = self.body(x).relu()
        return {"feat": features, "logits": 3 * self.head(features)}


def flexmatch(**settings):
    """USB's algorithm, built by its own constructor, without one of USB's data sets."""
    arguments = {
        "num_classes": CLASSES, "ema_m": 0.9, "epoch": 1, "num_train_iter": 30, "num_eval_iter": 99, "num_log_iter": 99,
        "ulb_loss_ratio": 1.0, "use_cat": True, "amp": False, "clip_grad": 0, "save_name": "x", "save_dir": "x",
        "resume": False, "algorithm": "flexmatch", "gpu": None, "rank": 0, "distributed": False, "world_size": 1,
        "dataset": "none", "num_labels": 4, "data_dir": "", "include_lb_to_ulb": True, "use_pretrain": False,
        "pretrain_path": "", "optim": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "layer_decay": 1.0,
        "num_warmup_iter": 0, "use_wandb": False, "use_aim": False, "ulb_dest_len": 60,
        "T": 0.5, "p_cutoff": 0.6, "hard_label": True, "thresh_warmup": True,
    } | settings  # fmt: skip
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a GradScaler for CUDA, where there is none
        built = FlexMatch(argparse.Namespace(**arguments), Net)
    built.epoch = 0  # as USB's train() begins
    return built


def train(algorithm, steps, first=0):
    """Losses and the share that passes, step by step, through USB's own train_step and hooks."""
    log = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        weak = torch.randn(16, 6, generator=generator)
        strong = weak + 0.3 * torch.randn(16, 6, generator=generator)
        labelled = torch.randn(8, 6, generator=generator)
        indices = torch.randperm(60, generator=generator)[:16]
        labels = labelled[:, :CLASSES].argmax(1)
        algorithm.out_dict, algorithm.log_dict = algorithm.train_step(labelled, labels, indices, weak, strong)
        algorithm.call_hook("after_train_step", "ParamUpdateHook")
        log.append(dict(algorithm.log_dict))
    return log


SETTINGS = [
    {},
    {"thresh_warmup": False},
    {"hard_label": False},
    {"use_cat": False, "p_cutoff": 0.8},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_usb_s_training_with_our_hook(settings):
    ours, theirs = flexmatch(**settings), flexmatch(**settings)
    assert replace_hook(ours) is ours.hooks_dict["MaskingHook"]
    logs = train(ours, 30), train(theirs, 30)
    assert logs[0] == logs[1]
    shares = {entry["train/util_ratio"] for entry in logs[0]}
    assert len(shares) > 2
    assert_same_state(ours.hooks_dict["MaskingHook"], theirs.hooks_dict["MaskingHook"])
    assert type(theirs.hooks_dict["MaskingHook"]) is Original


def test_replacing_amid_a_run_keeps_its_state_and_its_place():
    ours, theirs = flexmatch(), flexmatch()
    assert train(ours, 10) == train(theirs, 10)
    places = [hook.name for hook in ours._hooks]
    hook = replace_hook(ours)
    assert [hook.name for hook in ours._hooks] == places
    assert hook in ours._hooks
    assert train(ours, 10, first=10) == train(theirs, 10, first=10)
    with pytest.raises(TypeError, match="a FlexMatchThresholdingHook as its MaskingHook, got NoneType"):
        replace_hook(types.SimpleNamespace(hooks_dict={}))
    with pytest.raises(TypeError, match="got NoneType"):
        replace_hook(None)


@pytest.mark.parametrize("saved_by_us", [True, False])
def test_checkpoints_go_both_ways(saved_by_us, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, *_: tensor)  # USB always loads to CUDA
    ours, theirs = flexmatch(), flexmatch()
    replace_hook(ours)
    source, target = (ours, theirs) if saved_by_us else (theirs, ours)
    train(source, 12)
    assert {"classwise_acc", "selected_label"} <= source.get_save_dict().keys()
    source.save_model("last.pth", str(tmp_path))
    train(target, 3)
    target.load_model(str(tmp_path / "last.pth"))
    assert_same_state(ours.hooks_dict["MaskingHook"], theirs.hooks_dict["MaskingHook"])
    assert train(source, 12, first=12) == train(target, 12, first=12)


def test_the_package_of_integrations_imports_none_of_the_libraries():
    code = "import sys, tllib_rs.integrations; print('semilearn' in sys.modules, 'lightning' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
