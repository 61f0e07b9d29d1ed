"""Strong-weak consistency, where half of the weak predictions are confident enough."""

from benches._case import OURS, PLAIN, TLLIB, Method
from benches._families import family
from benches._losses import footprint, half_confident, loss_cases
from benches._providers import original
from tests.plain.uda import uda as plain
from tllib_rs.self_training.uda import StrongWeakConsistencyLoss

THRESHOLD, TEMPERATURE = 0.95, 0.85
#: Two softmaxes.
LIMIT_BAR = 1.3


def _losses(_):
    tllib = original("self_training.uda", "StrongWeakConsistencyLoss")
    return {
        OURS: StrongWeakConsistencyLoss(THRESHOLD, TEMPERATURE),
        PLAIN: lambda y_strong, y: plain(y_strong, y, THRESHOLD, TEMPERATURE),
        TLLIB: tllib and tllib(THRESHOLD, TEMPERATURE),
    }


METHOD = Method(
    "uda",
    loss_cases(_losses, half_confident, limit=LIMIT_BAR),
    footprints=[footprint(_losses, half_confident)],
    families=[family(_losses, half_confident)],
)
