"""Pseudo labels in plain PyTorch."""

from torch.nn import functional as F


def pseudo_label(y, y_target, threshold):
    """Loss, mask and labels."""
    confidence, labels = F.softmax(y_target.detach(), dim=1).max(dim=1)
    mask = (confidence > threshold).float()
    loss = (F.cross_entropy(y, labels, reduction="none") * mask).mean()
    return loss, mask, labels
