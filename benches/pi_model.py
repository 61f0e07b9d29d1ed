"""The squared distance of two predictions, both differentiated."""

import torch

from benches._case import OURS, PLAIN, TLLIB, Method
from benches._families import family
from benches._losses import footprint, loss_cases, probabilities
from benches._providers import original
from tests.plain.pi_model import l2_consistency as plain
from tllib_rs.self_training.pi_model import L2ConsistencyLoss

BOTH = (0, 1)


def _losses(_):
    tllib = original("self_training.pi_model", "L2ConsistencyLoss")
    return {OURS: L2ConsistencyLoss(), PLAIN: plain, TLLIB: tllib and tllib()}


def _each(_):
    """Squared, so that the rows' incoming gradients differ."""
    loss = L2ConsistencyLoss("none")
    return {
        OURS: lambda p1, p2: loss(p1, p2).square().sum(),
        PLAIN: lambda p1, p2: plain(p1, p2, reduction="none").square().sum(),
    }


def _masked_inputs(generator, rows, classes):
    """Every third row is masked."""
    return *probabilities(2)(generator, rows, classes), (torch.arange(rows) % 3 > 0).float()


METHOD = Method(
    "pi_model",
    loss_cases(_losses, probabilities(2), limit=1.0, differentiated=BOTH),
    footprints=[footprint(_losses, probabilities(2), differentiated=BOTH)],
    families=[
        family(_losses, probabilities(2), differentiated=BOTH),
        family(_each, probabilities(2), differentiated=BOTH, loss="each row"),
        family(_losses, _masked_inputs, differentiated=BOTH, loss="mask"),
    ],
)
