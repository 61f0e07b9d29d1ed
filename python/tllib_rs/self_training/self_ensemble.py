"""Self-ensembling: `Self-ensembling for Visual Domain Adaptation (ICLR 2018)
<https://arxiv.org/abs/1706.05208>`_. Its teacher is in :mod:`tllib_rs.self_training.mean_teacher`."""

import math
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from tllib_rs import _core
from tllib_rs._distributed import Ranks
from tllib_rs._library import as_number, register
from tllib_rs.self_training import mcc

__all__ = ["ClassBalanceLoss", "ImageClassifier"]


_compiled = register(
    "class_balance",
    "(Tensor p, int num_classes)",
    _core.class_balance,
    lambda p, num_classes: (p.new_empty(()),),
    widened="everywhere",
)


def _against(prior: torch.Tensor, p: torch.Tensor, num_classes: int) -> torch.Tensor:
    """The loss with the means compared with ``prior``."""
    if not torch.compiler.is_compiling():
        # Only for the errors that it raises.
        _core.class_balance(p.detach() if isinstance(p, torch.Tensor) else p, num_classes)
    means = p.mean(dim=0, dtype=torch.promote_types(p.dtype, torch.float32))
    # torch aborts a device where a mean is no probability, and refuses to run under autocast there.
    inside = (means >= 0) & (means <= 1)
    with torch.autocast(p.device.type, enabled=False):
        each = F.binary_cross_entropy(torch.where(inside, means, 0.5), prior.to(means), reduction="none")
    # Its gradient is NaN, too.
    loss = (each + means * torch.zeros_like(means).masked_fill(~inside, math.nan)).mean()
    return loss if torch.is_autocast_enabled(p.device.type) else loss.to(p.dtype)


class ClassBalanceLoss(nn.Module):
    r"""Penalty for predictions that favor some classes over a batch.

    The mean probability of each class, :math:`m_c = \frac{1}{B} \sum_i p_{ic}`, against the uniform
    :math:`u = 1/C`:

    .. math::
        \mathrm{loss} = -\frac{1}{C} \sum_c u \log m_c + (1 - u) \log(1 - m_c)

    Logarithms are clamped to at least -100, and :math:`m_c (1 - m_c)` in the gradient to at least
    :math:`10^{-12}`, as in ``torch.nn.functional.binary_cross_entropy``.

    Args:
        num_classes (int): :math:`C`, the number of classes.
        process_group (ProcessGroup, optional): ranks over whose concatenated batches the means are taken.
            Default: ``None``, the batch of this process alone

    Inputs:
        - p (tensor): probabilities, (minibatch, C), float32, float64, float16 or bfloat16 (tllib: torch's
          default dtype).

    Returns:
        A scalar in the dtype of the probabilities (float32 for half types in an autocast region). NaN for an
        empty batch.

    Raises:
        TypeError: p is not a floating-point tensor, or num_classes is not an integer.
        ValueError: p is not (minibatch, C), the mean of a column is below 0 or above 1, or num_classes is
            below 1; this process is not a member of the group. An assigned ``uniform_distribution`` is not
            (C,) or holds numbers outside [0, 1], or there is a group.
        RuntimeError: the group was destroyed; ``create_graph=True`` with a group.

    With a group the ranks all-reduce their column sums and numbers of rows, which may differ and be 0, in one
    message of :math:`C + 1` numbers in float64. All ranks get the same loss, or the same ValueError for a
    mean outside [0, 1], and each the gradient with respect to its own probabilities **times the number of
    ranks**, so that the average that DistributedDataParallel takes is the gradient of the loss. Backward
    sends nothing, so the incoming gradient must be the same on every rank.

    The means are checked on the CPU only: elsewhere the check would synchronize the device, so the loss is
    NaN instead. It is NaN there too within a dispatch mode, and in a compiled function with an assigned
    ``uniform_distribution``.

    Examples::

        >>> loss = ClassBalanceLoss(num_classes=31)
        >>> p = torch.randn(32, 31, requires_grad=True).softmax(dim=1)
        >>> loss(p).backward()
    """

    _ranks: Ranks | None = None
    _prior: torch.Tensor | None = None

    def __init__(self, num_classes: int, *, process_group: ProcessGroup | None = None):
        super().__init__()
        _core.check_num_classes(num_classes)
        self.num_classes = as_number(num_classes)
        self._ranks = Ranks.of(type(self).__name__, process_group)

    @property
    def uniform_distribution(self) -> torch.Tensor:
        """The probabilities :math:`u` that the means are compared with, (C,); not part of the state, as in
        tllib. The assigned tensor, which torch's operations then use in place of :math:`1/C`, or else a
        copy."""
        if self._prior is None:
            return torch.full((self.num_classes,), 1 / self.num_classes)
        return self._prior

    @uniform_distribution.setter
    def uniform_distribution(self, prior: torch.Tensor) -> None:
        if not isinstance(prior, torch.Tensor):
            raise TypeError(
                f"ClassBalanceLoss: uniform_distribution must be a tensor, got {type(prior).__name__}"
            )
        if prior.shape != (self.num_classes,):
            raise ValueError(
                f"ClassBalanceLoss: uniform_distribution must have shape [{self.num_classes}], "
                f"got shape {list(prior.shape)}"
            )
        if not ((prior >= 0) & (prior <= 1)).all():
            raise ValueError("ClassBalanceLoss: uniform_distribution must hold probabilities")
        if self._ranks is not None:
            raise ValueError("ClassBalanceLoss: uniform_distribution is 1 / num_classes with process_group")
        self._prior = prior

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if self._prior is not None:
            return _against(self._prior, p, self.num_classes)
        if self._ranks is not None:
            self._ranks.refuse_tangents(p)
            sums = self._ranks.sum_(_core.class_balance_sums(p, self.num_classes))
            return _core.class_balance_of_sums(p, self.num_classes, sums, self._ranks.size)
        if torch.compiler.is_compiling():
            return _compiled(p, self.num_classes)
        return _core.class_balance(p, self.num_classes)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # tllib pickles the probabilities themselves.
        prior = state.get("uniform_distribution")
        super().__setstate__({name: value for name, value in state.items() if name != "uniform_distribution"})
        if prior is not None:
            self.num_classes = len(prior)
            if not torch.allclose(prior, self.uniform_distribution.to(prior)):
                self.uniform_distribution = prior

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"num_classes={self.num_classes}"


class ImageClassifier(mcc.ImageClassifier):
    """The classifier that the self-ensembling examples train, built like that of MCC."""
