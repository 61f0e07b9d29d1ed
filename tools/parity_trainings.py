"""Small networks that train with tllib and with us side by side, one training for each method (parity.py).

Both begin with the weights that tllib's classes draw and see the same batches. After 20 steps of the
optimizer a wrong gradient or a state that was not kept shows in the loss.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from original import Source
from torch import nn
from torch.nn import functional as F

ROWS, CLASSES, WIDTH, STEPS = 24, 7, 6, 20
REID = "vision.models.reid.loss"
#: Accepted between the losses of the two trainings, at every step. They run in float64: in float32 one of the
#: million activations of a training may be so near a ReLU's kink that rounding decides about its gradient,
#: after which the losses differ by 1e-4 and more (Self-Tuning with --seed 521927503).
TRAINING = 1e-9


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Some classes of tllib build tensors in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Start:
    """Gives both trainings the same weights: the first one's are kept, the second one loads them."""

    def __init__(self) -> None:
        self.saved: list[dict[str, torch.Tensor]] = []
        self.loading = False
        self.position = 0

    def rewind(self) -> None:
        """From now on modules load what the first training began with."""
        self.loading, self.position = True, 0

    def __call__(self, module: nn.Module) -> nn.Module:
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0  # the libraries need not draw in the same order
        if self.loading:
            module.load_state_dict(self.saved[self.position], strict=True)
            self.position += 1
        else:
            self.saved.append(copy.deepcopy(module.state_dict()))
        return module


@dataclasses.dataclass
class Batch:
    """One step's data: a labelled and an unlabelled batch in two views."""

    x: torch.Tensor
    labels: torch.Tensor
    weak: torch.Tensor
    strong: torch.Tensor
    idxes: torch.Tensor
    step: int


def batches(seed: int) -> list[Batch]:
    """The data of a training."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for step in range(STEPS):
        x, weak = torch.randn(2, ROWS, WIDTH, generator=g)
        strong = weak + 0.3 * torch.randn(ROWS, WIDTH, generator=g)
        labels = torch.randint(CLASSES, (ROWS,), generator=g)
        found.append(Batch(x, labels, weak, strong, torch.randperm(5 * ROWS, generator=g)[:ROWS], step))
    return found


def classifier(
    source: Source, start: Start, stem: str, name: str = "ImageClassifier", **options: Any
) -> nn.Module:
    """A method's classifier on a small backbone."""
    backbone = nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh())
    backbone.out_features = 12
    model = source(stem, name)(backbone, CLASSES, pool_layer=nn.Identity(), **options)
    return start(model)


#: A training: its model, the loss of a batch, and what happens after each step of the optimizer.
Training = tuple[nn.Module, Callable[[Batch], torch.Tensor], Callable[[], None]]


def _supervised(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch.x)[0], batch.labels)


def train_pseudo_label(source: Source, start: Start) -> Training:
    model = classifier(source, start, "modules.classifier")
    criterion = source("self_training.pseudo_label", "ConfidenceBasedSelfTrainingLoss")(0.18)

    def loss(batch: Batch) -> torch.Tensor:
        y = model(batch.weak)[0]
        return _supervised(model, batch) + criterion(y, y)[0]

    return model, loss, lambda: None


def train_pi_model(source: Source, start: Start) -> Training:
    model = classifier(source, start, "modules.classifier")
    criterion = source("self_training.pi_model", "L2ConsistencyLoss")()
    warm_up = source("self_training.pi_model", "sigmoid_warm_up")

    def loss(batch: Batch) -> torch.Tensor:
        p, q = (F.softmax(model(x)[0], dim=1) for x in (batch.weak, batch.strong))
        return _supervised(model, batch) + 100 * warm_up(batch.step, STEPS // 2) * criterion(p, q)

    return model, loss, lambda: None


def train_mean_teacher(source: Source, start: Start) -> Training:
    model = classifier(source, start, "self_training.mcc", bottleneck_dim=8)
    teacher = source("self_training.mean_teacher", "EMATeacher")(model, 0.9)
    criterion = source("self_training.pi_model", "L2ConsistencyLoss")()

    def loss(batch: Batch) -> torch.Tensor:
        p, q = (F.softmax(net(x)[0], dim=1) for net, x in ((model, batch.strong), (teacher, batch.weak)))
        return _supervised(model, batch) + 10 * criterion(p, q)

    return model, loss, teacher.update


def train_self_ensemble(source: Source, start: Start) -> Training:
    model = classifier(source, start, "self_training.self_ensemble", bottleneck_dim=8)
    teacher = source("self_training.mean_teacher", "EMATeacher")(model, 0.9)
    consistency = source("self_training.pi_model", "L2ConsistencyLoss")()
    balance = source("self_training.self_ensemble", "ClassBalanceLoss")(CLASSES)

    def loss(batch: Batch) -> torch.Tensor:
        p, q = (F.softmax(net(x)[0], dim=1) for net, x in ((model, batch.strong), (teacher, batch.weak)))
        mask = (q.max(dim=1).values > 0.2).float()
        return _supervised(model, batch) + 10 * consistency(p, q, mask) + balance(p)

    return model, loss, teacher.update


def train_uda(source: Source, start: Start) -> Training:
    model = classifier(source, start, "modules.classifier")
    criterion = source("self_training.uda", "StrongWeakConsistencyLoss")(0.18, 0.7)

    def loss(batch: Batch) -> torch.Tensor:
        return _supervised(model, batch) + criterion(model(batch.strong)[0], model(batch.weak)[0])

    return model, loss, lambda: None


def train_mcc(source: Source, start: Start) -> Training:
    model = classifier(source, start, "self_training.mcc", bottleneck_dim=8)
    criterion = source("self_training.mcc", "MinimumClassConfusionLoss")(2.5)
    return model, lambda b: _supervised(model, b) + criterion(model(b.weak)[0]), lambda: None


def train_cc_loss(source: Source, start: Start) -> Training:
    model = classifier(source, start, "self_training.mcc", bottleneck_dim=8)
    criterion = source("self_training.cc_loss", "CCConsistency")(0.5, 0.25)

    def loss(batch: Batch) -> torch.Tensor:
        return _supervised(model, batch) + 50 * criterion(model(batch.weak)[0], model(batch.strong)[0])[0]

    return model, loss, lambda: None


def train_flexmatch(source: Source, start: Start) -> Training:
    model = classifier(source, start, "modules.classifier")
    criterion = source("self_training.flexmatch", "DynamicThresholdingModule")
    thresholds = criterion(0.35, True, lambda x: x / (2 - x), CLASSES, 5 * ROWS, torch.device("cpu"))

    def loss(batch: Batch) -> torch.Tensor:
        confidence, labels = F.softmax(model(batch.weak)[0].detach(), dim=1).max(dim=1)
        mask = (confidence > thresholds.get_threshold(labels)).float()
        thresholds.update(batch.idxes, (confidence > 0.35).float(), labels)
        rows = F.cross_entropy(model(batch.strong)[0], labels, reduction="none")
        return _supervised(model, batch) + (rows * mask).mean()

    return model, loss, lambda: None


def train_self_tuning(source: Source, start: Start) -> Training:
    stem = "self_training.self_tuning"
    encoders = [classifier(source, start, stem, "Classifier", projection_dim=9) for _ in "qk"]
    model = start(source(stem, "SelfTuning")(*encoders, CLASSES, K=4, m=0.9, T=0.2))

    def loss(batch: Batch) -> torch.Tensor:
        logits, targets, y = model(batch.weak, batch.strong, batch.labels)
        return F.kl_div(logits, targets, reduction="batchmean") + F.cross_entropy(y, batch.labels)

    return model, loss, lambda: None


def train_dst(source: Source, start: Start) -> Training:
    model = classifier(source, start, "self_training.dst", bottleneck_dim=8, width=10)
    criterion = source("self_training.dst", "WorstCaseEstimationLoss")(2)
    pseudo = source("self_training.pseudo_label", "ConfidenceBasedSelfTrainingLoss")(0.18)

    def loss(batch: Batch) -> torch.Tensor:
        (y_l, adv_l, _), (y_u, adv_u, _) = model(batch.x), model(batch.weak)
        own = pseudo(model(batch.strong)[2], y_u)[0]
        return F.cross_entropy(y_l, batch.labels) + criterion(y_l, adv_l, y_u, adv_u) + own

    return model, loss, model.step


def train_reid(source: Source, start: Start) -> Training:
    model = classifier(source, start, "modules.classifier")
    teacher = source("self_training.mean_teacher", "EMATeacher")(model, 0.9)
    soft = source(REID, "SoftTripletLoss")()
    hard = source(REID, "TripletLoss")(0.3)
    cross = source(REID, "CrossEntropyLoss")()
    smooth = source(REID, "CrossEntropyLossWithLabelSmooth")(CLASSES)

    def loss(batch: Batch) -> torch.Tensor:
        (y, f), (y_t, f_t) = model(batch.x), teacher(batch.x)
        triplets = soft(f, f_t, batch.labels) + hard(f, batch.labels)
        return triplets + cross(y, y_t) + smooth(y, batch.labels)

    return model, loss, teacher.update


TRAININGS = {
    name.removeprefix("train_"): make for name, make in list(globals().items()) if name.startswith("train_")
}


def losses_of(
    make: Callable[[Source, Start], Training], source: Source, start: Start, seed: int
) -> list[float]:
    """The loss at each of 20 steps."""
    torch.manual_seed(seed)
    model, loss, after = make(source, start)
    model.train()
    inner = getattr(model, "encoder_q", model)
    optimizer = torch.optim.SGD(inner.get_parameters(base_lr=0.05), lr=0.05, momentum=0.9)
    found = []
    for batch in batches(seed):
        value = loss(batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        after()
        found.append(value.item())
    return found


def compare_training(
    make: Callable[[Source, Start], Training], tllib: Source, ours: Source, seed: int
) -> float:
    """The worst difference of the losses as a share of what is accepted."""
    with default_dtype(torch.float64):
        start = Start()
        theirs = losses_of(make, tllib, start, seed)
        start.rewind()
        own = losses_of(make, ours, start, seed)
    return max(_share(a, b) for a, b in zip(own, theirs, strict=True))


def _share(value: float, reference: float) -> float:
    share = abs(value - reference) / (TRAINING * max(1.0, abs(reference)))
    return math.inf if math.isnan(share) else share
