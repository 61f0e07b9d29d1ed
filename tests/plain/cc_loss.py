"""Consistency of class confusion in plain PyTorch, by the matrices themselves."""

import torch
from torch.nn import functional as F


def _confusion(z, temperature):
    p = F.softmax(z / temperature, dim=1)
    entropy = -(p * torch.log(p + 1e-5)).sum(dim=1).detach()
    matrix = p.T @ (p * (1 + torch.exp(-entropy))[:, None])
    return matrix / matrix.sum(dim=1)


def cc_loss(logits, logits_strong, temperature, thr):
    """Loss and selected fraction; two zeros where nothing is selected."""
    logits = logits.detach()
    chosen = F.softmax(logits / temperature, dim=1).amax(dim=1) >= thr
    if not chosen.any():
        return 0, 0
    gap = _confusion(logits[chosen], temperature) - _confusion(logits_strong[chosen], temperature)
    count = chosen.float().sum()
    return (gap**2).sum() / logits.numel() * count, count / len(logits)
