"""Minimum class confusion."""

from benches._case import OURS, PLAIN, TLLIB, Method, original
from benches._losses import SHAPES, loss_case
from tests.plain.mcc import mcc as plain
from tllib_rs.self_training.mcc import MinimumClassConfusionLoss

TEMPERATURE = 2.0
BARS = {(32, 31): {PLAIN: 4.0}, (256, 1000): {PLAIN: 20.0}}

_tllib = original("self_training.mcc")
_losses = {
    OURS: MinimumClassConfusionLoss(TEMPERATURE),
    PLAIN: lambda z: plain(z, TEMPERATURE),
    TLLIB: _tllib and _tllib.MinimumClassConfusionLoss(TEMPERATURE),
}

METHOD = Method("mcc", [loss_case(*shape, _losses, bars=BARS.get(shape)) for shape in SHAPES])
