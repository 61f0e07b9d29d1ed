"""Unsupervised data augmentation: `Unsupervised Data Augmentation for Consistency Training (NIPS 2020)
<https://arxiv.org/pdf/1904.12848v4.pdf>`_."""

import torch
from torch import nn

from tllib_rs import _core
from tllib_rs._library import as_number, at_least_float32, register

__all__ = ["StrongWeakConsistencyLoss"]


_compiled = register(
    "uda",
    "(Tensor y_strong, Tensor y, float threshold, float temperature)",
    _core.uda,
    lambda y_strong, y, threshold, temperature: (
        y_strong.new_empty((), dtype=at_least_float32(torch.promote_types(y_strong.dtype, y.dtype))),
    ),
    widened="on devices",
)


class StrongWeakConsistencyLoss(nn.Module):
    r"""Divergence of the predictions on strongly augmented samples from confident ones on weakly
    augmented samples.

    With :math:`q = \mathrm{softmax}(y)`, not differentiated, :math:`p = \mathrm{softmax}(y^{strong} / T)`
    and :math:`m_i = [\max_c q_{ic} > \tau]`,

    .. math::
        \mathrm{loss} = \frac{1}{\max(\sum_i m_i, 1)} \sum_i m_i \sum_c q_{ic} \log \frac{q_{ic}}{p_{ic}}

    Args:
        threshold (float): :math:`\tau`, rounded to the dtype of the predictions and compared strictly.
        temperature (float): :math:`T > 0`, divides the strong logits only.

    Inputs:
        - y_strong (tensor): unnormalized predictions on strongly augmented samples, (minibatch, C),
          floating point. Further dimensions may follow; each position in them counts as a row.
        - y (tensor): unnormalized predictions on weakly augmented samples, same shape; gets no gradient.

    Returns:
        A scalar, float64 for float64 predictions, else float32. 0 where no row is selected.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: an input is not (minibatch, C, ...), the shapes differ, the threshold is NaN, or the
            temperature is not above 0.
        RuntimeError: the devices differ.

    Examples::

        >>> loss = StrongWeakConsistencyLoss(threshold=0.8, temperature=0.4)
        >>> y_strong, y = torch.randn(32, 31, requires_grad=True), torch.randn(32, 31)
        >>> loss(y_strong, y).backward()
    """

    def __init__(self, threshold: float, temperature: float):
        super().__init__()
        _core.check_uda(threshold, temperature)
        self.threshold = as_number(threshold)
        self.temperature = as_number(temperature)

    def forward(self, y_strong: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if torch.compiler.is_compiling():
            return _compiled(y_strong, y, self.threshold, self.temperature)
        return _core.uda(y_strong, y, self.threshold, self.temperature)

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"threshold={self.threshold}, temperature={self.temperature}"
