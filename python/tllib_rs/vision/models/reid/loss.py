"""Losses of person re-identification: `Mutual Mean-Teaching (ICLR 2020)
<https://arxiv.org/abs/2001.01526>`_, `In Defense of the Triplet Loss (2017)
<https://arxiv.org/abs/1703.07737>`_."""

import math

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from tllib_rs import _core
from tllib_rs._distributed import Ranks, dtype_number
from tllib_rs._library import as_number, at_least_float32, define, differentiate, or_transparent, register

__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyLossWithLabelSmooth",
    "SoftTripletLoss",
    "TripletLoss",
    "TripletLossXBM",
    "hard_examples_mining",
    "pairwise_euclidean_distance",
]


def _scalar_like(features, *_):
    return (features.new_empty((), dtype=at_least_float32(features.dtype)),)


def _cross_entropy_like(y, targets):
    return (y.new_empty((), dtype=torch.promote_types(y.dtype, targets.dtype)),)


def _soft_triplet_like(features, teacher, _, margin, *__):
    dtype = features.dtype if margin is not None else torch.promote_types(features.dtype, teacher.dtype)
    return (features.new_empty((), dtype=at_least_float32(dtype)),)


_opaque_distances = define(
    "distances",
    "(Tensor x, Tensor y) -> Tensor",
    lambda x, y: _core.distances(x.detach(), y.detach()),
    lambda x, y: x.new_empty((x.shape[0], y.shape[0]), dtype=at_least_float32(x.dtype)),
)


def _distances_backward(incoming, x, y, out, wanted):
    grads = _core.distances_backward(incoming, x, y, out, wanted)
    return tuple(incoming.new_empty(0) if grad is None else grad for grad in grads)


def _distances_backward_like(incoming, x, y, _, wanted):
    return tuple(
        torch.empty_like(side, memory_format=torch.contiguous_format) if want else incoming.new_empty(0)
        for side, want in zip((x, y), wanted, strict=True)
    )


_compiled_distances_backward = define(
    "distances_backward",
    "(Tensor incoming, Tensor x, Tensor y, Tensor out, bool[] wanted) -> (Tensor, Tensor)",
    _distances_backward,
    _distances_backward_like,
)


def _distances_gradients(ctx, kept, incoming):
    grads = _compiled_distances_backward(incoming, *kept, list(ctx.needs_input_grad))
    return tuple(grad if want else None for grad, want in zip(grads, ctx.needs_input_grad, strict=True))


differentiate(
    "distances",
    _distances_gradients,
    lambda ctx, inputs, output: (*inputs, output),
    _core.distances,
)
_compiled_distances = or_transparent(
    _opaque_distances, "distances", "(Tensor x, Tensor y) -> Tensor", _core.distances
)
_compiled_hardest = register(
    "hardest",
    "(Tensor dist_mat, Tensor identity_mat)",
    _core.hardest,
    lambda dist_mat, _: (
        dist_mat.new_empty(dist_mat.shape[0], dtype=torch.int64),
        dist_mat.new_empty(dist_mat.shape[0], dtype=torch.int64),
    ),
    differentiable=0,
    extra=1,
)
_compiled_label_smooth = register(
    "label_smooth",
    "(Tensor y, Tensor labels, int num_classes, float epsilon)",
    _core.label_smooth,
    lambda y, *_: (y.new_empty(()),),
    widened="everywhere",
)
_compiled_soft_cross_entropy = register(
    "soft_cross_entropy",
    "(Tensor y, Tensor labels)",
    _core.soft_cross_entropy,
    _cross_entropy_like,
    widened="everywhere",
)
_compiled_triplet = register(
    "triplet",
    "(Tensor f, Tensor labels, float margin, bool normalize_feature)",
    _core.triplet,
    _scalar_like,
)
_compiled_triplet_xbm = register(
    "triplet_xbm",
    "(Tensor f, Tensor xbm_f, Tensor labels, Tensor xbm_labels, float margin, bool normalize_feature)",
    _core.triplet_xbm,
    _scalar_like,
    differentiable=2,
)
_compiled_soft_triplet = register(
    "soft_triplet",
    "(Tensor features_1, Tensor? features_2, Tensor labels, float? margin, bool normalize_feature)",
    _core.soft_triplet,
    _soft_triplet_like,
)


def pairwise_euclidean_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    r"""Distances between all rows of two matrices,
    :math:`\sqrt{\max(|x_i|^2 + |y_j|^2 - 2 x_i \cdot y_j,\; 10^{-12})}`.

    The formula cancels where rows are nearly equal: there, in float32, the distance is rounding noise, as
    in tllib. The losses of this module do not have this problem.

    Args:
        x (tensor): (N, F), floating point.
        y (tensor): (M, F), the dtype of ``x``. In an autocast region they may differ, and both are
            converted to the wider one.

    Returns:
        (N, M), in the dtype of ``x`` (the wider one).

    Raises:
        TypeError: an argument is not a floating-point tensor, or the dtypes differ outside of an autocast
            region.
        ValueError: the shapes are not (N, F) and (M, F).
        RuntimeError: the devices differ.
    """
    x, y = _of_one_dtype(x, y)
    distances = _compiled_distances if torch.compiler.is_compiling() else _core.distances
    return distances(x, y).to(x.dtype)


def _of_one_dtype(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the wider dtype, in an autocast region: there, new features are compared with older ones of
    another precision."""
    both = all(isinstance(z, torch.Tensor) and z.is_floating_point() for z in (x, y))
    if not both or x.dtype == y.dtype or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x, y
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def hard_examples_mining(dist_mat: torch.Tensor, identity_mat: torch.Tensor, return_idxes: bool = False):
    r"""The hardest positive and negative of each row of a distance matrix, by one scan and no sort.

    .. math::
        p_i = \arg\max_j\, d_{ij} - 10^7 (1 - s_{ij}), \qquad n_i = \arg\min_j\, d_{ij} + 10^7 s_{ij}

    Among equal distances the first wins. A row without a positive has the distance
    :math:`\max_j d_{ij} - 10^7`, one without a negative :math:`\min_j d_{ij} + 10^7`, as in tllib.

    Args:
        dist_mat (tensor): distances :math:`d`, (N, M), floating point.
        identity_mat (tensor): :math:`s`, (N, M): 1 for two samples of one identity, 0 for others.
        return_idxes (bool, optional): whether to return the indices too. Default: False

    Returns:
        dist_ap and dist_an, (N,) each, differentiable; with ``return_idxes`` followed by the indices of
        the hard positives and negatives, (N,) int64 each.

    Raises:
        TypeError: an argument is not a tensor, or ``dist_mat`` not floating point.
        ValueError: ``dist_mat`` is not (N, M) with M > 0, or the shapes differ.
        RuntimeError: the devices differ.
    """
    if torch.compiler.is_compiling():
        positive, negative = _compiled_hardest(dist_mat.detach(), identity_mat.detach())
    else:
        positive, negative = _core.hardest(dist_mat, identity_mat)
    if not identity_mat.is_floating_point():
        identity_mat = identity_mat.to(at_least_float32(dist_mat.dtype))

    # Both in one gather: backward then makes one matrix of zeros.
    index = torch.stack((positive, negative), dim=1)
    d_ap, d_an = dist_mat.gather(1, index).unbind(1)
    s_ap, s_an = identity_mat.gather(1, index).unbind(1)
    dist_ap = d_ap + -1e7 * (1 - s_ap)
    dist_an = d_an + 1e7 * s_an
    return (dist_ap, dist_an, positive, negative) if return_idxes else (dist_ap, dist_an)


def _side_by_side(y: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(minibatch, C, ...) and (minibatch, ...) as rows and labels, and how many rows a sample has."""
    expected = y.shape[:1] + y.shape[2:]
    if labels.shape != expected:
        raise ValueError(
            f"CrossEntropyLossWithLabelSmooth: labels must have shape {list(expected)}, got shape "
            f"{list(labels.shape)}"
        )
    rows = y.movedim(1, -1).reshape(math.prod(expected), y.shape[1])
    return rows, labels.reshape(-1), math.prod(y.shape[2:])


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it does what the constructors' own does: scripts may assign another, or add hooks to it."""
    if type(module) is not kind:
        return False
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return "forward" not in module.__dict__ and not any(map(len, hooks))


def _is_over_classes(log_softmax: nn.Module) -> bool:
    """Whether the fused cross entropies compute what this module would of the predictions."""
    return _is_plain(log_softmax, nn.LogSoftmax) and log_softmax.dim == 1


def _is_fused(ranking: nn.Module) -> bool:
    """Whether the fused losses compute what this module would of the distances."""
    return _is_plain(ranking, nn.MarginRankingLoss) and ranking.reduction == "mean"


class CrossEntropyLossWithLabelSmooth(nn.Module):
    r"""Cross entropy with smoothed labels: `Rethinking the Inception Architecture for Computer Vision
    (CVPR 2016) <https://arxiv.org/abs/1512.00567>`_.

    With :math:`p = \mathrm{softmax}(y)`, :math:`t_{ic} = (1 - \epsilon) [c = l_i] + \epsilon / n`,

    .. math::
        \mathrm{loss} = \frac{1}{B} \sum_i \sum_c -t_{ic} \log p_{ic}

    Args:
        num_classes (int): :math:`n`. As in tllib it is not compared with the predictions.
        epsilon (float, optional): :math:`\epsilon`. Default: 0.1

    Inputs:
        - y (tensor): unnormalized predictions, (minibatch, C, ...), floating point. The losses of all
          positions in the further dimensions are added.
        - labels (tensor): (minibatch, ...), int64 or int32.

    Returns:
        A scalar in the dtype of the predictions (float32 for half types in an autocast region). NaN for an
        empty batch.

    Raises:
        TypeError: y is not a floating-point tensor, or labels are neither int64 nor int32.
        ValueError: y is not (minibatch, C, ...) with C > 0, or there is not one label for each row or
            position.
        IndexError: a label is negative or not below C (on the CPU; on CUDA a device-side assertion fails
            or, with fused kernels, the loss is NaN).
        RuntimeError: the devices differ.

    Examples::

        >>> loss = CrossEntropyLossWithLabelSmooth(num_classes=31)
        >>> y = torch.randn(32, 31, requires_grad=True)
        >>> loss(y, torch.randint(31, (32,))).backward()
    """

    def __init__(self, num_classes: int, epsilon: float = 0.1):
        super().__init__()
        _core.check_smoothing(num_classes, epsilon)
        self.num_classes = as_number(num_classes)
        self.epsilon = as_number(epsilon)
        # Called if it is replaced or has hooks.
        self.log_softmax = nn.LogSoftmax(dim=1)

    def forward(self, y: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if not _is_over_classes(self.log_softmax):
            log_p = self.log_softmax(y)
            hits = torch.zeros_like(log_p).scatter_(1, labels.long().unsqueeze(1), 1)
            targets = (1 - self.epsilon) * hits + self.epsilon / self.num_classes
            return (-targets * log_p).mean(0).sum()
        smooth = _compiled_label_smooth if torch.compiler.is_compiling() else _core.label_smooth
        positions = 1
        if isinstance(y, torch.Tensor) and y.dim() > 2 and isinstance(labels, torch.Tensor):
            y, labels, positions = _side_by_side(y, labels)
        loss = smooth(y, labels, self.num_classes, self.epsilon)
        if positions == 0:
            return (y * 0).sum()
        return loss if positions == 1 else loss * positions

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"num_classes={self.num_classes}, epsilon={self.epsilon}"


class CrossEntropyLoss(nn.Module):
    r"""Cross entropy with the predictions of another network as targets, as in Mutual Mean-Teaching.

    With :math:`p = \mathrm{softmax}(y)` and :math:`q = \mathrm{softmax}(labels)`, not differentiated,

    .. math::
        \mathrm{loss} = \frac{1}{B} \sum_i \sum_c -q_{ic} \log p_{ic}

    Inputs:
        - y (tensor): unnormalized predictions, (minibatch, C), floating point. Further dimensions are
          allowed; the mean is taken over them, too.
        - labels (tensor): unnormalized predictions of the other network, same shape.

    Returns:
        A scalar in the dtype that both are promoted to (float32 for half types in an autocast region). NaN
        for an empty batch.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: y is not (minibatch, C, ...) with C > 0, or the shapes differ.
        RuntimeError: the devices differ.

    Examples::

        >>> loss = CrossEntropyLoss()
        >>> y, teacher = torch.randn(32, 31, requires_grad=True), torch.randn(32, 31)
        >>> loss(y, teacher).backward()
    """

    def __init__(self):
        super().__init__()
        # Called if it is replaced or has hooks.
        self.log_softmax = nn.LogSoftmax(dim=1)

    def forward(self, y: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if not _is_over_classes(self.log_softmax):
            return (-F.softmax(labels, dim=1).detach() * self.log_softmax(y)).sum(1).mean()
        if torch.compiler.is_compiling():
            return _compiled_soft_cross_entropy(y, labels)
        return _core.soft_cross_entropy(y, labels)


def _ranked(
    ranking: nn.Module,
    features: tuple[torch.Tensor, torch.Tensor],
    labels: tuple[torch.Tensor, torch.Tensor],
    normalize_feature: bool,
) -> torch.Tensor:
    """``ranking`` of the hardest distances."""
    if normalize_feature:
        features = tuple(F.normalize(f, dim=1) for f in features)
    same = (labels[0][:, None] == labels[1]).float()
    hardest_p, hardest_n = hard_examples_mining(pairwise_euclidean_distance(*features), same)
    return ranking(hardest_n, hardest_p, torch.ones_like(hardest_n))


def _settings(loss: nn.Module) -> str:
    """The arguments of a triplet loss, for ``repr``; the margin is the one that counts."""
    ranking = getattr(loss, "margin_loss", getattr(loss, "ranking_loss", loss))
    return f"margin={getattr(ranking, 'margin', loss.margin)}, normalize_feature={loss.normalize_feature}"


class TripletLoss(nn.Module):
    r"""Triplet loss with the hardest positive and negative in the batch.

    With the Euclidean distances :math:`a_i` to the farthest sample of the same identity (which may be the
    sample itself) and :math:`b_i` to the nearest of another,

    .. math::
        \mathrm{loss} = \frac{1}{B} \sum_i \max(0,\; a_i - b_i + m)

    Pairs are found by one matrix product and one scan, in blocks of rows, so that memory does not grow with
    :math:`B^2`. Distance and gradient of these :math:`2B` pairs are computed from differences, which stay
    exact where :math:`|x|^2 + |y|^2 - 2 x \cdot y` cancels. If all samples have one identity, :math:`b_i` is
    the smallest distance plus :math:`10^7`, as in tllib.

    Args:
        margin (float): :math:`m`.
        normalize_feature (bool, optional): whether features are first divided by their norms.
            Default: False

    Inputs:
        - f (tensor): features, (minibatch, F), floating point.
        - labels (tensor): identities, (minibatch,).

    Returns:
        A scalar; float64 for float64 features, else float32.

    Raises:
        TypeError: an input is not a tensor, or features are not floating point.
        ValueError: features are not (minibatch, F) with at least one row and column, or there is not one
            label for each, or the margin is not finite.
        RuntimeError: the devices differ.

    Examples::

        >>> loss = TripletLoss(margin=0.3)
        >>> f, labels = torch.randn(64, 2048, requires_grad=True), torch.arange(64) // 4
        >>> loss(f, labels).backward()
    """

    def __init__(self, margin: float, normalize_feature: bool = False):
        super().__init__()
        _core.check_margin("TripletLoss", margin)
        self.margin = as_number(margin)
        self.normalize_feature = normalize_feature
        # Its margin is the one that counts, as in tllib.
        self.margin_loss = nn.MarginRankingLoss(margin=self.margin)

    def forward(self, f: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if not _is_fused(self.margin_loss):
            return _ranked(self.margin_loss, (f, f), (labels, labels), self.normalize_feature)
        call = _compiled_triplet if torch.compiler.is_compiling() else _core.triplet
        return call(f, labels, self.margin_loss.margin, bool(self.normalize_feature))

    extra_repr = _settings


class TripletLossXBM(nn.Module):
    r""":class:`TripletLoss` whose pairs are mined in a memory of earlier batches: `Cross-Batch Memory
    for Embedding Learning (CVPR 2020) <https://arxiv.org/abs/1912.06798>`_.

    A sample without a positive in the memory has the largest distance minus :math:`10^7` in place of
    :math:`a_i`, one without a negative the smallest plus :math:`10^7` in place of :math:`b_i`, as in tllib:
    such samples add nothing.

    Args:
        margin (float, optional): :math:`m`. Default: 0.3
        normalize_feature (bool, optional): whether features are first divided by their norms.
            Default: False

    Inputs:
        - f (tensor): features, (minibatch, F), floating point.
        - labels (tensor): their identities, (minibatch,).
        - xbm_f (tensor): features of the memory, (M, F) with M > 0, the dtype of ``f`` (in an autocast
          region they may differ). It gets a gradient too if it requires one.
        - xbm_labels (tensor): their identities, (M,).

    Returns:
        A scalar; float64 for float64 features, else float32. NaN for an empty batch.

    Raises:
        TypeError: an input is not a tensor, features are not floating point, or their dtypes differ outside
            of an autocast region.
        ValueError: the shapes do not match, the memory is empty, or the margin is not finite.
        RuntimeError: the devices differ.

    Examples::

        >>> loss = TripletLossXBM()
        >>> f, labels = torch.randn(64, 256, requires_grad=True), torch.arange(64) // 4
        >>> loss(f, labels, torch.randn(1024, 256), torch.arange(1024) % 16).backward()
    """

    def __init__(self, margin: float = 0.3, normalize_feature: bool = False):
        super().__init__()
        _core.check_margin("TripletLossXBM", margin)
        self.margin = as_number(margin)
        self.normalize_feature = normalize_feature
        # Its margin is the one that counts, as in tllib.
        self.ranking_loss = nn.MarginRankingLoss(margin=self.margin)

    def forward(
        self, f: torch.Tensor, labels: torch.Tensor, xbm_f: torch.Tensor, xbm_labels: torch.Tensor
    ) -> torch.Tensor:
        """See the class."""
        if not _is_fused(self.ranking_loss):
            return _ranked(self.ranking_loss, (f, xbm_f), (labels, xbm_labels), self.normalize_feature)
        f, xbm_f = _of_one_dtype(f, xbm_f)
        call = _compiled_triplet_xbm if torch.compiler.is_compiling() else _core.triplet_xbm
        return call(f, xbm_f, labels, xbm_labels, self.ranking_loss.margin, bool(self.normalize_feature))

    extra_repr = _settings


class SoftTripletLoss(nn.Module):
    r"""Soft triplet loss of Mutual Mean-Teaching.

    With the distances :math:`a_i`, :math:`b_i` of :class:`TripletLoss` and
    :math:`\sigma_i = e^{a_i} / (e^{a_i} + e^{b_i})`,

    .. math::
        \mathrm{loss} = \frac{1}{B} \sum_i -r_i \log \sigma_i - (1 - r_i) \log (1 - \sigma_i)

    where :math:`r_i` is the teacher's :math:`\sigma_i` for the same pairs, not differentiated, or the margin.
    For the teacher, only these :math:`2B` distances are computed.

    Args:
        margin (float, optional): :math:`r` for all samples; ``None`` for the teacher's. Default: None
        normalize_feature (bool, optional): whether features are first divided by their norms.
            Default: False
        process_group (ProcessGroup, optional): ranks over whose concatenated batches pairs are mined and the
            mean is taken. Default: ``None``, the batch of this process alone

    Inputs:
        - features_1 (tensor): features to train, (minibatch, F), floating point.
        - features_2 (tensor): features of the teacher, (minibatch, any). Not used with a margin.
        - labels (tensor): identities, (minibatch,).

    Returns:
        A scalar; float64 where the features or, without a margin, the teacher's are float64, else float32.

    Raises:
        TypeError: an input is not a tensor, or features are not floating point.
        ValueError: features are not (minibatch, F) with at least one row and column, or there is not one
            label for each, or the margin is not finite; this process is not a member of the group; on every
            rank, if the ranks' features or labels differ in width or dtype.
        RuntimeError: the devices differ; the group was destroyed; ``create_graph=True`` with a group.

    With a group, the features and labels of all ranks are gathered in rank order: one small message with the
    sizes and one with the rows. Batches may differ in size and be empty as long as not all are. All ranks get
    the same loss, and each the gradient with respect to its own features **times the number of ranks**, so
    that the average that DistributedDataParallel takes is the gradient of the loss. Backward sends nothing,
    so the incoming gradient must be the same on every rank.

    Examples::

        >>> loss = SoftTripletLoss()
        >>> f, teacher = torch.randn(64, 2048, requires_grad=True), torch.randn(64, 2048)
        >>> loss(f, teacher, torch.arange(64) // 4).backward()
    """

    _ranks: Ranks | None = None

    def __init__(
        self,
        margin: float | None = None,
        normalize_feature: bool = False,
        *,
        process_group: ProcessGroup | None = None,
    ):
        super().__init__()
        if margin is not None:
            _core.check_margin("SoftTripletLoss", margin)
        self.margin = as_number(margin)
        self.normalize_feature = normalize_feature
        self._ranks = Ranks.of("SoftTripletLoss", process_group)

    def forward(
        self, features_1: torch.Tensor, features_2: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """See the class."""
        if self._ranks is not None:
            features_1, features_2, labels = self._gathered(features_1, features_2, labels)
        compiled = self._ranks is None and torch.compiler.is_compiling()
        call = _compiled_soft_triplet if compiled else _core.soft_triplet
        return call(features_1, features_2, labels, self.margin, bool(self.normalize_feature))

    extra_repr = _settings

    def _gathered(
        self, features_1: torch.Tensor, features_2: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        _core.check_soft_triplet(features_1, features_2, labels, self.margin)
        self._ranks.refuse_tangents(features_1)
        tensors = {"features_1": features_1, "labels": labels}
        if self.margin is None:
            tensors["features_2"] = features_2
        alike = {"margin is None": int(self.margin is None)}
        for name in ("features_1", "features_2", "labels"):
            # Also without a teacher: the message has one size whatever the margin.
            x = tensors.get(name)
            alike |= {f"the width of {name}": 0 if x is None else x.shape[1:].numel()}
            alike |= {f"the dtype of {name}": 0 if x is None else dtype_number(x.dtype)}
        rows = self._ranks.rows(len(labels), features_1.device, **alike)
        gathered = rows.gather(list(tensors.values()))
        return gathered.through(0, features_1), *(gathered.tensors[2:] or [None]), gathered.tensors[1]
