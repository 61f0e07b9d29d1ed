"""Gradient reversal: `Unsupervised Domain Adaptation by Backpropagation (ICML 2015)
<https://arxiv.org/abs/1409.7495>`_."""

import math
from typing import Any

import torch
from torch import nn
from torch.autograd import Function

__all__ = ["GradientReverseFunction", "GradientReverseLayer", "WarmStartGradientReverseLayer"]


class GradientReverseFunction(Function):
    """The identity, whose derivative is ``-coeff``: ``GradientReverseFunction.apply(input, coeff)``.

    It has no ``jvp``, as in tllib: torch.compile refuses a function that has one.
    """

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See the class."""
        # torch.func needs setup_context, and torch takes twice as long to call such a function.
        transformed = torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()
        if transformed and cls is GradientReverseFunction:
            return _Transformed.apply(*args, **kwargs)
        return super().apply(*args, **kwargs)

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, coeff: float | None = 1.0) -> torch.Tensor:
        """A copy, so that later operations may write to it in place."""
        ctx.coeff = coeff
        return input * 1.0

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Reverse the gradient."""
        return grad_output * -ctx.coeff, None


class _Transformed(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: torch.Tensor, coeff: float | None = 1.0) -> torch.Tensor:
        return input * 1.0

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, ctx.coeff = inputs

    backward = staticmethod(GradientReverseFunction.backward)


class GradientReverseLayer(nn.Module):
    r"""The identity, whose gradient is reversed: :math:`d\mathcal{R}/dx = -\lambda I`.

    Inputs:
        - input (tensor): any shape, floating point.
        - coeff (float, optional): :math:`\lambda`. Default: 1.0

    Examples::

        >>> layer = GradientReverseLayer()
        >>> x = torch.zeros(3, requires_grad=True)
        >>> layer(x, 0.5).sum().backward()
        >>> x.grad
        tensor([-0.5000, -0.5000, -0.5000])
    """

    def forward(self, *input: Any) -> torch.Tensor:
        """See the class."""
        return GradientReverseFunction.apply(*input)


class WarmStartGradientReverseLayer(nn.Module):
    r"""Gradient reverse layer whose coefficient grows with the iterations.

    .. math::
        \mathcal{R}(x) = x, \qquad \frac{d\mathcal{R}}{dx} = -\lambda I, \qquad
        \lambda = \frac{2 (hi - lo)}{1 + \exp(-\alpha i / N)} - (hi - lo) + lo

    The count :math:`i` is not part of the ``state_dict``, as in tllib.

    Args:
        alpha (float, optional): :math:`\alpha`, how fast. Default: 1.0
        lo (float, optional): initial value of :math:`\lambda`. Default: 0.0
        hi (float, optional): its limit. Default: 1.0
        max_iters (int, optional): :math:`N`. Default: 1000
        auto_step (bool, optional): whether each call increases :math:`i` (in evaluation too); otherwise
            :meth:`step` does. Default: False

    Inputs:
        - input (tensor): any shape, floating point.

    Raises:
        ValueError: ``max_iters`` is 0.

    Examples::

        >>> layer = WarmStartGradientReverseLayer(alpha=1.0, lo=0.0, hi=0.1, max_iters=1000)
        >>> features = layer(torch.randn(32, 256, requires_grad=True))
        >>> layer.step()
    """

    def __init__(
        self,
        alpha: float | None = 1.0,
        lo: float | None = 0.0,
        hi: float | None = 1.0,
        max_iters: int | None = 1000.0,
        auto_step: bool | None = False,
    ):
        super().__init__()
        if max_iters == 0:
            raise ValueError("WarmStartGradientReverseLayer: max_iters must not be 0")
        self.alpha = alpha
        self.lo = lo
        self.hi = hi
        self.iter_num = 0
        self.max_iters = max_iters
        self.auto_step = auto_step

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See the class."""
        # 2 / (1 + e^-x) - 1 = tanh(x / 2), which cannot overflow.
        half = 0.5 * self.alpha / self.max_iters
        if torch.compiler.is_compiling() and not self.auto_step:
            progress = torch.tanh(half * self._iterations)
        else:
            progress = math.tanh(half * self.iter_num)
        if self.auto_step:
            self.step()
        return GradientReverseFunction.apply(input, (self.hi - self.lo) * progress + self.lo)

    @property
    def iter_num(self) -> int:
        """The number of iterations so far. May be set."""
        return self._iter_num

    @iter_num.setter
    def iter_num(self, value: int) -> None:
        # torch.compile specializes on the numbers of a module, and would recompile at each step; a tensor
        # is a graph input. A new one each time: a backward may still need the old one.
        iterations = torch.scalar_tensor(value, dtype=torch.float64, device="cpu")
        # Bypasses Module.__setattr__, which looks for parameters, modules and buffers first.
        self.__dict__.update(_iter_num=value, _iterations=iterations)

    def step(self) -> None:
        """Increase the number of iterations by 1."""
        self.iter_num += 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # tllib pickles the number itself.
        if "iter_num" in self.__dict__:
            self.iter_num = self.__dict__.pop("iter_num")

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return (
            f"alpha={self.alpha}, lo={self.lo}, hi={self.hi}, max_iters={self.max_iters}, "
            f"auto_step={self.auto_step}"
        )
