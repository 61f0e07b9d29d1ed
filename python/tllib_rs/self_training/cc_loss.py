"""Consistency of class confusion, a companion of `Minimum Class Confusion for Versatile Domain Adaptation
(ECCV 2020) <https://arxiv.org/abs/1912.03699>`_."""

import torch
from torch import nn

from tllib_rs import _core
from tllib_rs._library import as_number, at_least_float32, register

__all__ = ["CCConsistency"]


_compiled = register(
    "cc_loss",
    "(Tensor logits_strong, Tensor logits, float temperature, float thr)",
    lambda *arguments: _core.cc_loss(*arguments)[:2],
    lambda strong, logits, temperature, thr: (
        strong.new_empty((), dtype=at_least_float32(torch.promote_types(strong.dtype, logits.dtype))),
        strong.new_empty((), dtype=torch.float32),
    ),
    extra=1,
    widened="on devices",
)


class CCConsistency(nn.Module):
    r"""Consistency of the class confusion under weak and strong augmentation.

    Over the :math:`n` of :math:`B` rows whose weak prediction has a confidence of at least ``thr``, with
    :math:`p = \mathrm{softmax}(z / T)` and entropy weights :math:`w` as in
    :class:`~tllib_rs.self_training.mcc.MinimumClassConfusionLoss`,

    .. math::
        N_{ab} = \frac{M_{ab}}{\sum_k M_{kb}}, \quad M_{ab} = \sum_i w_i p_{ia} p_{ib}, \qquad
        \mathrm{loss} = \frac{n}{BC} \sum_{ab} (N_{ab} - N'_{ab})^2

    where :math:`N` comes from the weak and :math:`N'` from the strong logits. The weak side is not
    differentiated. If at most :math:`C / 8` rows are selected (:math:`C / 4` in float64 and where
    :math:`n C^2` is small) no :math:`C \times C` matrix is formed.

    Args:
        temperature (float): :math:`T > 0`, divides the logits.
        thr (float): least confidence, rounded to the dtype of the logits. Default: 0.7

    Inputs:
        - logits (tensor): unnormalized predictions on weakly augmented samples, (minibatch, C), floating
          point.
        - logits_strong (tensor): those on the same samples under strong augmentation, same shape.

    Returns:
        A tuple of

        - loss: scalar; float64 for float64 logits, else float32.
        - fraction: scalar, float32: :math:`n / B`.

        Where no row is selected these are the plain numbers ``(0, 0)``, as in tllib: test for a tensor
        before calling ``backward``. On devices other than the CPU, under ``torch.func`` and under
        ``torch.compile`` they are always tensors, of value 0 then and with a gradient of 0, because the
        number of selected rows is not known without waiting for the device.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: an input is not (minibatch, C) with C > 0, the shapes differ, the temperature is not above
            0, or thr is NaN.
        RuntimeError: the devices differ.

    A class that has probability 0 in every selected row makes tllib's loss NaN; here its column of the
    matrix is zero.

    Examples::

        >>> loss = CCConsistency(temperature=2.0, thr=0.1)
        >>> logits = torch.randn(32, 31)
        >>> logits_strong = torch.randn(32, 31, requires_grad=True)
        >>> consistency, fraction = loss(logits, logits_strong)
        >>> consistency.backward()
    """

    def __init__(self, temperature: float, thr: float = 0.7):
        super().__init__()
        _core.check_cc_loss(temperature, thr)
        self.temperature = as_number(temperature)
        self.thr = as_number(thr)

    def forward(
        self, logits: torch.Tensor, logits_strong: torch.Tensor
    ) -> tuple[torch.Tensor | int, torch.Tensor | int]:
        """See the class."""
        arguments = (logits_strong, logits, self.temperature, self.thr)
        if torch.compiler.is_compiling():
            return _compiled(*arguments)
        loss, fraction, nothing = _core.cc_loss(*arguments)
        # Numbers, not tensors: scripts use them to detect that there is nothing to train on.
        return (0, 0) if nothing else (loss, fraction)

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"temperature={self.temperature}, thr={self.thr}"
