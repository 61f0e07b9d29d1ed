"""Entropy of predictions."""

import torch

from tllib_rs import _core
from tllib_rs._library import register

__all__ = ["entropy"]


_compiled = register(
    "entropy",
    "(Tensor predictions, str? reduction)",
    _core.entropy,
    lambda predictions, reduction: (
        predictions.new_empty(() if reduction == "mean" else predictions.shape[:1] + predictions.shape[2:]),
    ),
    widened="on devices",
)


def entropy(predictions: torch.Tensor, reduction: str | None = "none") -> torch.Tensor:
    r"""Entropy of each row, :math:`H_i = -\sum_c p_{ic} \log(p_{ic} + 10^{-5})`.

    Args:
        predictions (tensor): probabilities, (minibatch, C, ...), floating point; summed over dimension 1.
        reduction (str, optional): ``'none'`` or ``None`` for one entropy a row, ``'mean'`` for their mean.
            ``'sum'`` returns rows too, as in tllib. Default: ``'none'``

    Returns:
        (minibatch, ...), or a scalar for ``'mean'``, in the dtype of the predictions (float32 under
        autocast on devices other than the CPU).

    Raises:
        TypeError: predictions are not a floating-point tensor, or the reduction is not a str.
        ValueError: fewer than two dimensions, or an unknown reduction.
    """
    if torch.compiler.is_compiling():
        return _compiled(predictions, reduction)
    return _core.entropy(predictions, reduction)
