"""The losses of person re-identification in plain PyTorch."""

import torch
from torch.nn import functional as F


def distances(x, y):
    """All distances, through the matrix product."""
    squares = x.pow(2).sum(1)[:, None] + y.pow(2).sum(1)[None, :] - 2 * x @ y.T
    return squares.clamp(min=1e-12).sqrt()


def mine(d, same):
    """Distances and indices of the hardest positives and negatives, by sorting whole rows."""
    positive = (d - 1e7 * (1 - same)).sort(dim=1, descending=True)
    negative = (d + 1e7 * same).sort(dim=1)
    return positive.values[:, 0], negative.values[:, 0], positive.indices[:, 0], negative.indices[:, 0]


def _same(a, b):
    return (a[:, None] == b[None, :]).float()


def triplet(f, labels, margin, normalize=False):
    """Hinge over the hardest pairs of the batch."""
    return triplet_xbm(f, labels, f, labels, margin, normalize)


def triplet_xbm(f, labels, memory, memory_labels, margin, normalize=False):
    """Hinge over the hardest pairs with a memory."""
    if normalize:
        f, memory = F.normalize(f), F.normalize(memory)
    ap, an, _, _ = mine(distances(f, memory), _same(labels, memory_labels))
    return F.relu(ap - an + margin).mean()


def soft_triplet(f, teacher, labels, margin=None, normalize=False):
    """Two-way cross entropy over the hardest pairs."""
    if normalize:
        f, teacher = F.normalize(f), F.normalize(teacher)
    ap, an, p, n = mine(distances(f, f), _same(labels, labels))
    log_probability = torch.stack((ap, an), dim=1).log_softmax(dim=1)
    if margin is None:
        d = distances(teacher, teacher).detach()
        rows = torch.arange(len(d), device=d.device)
        target = torch.stack((d[rows, p], d[rows, n]), dim=1).softmax(dim=1)
    else:
        target = torch.tensor([margin, 1 - margin], dtype=f.dtype, device=f.device)
    return -(target * log_probability).sum(dim=1).mean()


def cross_entropy(y, targets):
    """With the softmax of other logits."""
    return -(targets.softmax(dim=1).detach() * y.log_softmax(dim=1)).sum(dim=1).mean()


def label_smooth(y, labels, num_classes, epsilon):
    """With smoothed labels."""
    targets = (1 - epsilon) * F.one_hot(labels, y.shape[1]).to(y.dtype) + epsilon / num_classes
    return -(targets * y.log_softmax(dim=1)).mean(dim=0).sum()
