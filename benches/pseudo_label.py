"""Cross entropy with pseudo labels, of which half are confident enough."""

from benches._case import OURS, PLAIN, TLLIB, Method
from benches._families import family
from benches._losses import footprint, half_confident, loss_cases
from benches._providers import original
from tests.plain.pseudo_label import pseudo_label as plain
from tllib_rs.self_training.pseudo_label import ConfidenceBasedSelfTrainingLoss

THRESHOLD = 0.95
#: Two softmaxes.
LIMIT_BAR = 1.3


def _losses(_):
    tllib = original("self_training.pseudo_label", "ConfidenceBasedSelfTrainingLoss")
    return {
        OURS: ConfidenceBasedSelfTrainingLoss(THRESHOLD),
        PLAIN: lambda y, target: plain(y, target, THRESHOLD),
        TLLIB: tllib and tllib(THRESHOLD),
    }


METHOD = Method(
    "pseudo_label",
    loss_cases(_losses, half_confident, limit=LIMIT_BAR),
    footprints=[footprint(_losses, half_confident)],
    families=[family(_losses, half_confident)],
)
