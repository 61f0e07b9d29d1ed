"""Small trainings, each with our method and with its plain formulation: what ``test_training.py`` and
``test_compiled_training.py`` run in the ways in which users train.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from tests.losses import LOSSES
from tests.plain import flexmatch as plain_flexmatch
from tests.plain import self_tuning as plain_self_tuning
from tests.plain.mean_teacher import EMATeacher as PlainTeacher
from tllib_rs.self_training.flexmatch import DynamicThresholdingModule
from tllib_rs.self_training.mean_teacher import EMATeacher
from tllib_rs.self_training.self_tuning import Classifier, SelfTuning

ROWS, FEATURES, CLASSES, SAMPLES = 7, 6, 5, 40


@dataclass(frozen=True)
class Task:
    """A network that ends in a loss, and batches for it."""

    name: str
    #: (ours: bool) -> a module whose forward takes a batch and returns the loss.
    network: Callable[[bool], nn.Module]
    #: (generator) -> a batch, a tuple of tensors; floating point in float64.
    batch: Callable[[torch.Generator], tuple[torch.Tensor, ...]]
    #: Whether a second forward of the same batch leaves the state as the first did.
    repeatable: bool = True

    def __repr__(self):
        return self.name

    def pair(self):
        """Ours and the plain one, in float64, with the same parameters."""
        networks = []
        for ours in (True, False):
            torch.manual_seed(0)
            networks.append(self.network(ours).double())
        return networks

    def batches(self, count):
        """The first ``count`` batches."""
        generator = torch.Generator().manual_seed(1)
        return [self.batch(generator) for _ in range(count)]


class Body(nn.Module):
    """Two layers with dropout, and a head for each of ``heads`` outputs."""

    def __init__(self, heads=1, dropout=0.1):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Dropout(dropout))
        self.heads = nn.ModuleList(nn.Linear(16, CLASSES) for _ in range(heads))

    def forward(self, x):
        """The outputs of the heads, (n, CLASSES) each."""
        features = self.layers(x)
        return [3 * head(features) for head in self.heads]


class LossNetwork(nn.Module):
    """The differentiated inputs of a loss come from the network, the others from the batch."""

    def __init__(self, loss, call):
        super().__init__()
        inputs = loss.inputs(torch.Generator().manual_seed(0), ROWS, CLASSES)
        self.loss, self.call = loss, call
        self.trained = [k for k, x in enumerate(inputs) if k not in loss.constant and x.dim() == 2]
        # Whether an input is one of probabilities, which sum to 1.
        self.softmax = [bool(torch.allclose(inputs[k].sum(1), torch.ones(1).double())) for k in self.trained]
        self.body = Body(len(self.trained))

    def forward(self, x, *inputs):
        """The sum of what the loss returns for each row, or the loss."""
        inputs = list(inputs)
        for k, softmax, y in zip(self.trained, self.softmax, self.body(x), strict=True):
            inputs[k] = y.softmax(dim=1) if softmax else y
        return self.loss.first(self.call(*inputs)).sum()


def loss_task(loss):
    """A training with one of the losses."""

    def batch(generator):
        x = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
        return (x, *loss.inputs(generator, ROWS, CLASSES))

    return Task(loss.name, lambda ours: LossNetwork(loss, loss.ours if ours else loss.plain), batch)


def mapping(status):
    """FlexMatch's convex mapping."""
    return status / (2 - status)


class FlexMatchNetwork(nn.Module):
    """Pseudo labels of weak views that pass their class's threshold train the strong views."""

    def __init__(self, ours):
        super().__init__()
        self.body = Body()
        kind = DynamicThresholdingModule if ours else plain_flexmatch.DynamicThresholdingModule
        self.thresholds = kind(0.5, True, mapping, CLASSES, SAMPLES, "cpu")

    def forward(self, weak, strong, indices):
        """The loss of the strong views."""
        with torch.no_grad():
            (y,) = self.body(weak)
            confidence, labels = y.float().softmax(dim=1).max(dim=1)
        mask = confidence >= self.thresholds.get_threshold(labels)
        self.thresholds.update(indices, (confidence >= 0.5).float(), labels)
        (y,) = self.body(strong)
        return (F.cross_entropy(y, labels, reduction="none") * mask).mean()


def views(generator):
    """Two views of a batch of samples, and the indices of the samples."""
    weak = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    noise = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    return weak, weak + 0.3 * noise, torch.randperm(SAMPLES, generator=generator)[:ROWS]


class MeanTeacherNetwork(nn.Module):
    """Consistency with the predictions of a teacher, which moves before each forward."""

    def __init__(self, ours):
        super().__init__()
        self.body = Body()
        self.kind, self.moving = EMATeacher if ours else PlainTeacher, None

    def forward(self, weak, strong, _):
        """The squared difference of the predictions."""
        if self.moving is None:  # in float64 by now
            self.moving = [self.kind(self.body, 0.5)]  # a list, so that the teacher is not a submodule
        (teacher,) = self.moving
        teacher.update()
        with torch.no_grad():
            expected = teacher.teacher(weak)[0].softmax(dim=1)
        return (self.body(strong)[0].softmax(dim=1) - expected).square().sum()


class SelfTuningNetwork(nn.Module):
    """Cross entropy and the contrast with the queue."""

    def __init__(self, ours):
        super().__init__()
        self.ours = ours
        backbone = nn.Linear(FEATURES, 16)
        settings = {"projection_dim": 4, "bottleneck_dim": 8, "pool_layer": nn.Identity()}
        encoders = [Classifier(copy.deepcopy(backbone), CLASSES, **settings) for _ in "qk"]
        for encoder in encoders:
            nn.init.normal_(encoder.bottleneck[0].weight, 0, 0.3)
        self.module = SelfTuning(*encoders, CLASSES, K=3, m=0.9, T=0.3)

    def forward(self, weak, strong, indices):
        """Any labels do."""
        labels = indices % CLASSES
        log_probabilities, targets, y = (self.module if self.ours else self.plain)(weak, strong, labels)
        return F.cross_entropy(y, labels) + F.kl_div(log_probabilities, targets, reduction="batchmean")

    def plain(self, im_q, im_k, labels):
        """The module's forward, step by step."""
        module, keys = self.module, self.module.K
        h_q, y_q = module.encoder_q(im_q)
        with torch.no_grad():
            for q, k in zip(module.encoder_q.parameters(), module.encoder_k.parameters(), strict=True):
                k.copy_(module.m * k + (1 - module.m) * q)
            h_k, _ = module.encoder_k(im_k)
        queue = (module.queue_list, module.queue_ptr)
        logits = plain_self_tuning.step(h_q, h_k, labels, *queue, keys, module.T)
        targets = torch.zeros_like(logits)
        targets[:, : keys + 1] = 1 / (keys + 1)
        return logits, targets, y_q


TASKS = [
    *map(loss_task, LOSSES),
    Task("flexmatch", FlexMatchNetwork, views),
    Task("mean_teacher", MeanTeacherNetwork, views, repeatable=False),
    Task("self_tuning", SelfTuningNetwork, views, repeatable=False),
]


def train(network, batches, step):
    """Losses and parameters after each step; ``step(network, optimizer, batch)`` returns the loss.

    SGD: an optimizer that divides by the size of the gradient would blow up the rounding noise of
    gradients that are 0.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    trajectory = []
    for number, batch in enumerate(batches):
        torch.manual_seed(number)  # the same dropout in both
        loss = torch.as_tensor(step(network, optimizer, batch)).detach()
        trajectory.append([loss.clone(), *(p.detach().clone() for p in network.parameters())])
    return trajectory


def plain_step(network, optimizer, batch):
    """The step that all others are compared with."""
    optimizer.zero_grad()
    loss = network(*batch)
    loss.backward()
    optimizer.step()
    return loss


def assert_same_training(got, expected, rtol=1e-9):
    """Step by step, all losses and parameters; and that something was learned at all."""
    assert len(got) == len(expected)
    for ours, plain in zip(got, expected, strict=True):
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, check_dtype=False)
    assert any(not torch.equal(a, b) for a, b in zip(expected[0][1:], expected[-1][1:], strict=True))
