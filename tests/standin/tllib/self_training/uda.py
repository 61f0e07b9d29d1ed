import torch.nn as nn
import torch.nn.functional as F


class StrongWeakConsistencyLoss(nn.Module):
    def __init__(self, threshold, temperature):
        super(StrongWeakConsistencyLoss, self).__init__()
        self.threshold, self.temperature = threshold, temperature

    def forward(self, y_strong, y):
        target = y.detach().softmax(dim=1)
        mask = (target.max(dim=1).values > self.threshold).float()
        log_p = (y_strong / self.temperature).log_softmax(dim=1)
        rows = F.kl_div(log_p, target, reduction="none").sum(dim=1)
        return (mask * rows).sum() / mask.sum().clamp(min=1)
