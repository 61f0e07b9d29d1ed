"""Worst-case estimation: two pairs of predictions, of which the adversarial ones are differentiated."""

from benches._case import COMPILED, OURS, PLAIN, TLLIB, Method
from benches._families import family
from benches._losses import footprint, logits, loss_cases
from benches._providers import original
from tests.plain.dst import worst_case as plain
from tllib_rs.self_training.dst import WorstCaseEstimationLoss

ETA = 2.0
#: y_l_adv and y_u_adv.
ADVERSARIAL = (1, 3)


def _losses(_):
    tllib = original("self_training.dst", "WorstCaseEstimationLoss")
    return {
        OURS: WorstCaseEstimationLoss(ETA),
        PLAIN: lambda *predictions: plain(*predictions, ETA),
        TLLIB: tllib and tllib(ETA),
    }


METHOD = Method(
    "dst",
    # Plain takes 1 - p in float32, which leaves few digits where p is near 1, as it is in some of 4096 rows.
    # Against float64 its gradient is off by 2e-4 of the largest number there, compiled as well; ours by 3e-7.
    loss_cases(
        _losses,
        logits(4),
        limit=2.0,
        differentiated=ADVERSARIAL,
        tolerances={OURS: 1e-3, COMPILED: 1e-3},
    ),
    footprints=[footprint(_losses, logits(4), differentiated=ADVERSARIAL)],
    families=[family(_losses, logits(4), differentiated=ADVERSARIAL)],
)
