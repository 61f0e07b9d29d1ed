"""Debiased self-training: `Debiased Self-Training for Semi-Supervised Learning (NIPS 2022)
<https://arxiv.org/abs/2202.07136>`_."""

from typing import Any

import torch
from torch import nn

from tllib_rs import _core
from tllib_rs._library import as_number, register
from tllib_rs.modules.classifier import Classifier
from tllib_rs.modules.grl import WarmStartGradientReverseLayer

__all__ = ["ImageClassifier", "WorstCaseEstimationLoss", "shift_log"]


class ImageClassifier(Classifier):
    r"""Classifier with two more heads on its features: a pseudo head, and a worst-case estimation head
    behind a gradient reverse layer. Inference needs neither.

    Args:
        backbone (torch.nn.Module): has the attribute ``out_features``.
        num_classes (int): number of classes.
        bottleneck_dim (int, optional): width of the bottleneck. Default: 1024
        width (int, optional): hidden width of the two heads. Default: 2048
        **kwargs: further arguments of :class:`tllib_rs.modules.classifier.Classifier`.

    Inputs:
        - x (tensor): input of the backbone, (minibatch, ...).

    Returns:
        In training mode ``outputs, outputs_adv, outputs_pseudo``, the predictions of the main, the
        worst-case and the pseudo head; else ``outputs``. Each is (minibatch, num_classes).
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        bottleneck_dim: int | None = 1024,
        width: int | None = 2048,
        **kwargs,
    ):
        bottleneck = nn.Sequential(
            nn.Linear(backbone.out_features, bottleneck_dim),
            nn.BatchNorm1d(bottleneck_dim),
            nn.ReLU(),
            nn.Dropout(0.5),
        )
        nn.init.normal_(bottleneck[0].weight, std=0.005)
        nn.init.constant_(bottleneck[0].bias, 0.1)
        super().__init__(backbone, num_classes, bottleneck, bottleneck_dim, **kwargs)
        # The order of the two heads is the order of their random initial weights.
        self.pseudo_head = _head(self.features_dim, width, num_classes)
        self.grl_layer = WarmStartGradientReverseLayer(
            alpha=1.0, lo=0.0, hi=0.1, max_iters=1000, auto_step=False
        )
        self.adv_head = _head(self.features_dim, width, num_classes)

    def forward(self, x: torch.Tensor) -> Any:
        """See the class."""
        features = self.bottleneck(self.pool_layer(self.backbone(x)))
        if not self.training:
            return self.head(features)
        # In tllib's order: the dropout of the two heads draws from one stream of random numbers.
        outputs_adv = self.adv_head(self.grl_layer(features))
        return self.head(features), outputs_adv, self.pseudo_head(features)

    def get_parameters(self, base_lr: float = 1.0) -> list[dict[str, Any]]:
        """Parameter groups with the learning rate of each part."""
        heads = (self.pseudo_head, self.adv_head)
        return super().get_parameters(base_lr) + [
            {"params": head.parameters(), "lr": 1.0 * base_lr} for head in heads
        ]

    def step(self) -> None:
        """Advance the gradient reverse layer by one iteration."""
        self.grl_layer.step()


def _head(features_dim: int, width: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features_dim, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, num_classes)
    )


def shift_log(x: torch.Tensor, offset: float = 1e-6) -> torch.Tensor:
    r"""Logarithm that is finite at 0 and never positive, :math:`\log(\min(x + \mathrm{offset}, 1))`.

    Args:
        x (tensor): any shape, floating point.
        offset (float): added first. Default: 1e-6

    Returns:
        A tensor like ``x``; 0, with gradient 0, where the sum is above 1.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.

    :class:`WorstCaseEstimationLoss` does not use it: the sum would round away a small ``1 - p``.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"shift_log: x must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"shift_log: x must be floating point, got {x.dtype}")
    return (x + offset).clamp(max=1.0).log()


_compiled = register(
    "dst",
    "(Tensor y_l_adv, Tensor y_u_adv, Tensor y_l, Tensor y_u, float eta_prime)",
    lambda y_l_adv, y_u_adv, y_l, y_u, eta_prime: _core.dst(y_l, y_l_adv, y_u, y_u_adv, eta_prime),
    lambda y_l_adv, y_u_adv, y_l, y_u, eta_prime: (
        y_l_adv.new_empty((), dtype=torch.promote_types(y_l_adv.dtype, y_u_adv.dtype)),
    ),
    differentiable=2,
    widened="everywhere",
)


class WorstCaseEstimationLoss(nn.Module):
    r"""Makes the worst-case head right on labeled samples and as wrong as possible on unlabeled ones.

    With the predictions :math:`a^l_i = \arg\max_c y^l_{ic}` and :math:`a^u_i` of the main head, not
    differentiated, and :math:`p = \mathrm{softmax}(y_{adv})`,

    .. math::
        \mathrm{loss} = \frac{\eta'}{B_l} \sum_i -\log p^l_{i a^l_i}
        + \frac{1}{B_u} \sum_i -\log \min(1 - p^u_{i a^u_i} + 10^{-6}, 1)

    :math:`1 - p` is summed over the other classes where :math:`p` is near 1, which avoids the cancellation of
    the difference: tllib's float32 gradient is 100% off at a logit gap of 20.

    Args:
        eta_prime (float): the trade-off :math:`\eta'`.

    Inputs:
        - y_l (tensor): logits of the main head on labeled samples, (minibatch, C), floating point. Further
          dimensions may follow, here and below; each position in them counts as a row.
        - y_l_adv (tensor): logits of the worst-case head on them, same shape.
        - y_u (tensor): logits of the main head on unlabeled samples, (minibatch, C).
        - y_u_adv (tensor): logits of the worst-case head on them, same shape.

    Returns:
        A scalar in the dtype of the logits (float32 for half types in an autocast region). NaN where a
        batch is empty.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: an input is not (minibatch, C, ...), the shapes of a pair differ, or :math:`\eta'` is not
            finite.
        RuntimeError: the devices differ.

    Examples::

        >>> loss = WorstCaseEstimationLoss(eta_prime=2)
        >>> y_l, y_u = torch.randn(32, 31), torch.randn(96, 31)
        >>> y_l_adv, y_u_adv = torch.randn(32, 31, requires_grad=True), torch.randn(96, 31)
        >>> loss(y_l, y_l_adv, y_u, y_u_adv).backward()
    """

    def __init__(self, eta_prime: float):
        super().__init__()
        _core.check_eta_prime(eta_prime)
        self.eta_prime = as_number(eta_prime)

    def forward(
        self, y_l: torch.Tensor, y_l_adv: torch.Tensor, y_u: torch.Tensor, y_u_adv: torch.Tensor
    ) -> torch.Tensor:
        """See the class."""
        if torch.compiler.is_compiling():
            return _compiled(y_l_adv, y_u_adv, y_l, y_u, self.eta_prime)
        return _core.dst(y_l, y_l_adv, y_u, y_u_adv, self.eta_prime)

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"eta_prime={self.eta_prime}"
