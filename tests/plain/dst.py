"""Worst-case estimation in plain PyTorch."""

from torch.nn import functional as F


def worst_case(y_l, y_l_adv, y_u, y_u_adv, eta_prime):
    """Cross entropy with the main head on labeled rows, and against it on unlabeled ones."""
    agree = F.cross_entropy(y_l_adv, y_l.argmax(dim=1))
    p = F.softmax(y_u_adv, dim=1).gather(1, y_u.argmax(dim=1, keepdim=True))
    return eta_prime * agree - (1 - p + 1e-6).clamp(max=1).log().mean()
