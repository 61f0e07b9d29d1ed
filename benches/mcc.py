"""Minimum class confusion."""

import torch
from torch.nn import functional as F

from benches._case import OURS, PLAIN, TLLIB, Method, faster
from benches._families import family
from benches._losses import FEW_CLASSES, MATRIX, VARIANTS, footprint, loss_cases
from benches._providers import original, package
from tests.plain.mcc import mcc as plain
from tllib_rs.self_training.mcc import MinimumClassConfusionLoss

TEMPERATURE = 2.0
#: The plain formulation does not run in half types, which have no torch.trace.
DTYPES = [torch.float32, torch.float64]
BARS = {(32, 31): [faster(PLAIN, 5.0)], (256, 1000): [faster(PLAIN, 50.0)]}


def closed_form(z: torch.Tensor) -> torch.Tensor:
    """The loss without the C x C matrix in torch operations: how much of the speed is due to the formula."""
    p = F.softmax(z / TEMPERATURE, dim=1)
    weight = 1 + torch.exp((p * torch.log(p + 1e-5)).sum(dim=1).detach())
    weight = (weight * len(z) / weight.sum())[:, None]
    return 1 - ((weight * p * p).sum(dim=0) / (weight * p).sum(dim=0)).mean()


def _losses(classes):
    tllib = original("self_training.mcc", "MinimumClassConfusionLoss")
    adapt = package("pytorch_adapt.layers")
    matrices = {
        PLAIN: lambda z: plain(z, TEMPERATURE),
        TLLIB: tllib and tllib(TEMPERATURE),
        "pytorch_adapt": adapt and adapt.MCCLoss(T=TEMPERATURE),
    }
    own = {OURS: MinimumClassConfusionLoss(TEMPERATURE), "closed form": closed_form}
    return own | (matrices if classes <= MATRIX else {})


METHOD = Method(
    "mcc",
    loss_cases(
        _losses,
        limit=2.0,
        bars=BARS,
        # pytorch_adapt's logarithm has another epsilon.
        tolerances={"pytorch_adapt": 1e-3},
        variants=[variant for variant in VARIANTS if variant.dtype in DTYPES],
    ),
    footprints=[footprint(_losses)],
    families=[family(_losses, largest=FEW_CLASSES, dtypes=DTYPES)],
)
