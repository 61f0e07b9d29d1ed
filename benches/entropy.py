"""The mean entropy of predictions."""

from benches._case import OURS, PLAIN, TLLIB, Method
from benches._families import family
from benches._losses import footprint, loss_cases, probabilities
from benches._providers import original
from tests.plain.entropy import entropy as plain
from tllib_rs.modules.entropy import entropy


def _losses(_):
    tllib = original("modules.entropy", "entropy")
    return {
        OURS: lambda p: entropy(p, "mean"),
        PLAIN: lambda p: plain(p, "mean"),
        TLLIB: tllib and (lambda p: tllib(p, "mean")),
    }


def _each(_):
    """Squared, so that the rows' incoming gradients differ."""
    return {
        OURS: lambda p: entropy(p).square().sum(),
        PLAIN: lambda p: plain(p).square().sum(),
    }


METHOD = Method(
    "entropy",
    loss_cases(_losses, probabilities(1)),
    footprints=[footprint(_losses, probabilities(1))],
    families=[family(_losses, probabilities(1)), family(_each, probabilities(1), loss="each row")],
)
