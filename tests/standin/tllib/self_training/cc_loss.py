import torch.nn as nn

from .mcc import confusion

__all__ = ["CCConsistency"]


class CCConsistency(nn.Module):
    def __init__(self, temperature, thr=0.7):
        super(CCConsistency, self).__init__()
        self.temperature, self.thr = temperature, thr

    def forward(self, logits, logits_strong):
        rows, classes = logits.shape
        weak = (logits.detach() / self.temperature).softmax(dim=1)
        chosen = weak.max(dim=1).values >= self.thr
        if not chosen.any():
            return 0, 0
        strong = (logits_strong[chosen] / self.temperature).softmax(dim=1)
        count = chosen.float().sum()
        difference = confusion(weak[chosen], rows) - confusion(strong, rows)
        return difference.square().sum() / (rows * classes) * count, count / rows
