"""Class balance of predictions."""

from benches._case import OURS, PLAIN, TLLIB, Method
from benches._families import family
from benches._losses import footprint, loss_cases, probabilities
from benches._providers import original
from tests.plain.self_ensemble import class_balance as plain
from tllib_rs.self_training.self_ensemble import ClassBalanceLoss


def _losses(classes):
    tllib = original("self_training.self_ensemble", "ClassBalanceLoss")
    return {
        OURS: ClassBalanceLoss(classes),
        PLAIN: lambda p: plain(p, classes),
        TLLIB: tllib and tllib(classes),
    }


METHOD = Method(
    "self_ensemble",
    loss_cases(_losses, probabilities(1), limit=1.0),
    footprints=[footprint(_losses, probabilities(1))],
    families=[family(_losses, probabilities(1))],
)
