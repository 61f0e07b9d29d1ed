"""Cross entropy with pseudo labels, of which half are confident enough."""

import torch

from benches._case import OURS, PLAIN, TLLIB, Method, original
from benches._losses import SHAPES, logits, loss_case
from tests.plain.pseudo_label import pseudo_label as plain
from tllib_rs.self_training.pseudo_label import ConfidenceBasedSelfTrainingLoss

THRESHOLD = 0.95

_tllib = original("self_training.pseudo_label")
_losses = {
    OURS: ConfidenceBasedSelfTrainingLoss(THRESHOLD),
    PLAIN: lambda y, target: plain(y, target, THRESHOLD),
    TLLIB: _tllib and _tllib.ConfidenceBasedSelfTrainingLoss(THRESHOLD),
}


def _inputs(generator, rows, classes):
    (y,) = logits(generator, rows, classes)
    target = torch.randn(rows, classes, generator=generator)
    # Every second row is certain of one class: rows that are not selected cost less.
    target[::2, 0] += 30
    return y, target


METHOD = Method(
    "pseudo_label", [loss_case(*shape, _losses, _inputs) for shape in sorted([*SHAPES, (448, 100)])]
)
