"""Strong-weak consistency in plain PyTorch."""

from torch.nn import functional as F


def uda(y_strong, y, threshold, temperature):
    """The mean divergence of the confident rows."""
    q = F.softmax(y.detach(), dim=1)
    chosen = (q.max(dim=1).values > threshold).float()
    rows = F.kl_div(F.log_softmax(y_strong / temperature, dim=1), q, reduction="none").sum(dim=1)
    return (rows * chosen).sum() / chosen.sum().clamp(min=1)
