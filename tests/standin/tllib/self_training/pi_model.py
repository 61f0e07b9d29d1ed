import numpy as np
import torch.nn as nn


def sigmoid_warm_up(current_epoch, warm_up_epochs):
    assert warm_up_epochs >= 0
    if warm_up_epochs == 0:
        return 1.0
    rest = 1.0 - np.clip(current_epoch, 0.0, warm_up_epochs) / warm_up_epochs
    return float(np.exp(-5.0 * rest**2))


class ConsistencyLoss(nn.Module):
    def __init__(self, distance_measure, reduction="mean"):
        super(ConsistencyLoss, self).__init__()
        self.distance_measure, self.reduction = distance_measure, reduction

    def forward(self, p1, p2, mask=1.0):
        rows = mask * self.distance_measure(p1, p2)
        return {"mean": rows.mean, "sum": rows.sum}.get(self.reduction, lambda: rows)()


class L2ConsistencyLoss(ConsistencyLoss):
    def __init__(self, reduction="mean"):
        super(L2ConsistencyLoss, self).__init__(lambda p, q: (p - q).square().sum(dim=1), reduction)
