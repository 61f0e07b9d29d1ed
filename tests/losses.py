"""Every loss with a call, inputs and its plain formulation: what the tests of properties that all
losses share (types, transforms, strides, gradients) are parametrized over. A new method adds one line.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.plain import reid_loss as plain_reid_loss
from tests.plain.cc_loss import cc_loss as plain_cc_loss
from tests.plain.dst import worst_case as plain_dst
from tests.plain.entropy import entropy as plain_entropy
from tests.plain.mcc import mcc as plain_mcc
from tests.plain.pi_model import l2_consistency as plain_l2
from tests.plain.pseudo_label import pseudo_label as plain_pseudo_label
from tests.plain.self_ensemble import class_balance as plain_class_balance
from tests.plain.uda import uda as plain_uda
from tllib_rs.modules.entropy import entropy
from tllib_rs.self_training.cc_loss import CCConsistency
from tllib_rs.self_training.dst import WorstCaseEstimationLoss
from tllib_rs.self_training.mcc import MinimumClassConfusionLoss
from tllib_rs.self_training.pi_model import L2ConsistencyLoss
from tllib_rs.self_training.pseudo_label import ConfidenceBasedSelfTrainingLoss
from tllib_rs.self_training.self_ensemble import ClassBalanceLoss
from tllib_rs.self_training.uda import StrongWeakConsistencyLoss
from tllib_rs.vision.models.reid import loss as reid_loss


class Observed(TorchDispatchMode):
    """While a mode is active the composites run, in libtorch's operations that autograd differentiates."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Loss:
    """One loss under one setting."""

    name: str
    #: The callable that users call: a module or function of tensors.
    ours: Callable[..., Any]
    #: The same in plain PyTorch.
    plain: Callable[..., Any]
    #: Makes the inputs from (generator, rows, classes), float64. All are differentiated unless listed.
    inputs: Callable[..., tuple[torch.Tensor, ...]]
    #: Positions of inputs that get no gradient.
    constant: tuple[int, ...] = ()
    #: False where part of the formula is held constant, so that finite differences do not apply.
    gradcheck: bool = True

    #: What an empty batch gives if that differs from the plain formulation: an error that is clearer
    #: than its own, or a value.
    empty: Any = None

    def first(self, outputs):
        """The loss among the outputs."""
        return outputs[0] if isinstance(outputs, tuple) else outputs

    #: How a call is made with a module that needs more than the inputs, for ``module`` or a copy of it.
    through: Callable[..., Any] | None = None
    #: The module behind ``ours``, where there is one.
    module: Any = None

    def __post_init__(self):
        if isinstance(self.ours, torch.nn.Module):
            object.__setattr__(self, "module", self.ours)

    @property
    def differentiated(self):
        """The position of the first input that gets a gradient."""
        return min(k for k in range(9) if k not in self.constant)

    def __repr__(self):
        return self.name


def logits(count=1):
    """``count`` matrices of logits."""

    def make(generator, rows=7, classes=5):
        return tuple(
            2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(count)
        )

    return make


def probabilities(count=1):
    """``count`` matrices whose rows sum to 1."""

    def make(generator, rows=7, classes=5):
        return tuple(z.softmax(dim=1) for z in logits(count)(generator, rows, classes))

    return make


def masked(inputs):
    """``inputs`` and a weight for each row."""

    def make(generator, rows=7, classes=5):
        weights = torch.rand(rows, generator=generator, dtype=torch.float64)
        return (*inputs(generator, rows, classes), weights)

    return make


def cyclic(x, count=3):
    """A label below ``count`` for each row of ``x``."""
    return torch.arange(len(x), device=x.device) % count


# Made here and not in the calls, which torch.compile traces.
CLASS_BALANCE = {classes: ClassBalanceLoss(classes) for classes in (*range(1, 1100), 1500, 3000, 5003)}
TRIPLET = reid_loss.TripletLoss(1.0)
TRIPLET_XBM = reid_loss.TripletLossXBM(0.5, normalize_feature=True)
SOFT_TRIPLET = reid_loss.SoftTripletLoss()
SOFT_TRIPLET_MARGIN = reid_loss.SoftTripletLoss(0.2, normalize_feature=True)
LABEL_SMOOTH = reid_loss.CrossEntropyLossWithLabelSmooth(6, 0.2)


def called(name, module, through, plain, inputs, **options):
    """A loss whose module takes labels as well, which ``through(module)`` adds."""
    return Loss(name, through(module), plain, inputs, module=module, through=through, **options)


LOSSES = [
    # The entropy weights are held constant, so finite differences of the whole do not match.
    Loss("mcc", MinimumClassConfusionLoss(2.5), lambda z: plain_mcc(z, 2.5), logits(), gradcheck=False),
    Loss(
        "pseudo_label",
        ConfidenceBasedSelfTrainingLoss(0.5),
        lambda y, t: plain_pseudo_label(y, t, 0.5),
        logits(2),
        constant=(1,),
    ),
    Loss(
        "dst",
        WorstCaseEstimationLoss(2.0),
        lambda y_l, y_l_adv, y_u, y_u_adv: plain_dst(y_l, y_l_adv, y_u, y_u_adv, 2.0),
        logits(4),
        constant=(0, 2),
    ),
    # The entropy weights are held constant here too. A threshold of 0 selects every row.
    Loss(
        "cc_loss",
        CCConsistency(2.5, 0.0),
        lambda z, s: plain_cc_loss(z, s, 2.5, 0.0),
        logits(2),
        constant=(0,),
        gradcheck=False,
    ),
    called(
        "class_balance",
        CLASS_BALANCE[5],
        # The number of classes is an argument of the class: a module for each that the tests use.
        lambda m: lambda p: (m if m.num_classes == p.shape[1] else CLASS_BALANCE[p.shape[1]])(p),
        lambda p: plain_class_balance(p, p.shape[1]),
        probabilities(),
        # tllib: NaN is not a probability, and its binary cross entropy raises.
        empty=torch.nan,
    ),
    Loss("entropy", entropy, plain_entropy, probabilities()),
    Loss("entropy_mean", lambda p: entropy(p, "mean"), lambda p: plain_entropy(p, "mean"), probabilities()),
    Loss("pi_model", L2ConsistencyLoss(), plain_l2, probabilities(2)),
    Loss(
        "pi_model_none",
        L2ConsistencyLoss("none"),
        lambda p1, p2: plain_l2(p1, p2, reduction="none"),
        probabilities(2),
    ),
    Loss("pi_model_mask", L2ConsistencyLoss("sum"), lambda *x: plain_l2(*x, "sum"), masked(probabilities(2))),
    Loss(
        "uda",
        StrongWeakConsistencyLoss(0.5, 0.4),
        lambda y_strong, y: plain_uda(y_strong, y, 0.5, 0.4),
        logits(2),
        constant=(1,),
    ),
    called(
        "triplet",
        TRIPLET,
        lambda m: lambda f: m(f, cyclic(f)),
        lambda f: plain_reid_loss.triplet(f, cyclic(f), 1.0),
        logits(),
        empty=ValueError,
    ),
    called(
        "triplet_xbm_normalized",
        TRIPLET_XBM,
        lambda m: lambda f, x: m(f, cyclic(f), x, cyclic(x)),
        lambda f, m: plain_reid_loss.triplet_xbm(f, cyclic(f), m, cyclic(m), 0.5, True),
        logits(2),
        empty=ValueError,
    ),
    called(
        "soft_triplet",
        SOFT_TRIPLET,
        lambda m: lambda f, t: m(f, t, cyclic(f)),
        lambda f, t: plain_reid_loss.soft_triplet(f, t, cyclic(f)),
        logits(2),
        constant=(1,),
        empty=ValueError,
    ),
    called(
        "soft_triplet_margin_normalized",
        SOFT_TRIPLET_MARGIN,
        lambda m: lambda f: m(f, None, cyclic(f)),
        lambda f: plain_reid_loss.soft_triplet(f, f, cyclic(f), 0.2, True),
        logits(),
        empty=ValueError,
    ),
    Loss(
        "pairwise_distances",
        reid_loss.pairwise_euclidean_distance,
        plain_reid_loss.distances,
        logits(2),
    ),
    Loss(
        "reid_cross_entropy",
        reid_loss.CrossEntropyLoss(),
        plain_reid_loss.cross_entropy,
        logits(2),
        constant=(1,),
    ),
    called(
        "label_smooth",
        LABEL_SMOOTH,
        lambda m: lambda y: m(y, cyclic(y, y.shape[1])),
        lambda y: plain_reid_loss.label_smooth(y, cyclic(y, y.shape[1]), 6, 0.2),
        logits(),
    ),
]
