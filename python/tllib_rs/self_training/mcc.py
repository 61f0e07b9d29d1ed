"""Minimum class confusion: `Minimum Class Confusion for Versatile Domain Adaptation (ECCV 2020)
<https://arxiv.org/abs/1912.03699>`_."""

import torch
from torch import nn
from torch.distributed import ProcessGroup

from tllib_rs import _core
from tllib_rs._distributed import Ranks
from tllib_rs._library import as_number, register
from tllib_rs.modules.classifier import Classifier as ClassifierBase
from tllib_rs.modules.entropy import entropy  # noqa: F401  scripts for tllib import it from here

__all__ = ["ImageClassifier", "MinimumClassConfusionLoss"]


_compiled = register(
    "mcc",
    "(Tensor logits, float temperature)",
    _core.mcc,
    lambda logits, temperature: (logits.new_empty(()),),
    widened="everywhere",
)


class MinimumClassConfusionLoss(nn.Module):
    r"""Minimum class confusion of the predictions on the target domain.

    With :math:`p = \mathrm{softmax}(z / T)`, entropies
    :math:`H_i = -\sum_c p_{ic} \log(p_{ic} + 10^{-5})` and weights (not differentiated)
    :math:`w_i = B (1 + e^{-H_i}) / \sum_k (1 + e^{-H_k})`,

    .. math::
        M_{ab} = \sum_i w_i p_{ia} p_{ib}, \qquad
        \mathrm{loss} = \frac{1}{C} \sum_b \sum_{a \ne b} \frac{M_{ab}}{\sum_k M_{kb}}

    The columns sum to 1, so only the diagonal is needed: :math:`O(BC)`, and no :math:`C \times C` matrix.

    Args:
        temperature (float): :math:`T > 0`, divides the logits; 1 is the plain softmax.
        process_group (ProcessGroup, optional): ranks over whose concatenated batches the loss is computed.
            Default: ``None``, the batch of this process alone

    Inputs:
        - logits (tensor): unnormalized predictions :math:`g^t` on the target domain,
          (minibatch, C), float32, float64, float16 or bfloat16.

    Returns:
        A scalar in the dtype of the logits (float32 for half types in an autocast region). NaN for an empty
        batch.

    Raises:
        TypeError: logits are not a floating-point tensor.
        ValueError: logits are not (minibatch, C) with C > 0, or the temperature is not above 0; this
            process is not a member of the group.
        RuntimeError: the group was destroyed; ``create_graph=True`` with a group.

    With a group the ranks all-reduce their :math:`\sum_i w_i p_{ic}` and
    :math:`\sum_i w_i p_{ic} (1 - p_{ic})`, :math:`2C` numbers in float64, in one message. Their batches may
    differ in size and be empty; classes and temperature must be the same. All ranks get the same loss, and
    each the gradient with respect to its own logits **times the number of ranks**, so that the average that
    DistributedDataParallel takes is the gradient of the loss. Backward sends nothing, so the incoming
    gradient must be the same on every rank.

    A class that has probability 0 in every row makes tllib's loss NaN; here it contributes its limit, 1/C.

    Examples::

        >>> loss = MinimumClassConfusionLoss(temperature=2.0)
        >>> g_t = torch.randn(32, 31, requires_grad=True)
        >>> loss(g_t).backward()
    """

    _ranks: Ranks | None = None  # also of losses that tllib pickled

    def __init__(self, temperature: float, *, process_group: ProcessGroup | None = None):
        super().__init__()
        _core.check_temperature(temperature)
        self.temperature = as_number(temperature)
        self._ranks = Ranks.of(type(self).__name__, process_group)

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if self._ranks is not None:
            self._ranks.refuse_tangents(logits)
            part = _core.MccPart(logits, self.temperature)
            return part.finish(self._ranks.sum_(part.sums), self._ranks.size)
        if torch.compiler.is_compiling():
            return _compiled(logits, self.temperature)
        return _core.mcc(logits, self.temperature)

    def confusion_matrix(self, logits: torch.Tensor) -> torch.Tensor:
        r"""The class confusion matrix of the loss, for inspection: which classes the predictions mix up.

        Args:
            logits (tensor): as in a call, (minibatch, C).

        Returns:
            :math:`M_{ab} / \sum_k M_{kb}`, (C, C), without a gradient, in the dtype of the loss. Column
            :math:`b` is what class :math:`b` is confused with: it sums to 1, or is 0 if no row predicts the
            class. The loss is the mean of the columns' off-diagonal sums, with 1 for a column of 0. The
            matrix is always of these rows alone, whatever the process group.
        """
        return _core.confusion_matrix(logits, self.temperature)

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"temperature={self.temperature}"


class ImageClassifier(ClassifierBase):
    """The classifier that the MCC examples train: backbone, pooling, one bottleneck, linear head.

    Args:
        backbone (torch.nn.Module): has the attribute ``out_features``.
        num_classes (int): number of classes.
        bottleneck_dim (int, optional): width of the bottleneck. Default: 256
        **kwargs: further arguments of :class:`tllib_rs.modules.classifier.Classifier`.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, bottleneck_dim: int | None = 256, **kwargs):
        bottleneck = nn.Sequential(
            nn.Linear(backbone.out_features, bottleneck_dim), nn.BatchNorm1d(bottleneck_dim), nn.ReLU()
        )
        super().__init__(backbone, num_classes, bottleneck, bottleneck_dim, **kwargs)
