"""Pi model: `Temporal Ensembling for Semi-Supervised Learning (ICLR 2017)
<https://arxiv.org/abs/1610.02242>`_."""

import math
from collections.abc import Callable

import torch
from torch import nn

from tllib_rs import _core
from tllib_rs._library import at_least_float32, register

__all__ = ["ConsistencyLoss", "L2ConsistencyLoss", "sigmoid_warm_up"]


class WarmUpError(ValueError, AssertionError):
    """A negative warm-up. tllib asserts here, so it can be caught as AssertionError too."""


def sigmoid_warm_up(current_epoch: float, warm_up_epochs: int) -> float:
    r"""Weight of the consistency loss during warm-up, from :math:`e^{-5}` to 1.

    .. math::
        \exp\left(-5 \left(1 - \frac{\min(\max(t, 0), T)}{T}\right)^2\right)

    Args:
        current_epoch (float): :math:`t`.
        warm_up_epochs (int): :math:`T`; the weight is always 1 where it is 0.

    Raises:
        ValueError: a negative :math:`T` (also an AssertionError, as in tllib).

    Examples::

        >>> sigmoid_warm_up(80, 80)
        1.0
    """
    if not warm_up_epochs >= 0:
        raise WarmUpError(f"sigmoid_warm_up: warm_up_epochs must be at least 0, got {warm_up_epochs}")
    if warm_up_epochs == 0:
        return 1.0
    # NaN is the first argument of both, and so propagates.
    epoch = min(max(float(current_epoch), 0.0), float(warm_up_epochs))
    return math.exp(-5.0 * (1.0 - epoch / warm_up_epochs) ** 2)


class ConsistencyLoss(nn.Module):
    r"""Distance between two predictions of the same samples, times a mask.

    .. math::
        l_i = D(p_1, p_2)_i \, m_i

    Args:
        distance_measure (callable): :math:`D`, from two tensors to one that ``mask`` broadcasts with,
            usually one number a row.
        reduction (str, optional): ``'mean'`` over all elements (whatever the mask), ``'sum'``, or
            ``'none'``. Default: ``'mean'``

    Inputs:
        - p1 (tensor): the first prediction, :math:`(N, C)` or what ``distance_measure`` takes.
        - p2 (tensor): the second prediction.
        - mask (tensor or float): weights of the rows, :math:`(N,)`. Default: 1.0

    Returns:
        A scalar, or the unreduced losses for ``'none'``.

    Raises:
        TypeError: the distance measure is not callable.
        ValueError: an unknown reduction (tllib silently treats it as ``'none'``).

    Examples::

        >>> loss = ConsistencyLoss(lambda p1, p2: (p1 - p2).abs().sum(dim=1))
        >>> p1, p2 = torch.rand(32, 31).softmax(1), torch.rand(32, 31).softmax(1)
        >>> output = loss(p1, p2, mask=torch.ones(32))
    """

    def __init__(
        self,
        distance_measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        reduction: str | None = "mean",
    ):
        super().__init__()
        if not callable(distance_measure):
            raise TypeError(
                f"{type(self).__name__}: distance_measure must be callable, "
                f"got {type(distance_measure).__name__}"
            )
        _core.check_reduction(type(self).__name__, reduction)
        self.distance_measure = distance_measure
        self.reduction = reduction

    def forward(self, p1: torch.Tensor, p2: torch.Tensor, mask: torch.Tensor | float = 1.0) -> torch.Tensor:
        """See the class."""
        return self._reduced(self.distance_measure(p1, p2) * mask)

    def _reduced(self, losses: torch.Tensor) -> torch.Tensor:
        if self.reduction == "mean":
            return losses.mean()
        if self.reduction == "sum":
            return losses.sum()
        if self.reduction not in ("none", None):
            # Not _core.check_reduction, which the compiler cannot trace.
            raise ValueError(
                f"{type(self).__name__}: reduction must be 'none', 'mean' or 'sum', got {self.reduction!r}"
            )
        return losses

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"reduction={self.reduction!r}"


def _wide_squared_distance(p1, p2):
    # A float32 mask promotes half types, and a float32 loss of exact distances is what eager calls round.
    mask = 1.0
    if p1.dtype.itemsize == 2:
        mask = torch.ones((1,) * (p1.dim() - 1), dtype=torch.float32, device=p1.device)
    return _core.pi_model(p1, p2, mask, "none")


_compiled = register(
    "pi_model",
    "(Tensor p1, Tensor p2)",
    _wide_squared_distance,
    lambda p1, p2: (
        p1.new_empty(
            p1.shape[:1] + p1.shape[2:], dtype=at_least_float32(torch.promote_types(p1.dtype, p2.dtype))
        ),
    ),
    differentiable=2,
)


def _dtype_of(p1: torch.Tensor, p2: torch.Tensor, mask: torch.Tensor | float) -> torch.dtype:
    """The dtype of the loss."""
    device, dtype = p1.device.type, torch.promote_types(p1.dtype, p2.dtype)
    if device != "cpu" and torch.is_autocast_enabled(device):
        dtype = at_least_float32(dtype)
    return (p1.new_empty(1, dtype=dtype) * mask).dtype  # torch.result_type cannot be traced


def _check_mask(p1: torch.Tensor, mask: torch.Tensor | float) -> None:
    """What the extension checks, for the compiler, which multiplies by itself."""
    if not isinstance(mask, torch.Tensor):
        return
    if mask.is_complex():
        raise TypeError(f"L2ConsistencyLoss: mask must hold real numbers or booleans, got {mask.dtype}")
    rows = p1.shape[:1] + p1.shape[2:]
    wide = mask.dim() > len(rows)
    if wide or any(n not in (1, m) for n, m in zip(reversed(mask.shape), reversed(rows), strict=False)):
        raise ValueError(
            f"L2ConsistencyLoss: mask must broadcast to the shape of the rows, {list(rows)}, "
            f"got shape {list(mask.shape)}"
        )


def _squared_distance(p1: torch.Tensor, p2: torch.Tensor) -> torch.Tensor:
    """The squared distance of each row, over dimension 1."""
    if torch.compiler.is_compiling():
        return _compiled(p1, p2).to(_dtype_of(p1, p2, 1.0))
    return _core.pi_model(p1, p2, 1.0, "none")


class L2ConsistencyLoss(ConsistencyLoss):
    r"""Squared distance between two predictions of the same samples, times a mask.

    .. math::
        l_i = m_i \sum_c (p_{1,ic} - p_{2,ic})^2

    Gradients flow to both predictions, and to a mask that requires grad.

    Args:
        reduction (str, optional): ``'mean'`` over all rows (whatever the mask), ``'sum'``, or ``'none'``.
            Default: ``'mean'``

    Inputs:
        - p1 (tensor): the first prediction, :math:`(N, C)`, float32, float64, float16 or bfloat16; further
          dimensions may follow.
        - p2 (tensor): the second prediction, same shape.
        - mask (tensor or float): weights of the rows, :math:`(N,)`, of any real dtype. Default: 1.0

    Returns:
        A scalar, or :math:`(N,)` for ``'none'``, in the dtype that the inputs promote to (on devices other
        than the CPU, float32 for half types under autocast). The mean of no rows is NaN.

    Raises:
        TypeError: a prediction is not a floating-point tensor, or the mask neither tensor nor number.
        ValueError: shapes differ, the mask does not broadcast to the rows, or an unknown reduction (tllib
            silently treats it as ``'none'``).
        RuntimeError: the devices differ.

    Examples::

        >>> loss = L2ConsistencyLoss()
        >>> p1 = torch.rand(32, 31, requires_grad=True)
        >>> p2, mask = torch.rand(32, 31), torch.ones(32)
        >>> loss(p1.softmax(1), p2.softmax(1), mask).backward()
    """

    def __init__(self, reduction: str | None = "mean"):
        super().__init__(_squared_distance, reduction)

    def forward(self, p1: torch.Tensor, p2: torch.Tensor, mask: torch.Tensor | float = 1.0) -> torch.Tensor:
        """See the class."""
        # Scripts may assign another measure.
        if self.distance_measure is not _squared_distance:
            return super().forward(p1, p2, mask)
        if torch.compiler.is_compiling():
            _check_mask(p1, mask)
            return self._reduced(_compiled(p1, p2) * mask).to(_dtype_of(p1, p2, mask))
        return _core.pi_model(p1, p2, mask, self.reduction)
