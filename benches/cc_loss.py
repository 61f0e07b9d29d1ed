"""Consistency of class confusion, where half of the weak predictions are confident enough."""

import torch
from torch.nn import functional as F

from benches._case import COMPILED, OURS, PLAIN, TLLIB, Footprint, Method
from benches._families import family
from benches._losses import FEW_CLASSES, LARGE, MATRIX, footprint, half_confident, loss_cases
from benches._providers import original
from tests.plain.cc_loss import cc_loss as plain
from tllib_rs.self_training.cc_loss import CCConsistency

TEMPERATURE, THRESHOLD = 2.5, 0.7


def gram_form(z: torch.Tensor, strong: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss through products of the chosen rows with one another, in float64 (it subtracts nearly equal
    numbers): the only one to compare with where a C x C matrix is out of the question."""
    z, strong = z.detach().double(), strong.double()
    chosen = F.softmax(z / TEMPERATURE, dim=1).amax(dim=1) >= THRESHOLD

    def factors(logits):
        p = F.softmax(logits[chosen] / TEMPERATURE, dim=1)
        weighted = p * (1 + torch.exp((p * torch.log(p + 1e-5)).sum(dim=1).detach()))[:, None]
        # The matrix is p.T @ (weighted / sums).
        return p, weighted / weighted.sum(dim=0)

    (p, q), (p_strong, q_strong) = factors(z), factors(strong)
    left, right = torch.cat([p, p_strong]), torch.cat([q, -q_strong])
    square = ((left @ left.T) * (right @ right.T)).sum()
    count = chosen.double().sum()
    return (square / z.numel() * count).float(), (count / len(z)).float()


def _losses(classes):
    tllib = original("self_training.cc_loss", "CCConsistency")
    own = {OURS: CCConsistency(TEMPERATURE, THRESHOLD)}
    if classes > MATRIX:
        return own | {"gram form": gram_form}
    return own | {
        PLAIN: lambda z, strong: plain(z, strong, TEMPERATURE, THRESHOLD),
        TLLIB: tllib and tllib(TEMPERATURE, THRESHOLD),
    }


def _inputs(*size):
    strong, z = half_confident(*size)
    return z, strong


#: logits_strong.
STRONG = (1,)


def _footprint() -> Footprint:
    gradient = footprint(_losses, _inputs, differentiated=STRONG)
    rows, _ = LARGE
    # Products in float64 of the chosen rows, which are half of all.
    products = 6 * 8 * (rows // 2) ** 2
    return Footprint(
        gradient.case, gradient.expected + products, "one gradient and six products of rows with rows"
    )


METHOD = Method(
    "cc_loss",
    # Inductor adds up the squares of a 1000 x 1000 matrix in float32, one after the other in each lane: with
    # AVX-512 the loss is off by 1.0e-4 of itself, where ours and the plain one are the same number.
    loss_cases(_losses, _inputs, differentiated=STRONG, tolerances={COMPILED: 5e-4}),
    footprints=[_footprint()],
    families=[family(_losses, _inputs, differentiated=STRONG, largest=FEW_CLASSES)],
)
