"""DataLoader workers, forked and spawned, that call losses and FlexMatch while they make the batches."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader

from tests.plain import entropy as plain_entropy
from tests.plain import flexmatch as plain_flexmatch
from tests.plain import mcc as plain_mcc
from tests.plain import pseudo_label as plain_pseudo_label
from tests.trainings import CLASSES, FEATURES, Body, mapping
from tllib_rs.modules.entropy import entropy
from tllib_rs.self_training.flexmatch import DynamicThresholdingModule
from tllib_rs.self_training.mcc import MinimumClassConfusionLoss
from tllib_rs.self_training.pseudo_label import ConfidenceBasedSelfTrainingLoss

SAMPLES, BATCH = 48, 8


class Ours:
    """What the workers and the training call."""

    thresholds = DynamicThresholdingModule
    mcc = staticmethod(MinimumClassConfusionLoss(2.0))
    entropy = staticmethod(entropy)
    pseudo_label = staticmethod(ConfidenceBasedSelfTrainingLoss(0.4))


class Plain:
    """The same in plain PyTorch."""

    thresholds = plain_flexmatch.DynamicThresholdingModule

    @staticmethod
    def mcc(logits):
        return plain_mcc.mcc(logits, 2.0)

    entropy = staticmethod(plain_entropy.entropy)

    @staticmethod
    def pseudo_label(y, y_target):
        return plain_pseudo_label.pseudo_label(y, y_target, 0.4)


class Samples(torch.utils.data.Dataset):
    """A row of numbers and its position."""

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.rows = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64)

    def __len__(self):
        return SAMPLES

    def __getitem__(self, k):
        return k, self.rows[k]


class Collate:
    """Pseudo labels by the network as of the epoch's start, which of them pass, and weights."""

    def __init__(self, provider, network, thresholds):
        self.provider, self.network, self.thresholds = provider, network, thresholds

    def __call__(self, samples):
        indices, x = torch.tensor([k for k, _ in samples]), torch.stack([row for _, row in samples])
        with torch.no_grad():
            (y,) = self.network(x)
        p = y.softmax(dim=1)
        confidence, labels = p.max(dim=1)
        passed = confidence >= self.thresholds.get_threshold(labels)
        # A gradient, too: how much a sample confuses the classes.
        y.requires_grad_()
        (confusing,) = torch.autograd.grad(self.provider.mcc(y), y)
        weights = torch.exp(-self.provider.entropy(p)) + confusing.norm(dim=1)
        return indices, x, y.detach(), labels, passed, weights.detach()


def train(provider, epochs, **workers):
    """Losses step by step, and all labels at the end. Workers see thresholds as of their epoch's start."""
    torch.manual_seed(0)
    network = Body(dropout=0.0).double()
    thresholds = provider.thresholds(0.5, True, mapping, CLASSES, SAMPLES, "cpu")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    losses = []
    for epoch in range(epochs):
        # A network that is sent to a spawned worker lies in shared memory from then on: send a copy.
        of_epoch = thresholds if workers else copy.deepcopy(thresholds)
        loader = DataLoader(
            Samples(),
            BATCH,
            shuffle=True,
            generator=torch.Generator().manual_seed(epoch),
            collate_fn=Collate(provider, copy.deepcopy(network), of_epoch),
            **workers,
        )
        for indices, x, y_start, labels, passed, weights in loader:
            (y,) = network(x)
            loss = provider.pseudo_label(y, y_start)[0] + provider.mcc(y)
            loss = (
                loss
                + (torch.nn.functional.cross_entropy(y, labels, reduction="none") * weights * passed).mean()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            thresholds.update(indices, (y.softmax(dim=1).max(dim=1).values >= 0.5).float(), labels)
            losses.append(loss.item())
    return losses, thresholds.net_outputs.clone()


@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize(("start", "workers", "epochs"), [("fork", 2, 4), ("spawn", 1, 2)])
def test_workers_that_call_losses_and_flexmatch(start, workers, epochs):
    # The parent has used the threads of our kernels before it forks.
    large = torch.randn(600, 500, requires_grad=True)
    Ours.mcc(large).backward()
    losses, labels = train(Ours, epochs, num_workers=workers, multiprocessing_context=start)
    expected_losses, expected_labels = train(Plain, epochs)
    assert len(losses) == epochs * SAMPLES // BATCH
    torch.testing.assert_close(losses, expected_losses, rtol=1e-9, atol=1e-9)
    assert torch.equal(labels, expected_labels)
    assert (labels >= 0).sum() > 3
    assert len({*labels.tolist()}) > 2
