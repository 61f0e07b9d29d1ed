"""Pseudo labels: `Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural
Networks (ICML 2013)
<http://citeseerx.ist.psu.edu/viewdoc/download?doi=10.1.1.664.3543&rep=rep1&type=pdf>`_."""

import torch
from torch import nn

from tllib_rs import _core
from tllib_rs._library import as_number, at_least_float32, register

__all__ = ["ConfidenceBasedSelfTrainingLoss"]


_compiled = register(
    "pseudo_label",
    "(Tensor y, Tensor y_target, float threshold)",
    _core.pseudo_label,
    lambda y, y_target, threshold: (
        y.new_empty((), dtype=at_least_float32(y.dtype)),
        y.new_empty(y.shape[:1] + y.shape[2:], dtype=torch.float32),
        y.new_empty(y.shape[:1] + y.shape[2:], dtype=torch.int64),
    ),
    extra=2,
    widened="on devices",
)


class ConfidenceBasedSelfTrainingLoss(nn.Module):
    r"""Cross entropy with pseudo labels, over the rows whose confidence is above a threshold.

    With :math:`q = \mathrm{softmax}(y^{target})`, not differentiated,

    .. math::
        l_i = \arg\max_c q_{ic}, \qquad m_i = [\max_c q_{ic} > \tau], \qquad
        \mathrm{loss} = \frac{1}{B} \sum_i m_i \, \mathrm{CE}(y_i, l_i)

    Args:
        threshold (float): :math:`\tau`, rounded to the dtype of the predictions and compared strictly.

    Inputs:
        - y (tensor): unnormalized predictions to train, (minibatch, C), floating point. Further
          dimensions may follow; each position in them counts as a row.
        - y_target (tensor): unnormalized predictions that give the labels, same shape. May be ``y``.

    Returns:
        A tuple of

        - self_training_loss: scalar; float64 for float64 predictions, else float32.
        - mask: (minibatch, ...), float32, 1 where a row is selected.
        - pseudo_labels: (minibatch, ...), int64; among equal probabilities the first class.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: an input is not (minibatch, C, ...), the shapes differ, or the threshold is NaN.
        RuntimeError: the devices differ.

    Examples::

        >>> loss = ConfidenceBasedSelfTrainingLoss(threshold=0.95)
        >>> y = torch.randn(32, 31, requires_grad=True)
        >>> self_training_loss, mask, pseudo_labels = loss(y, y)
        >>> self_training_loss.backward()
    """

    def __init__(self, threshold: float):
        super().__init__()
        _core.check_threshold(threshold)
        self.threshold = as_number(threshold)

    def forward(
        self, y: torch.Tensor, y_target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See the class."""
        if torch.compiler.is_compiling():
            return _compiled(y, y_target, self.threshold)
        return _core.pseudo_label(y, y_target, self.threshold)

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"threshold={self.threshold}"
