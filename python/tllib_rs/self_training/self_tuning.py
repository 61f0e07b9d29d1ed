"""Self-tuning: `Self-Tuning for Data-Efficient Deep Learning (ICML 2021)
<http://ise.thss.tsinghua.edu.cn/~mlong/doc/Self-Tuning-for-Data-Efficient-Deep-Learning-icml21.pdf>`_."""

from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from tllib_rs import _core
from tllib_rs._distributed import Ranks, Rows
from tllib_rs._library import as_number, define, differentiate
from tllib_rs.modules.classifier import Classifier as ClassifierBase
from tllib_rs.self_training._mean_teacher import shards

__all__ = ["Classifier", "SelfTuning"]


class Classifier(ClassifierBase):
    """A classifier with a second head, the projector, for :class:`SelfTuning`.

    Args:
        backbone (torch.nn.Module): extracts features; has the attribute ``out_features``.
        num_classes (int): number of classes.
        projection_dim (int): width of the projections. Default: 1024
        bottleneck_dim (int): width of the bottleneck. Default: 1024
        finetune (bool): whether backbone and projector learn at a tenth of the rate. Default: True
        pool_layer (torch.nn.Module, optional): after the backbone. Default: average pooling and flattening

    Inputs:
        - x (tensor): input of the backbone, (minibatch, ...).

    Returns:
        In training mode the projections, unit vectors (minibatch, projection_dim), and the predictions
        (minibatch, num_classes); otherwise the predictions alone.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        projection_dim: int = 1024,
        bottleneck_dim: int = 1024,
        finetune: bool = True,
        pool_layer: nn.Module | None = None,
    ):
        # The order of the layers is the order in which a seed's random numbers are drawn.
        bottleneck = nn.Sequential(
            nn.Linear(backbone.out_features, bottleneck_dim),
            nn.BatchNorm1d(bottleneck_dim),
            nn.ReLU(),
            nn.Dropout(0.5),
        )
        nn.init.normal_(bottleneck[0].weight, 0, 0.005)
        nn.init.constant_(bottleneck[0].bias, 0.1)
        # tllib has 1024 in place of bottleneck_dim in the two heads, so that only the default works.
        head = nn.Linear(bottleneck_dim, num_classes)
        super().__init__(backbone, num_classes, bottleneck, bottleneck_dim, head, finetune, pool_layer)
        self.projector = nn.Linear(bottleneck_dim, projection_dim)
        self.projection_dim = projection_dim

    def forward(self, x: torch.Tensor) -> Any:
        """See the class."""
        features = self.bottleneck(self.pool_layer(self.backbone(x)))
        projections = F.normalize(self.projector(features), dim=1)
        predictions = self.head(features)
        return (projections, predictions) if self.training else predictions

    def get_parameters(self, base_lr: float = 1.0) -> list[dict[str, Any]]:
        """Parameter groups with the learning rate of each part."""
        projector = {
            "params": self.projector.parameters(),
            "lr": (0.1 if self.finetune else 1.0) * base_lr,
        }
        return [*super().get_parameters(base_lr), projector]


class SelfTuning(nn.Module):
    r"""Pseudo group contrast: each query against its own key and a queue of :math:`K` keys per class.

    With projections :math:`q_i` of the query encoder and :math:`k_i` of the key encoder, unit vectors, and
    the queue :math:`Q` of :math:`KC` keys ordered by class,

    .. math::
        \theta_k \leftarrow m \theta_k + (1 - m) \theta_q, \qquad
        s_i = \left[\, q_i \cdot k_i,\; q_i \cdot Q_{y_i},\; q_i \cdot Q_{c \ne y_i} \,\right], \qquad
        \mathrm{pgc\_logits}_i = \log \mathrm{softmax}(s_i / T)

    The key and the :math:`K` entries of the row's own class come first and are the positives; the other
    classes follow in order. All rows see the queue as it was before the batch; then the keys of the batch
    replace the oldest keys of their classes, one by one.

    The queue is written in place. Several forwards may come before a backward, as when labeled and
    unlabeled batches share one. On the CPU only the replaced columns are kept for backward, and any other
    write to ``queue_list`` in between that bumps its version counter (not through ``.data`` or numpy) makes
    that backward raise; other devices keep a copy of the queue.

    Args:
        encoder_q (Classifier): query encoder.
        encoder_k (Classifier): key encoder. Starts as a copy of the query encoder and gets no gradient.
        num_classes (int): number of classes :math:`C`.
        K (int): keys per class. Default: 32
        m (float): momentum of the key encoder, in [0, 1]. Default: 0.999
        T (float): temperature, above 0. Default: 0.07
        process_group (ProcessGroup, optional): ranks whose keys all enter the queue. Default: ``None``, those
            of this process alone

    Inputs:
        - im_q, im_k (tensor): two views of the same samples, (minibatch, ...).
        - labels (tensor): their classes, (minibatch,), int64 or int32.

    Returns:
        A tuple of

        - pgc_logits: log-probabilities, (minibatch, 1 + K * num_classes), in the dtype that projections and
          torch's default dtype promote to.
        - pgc_labels: their targets, same shape, default dtype: 1 / (K + 1) for the positives.
        - y_q: predictions of the query encoder, (minibatch, num_classes).

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: shapes that differ; K or num_classes below 1, m outside [0, 1], T not above 0; encoders
            that do not correspond or are in evaluation mode; this process is not a member of the group.
        IndexError: a label that is not a class (on the CPU; on other devices the device raises).
        RuntimeError: devices that differ; the group was destroyed.

    With a group the rows of each rank see the queue as it was before the batch of all ranks, and then the
    keys of all ranks are enqueued in rank order: the queues stay equal, and are those of one process with
    the concatenated batch. Batches may differ in size and be empty. The sizes are exchanged while the
    encoders run, keys and labels afterwards in one message. At the first forward the queue of the group's
    first rank is broadcast; DistributedDataParallel around this module leaves the queue alone. The
    log-probabilities are those of the rank's own rows, so gradients are as for any other loss of these rows.

    Examples::

        >>> selftuning = SelfTuning(Classifier(backbone, 10), Classifier(copy.deepcopy(backbone), 10), 10)
        >>> pgc_logits, pgc_labels, y = selftuning(im_q, im_k, labels)
        >>> loss = F.cross_entropy(y, labels) + F.kl_div(pgc_logits, pgc_labels, reduction="batchmean")
        >>> loss.backward()
    """

    _ranks: Ranks | None = None
    _alike = False

    def __init__(
        self,
        encoder_q: nn.Module,
        encoder_k: nn.Module,
        num_classes: int,
        K: int = 32,
        m: float = 0.999,
        T: float = 0.07,
        *,
        process_group: ProcessGroup | None = None,
    ):
        super().__init__()
        self._ranks = Ranks.of("SelfTuning", process_group)
        self.K = as_number(K)
        self.m = as_number(m)
        self.T = as_number(T)
        self.num_classes = as_number(num_classes)
        self._settings()
        self.encoder_q = encoder_q
        self.encoder_k = encoder_k
        _copy_parameters(encoder_q, encoder_k)
        queue = torch.randn(encoder_q.projection_dim, self.K * self.num_classes)
        self.register_buffer("queue_list", F.normalize(queue, dim=0))
        self.register_buffer("queue_ptr", torch.zeros(self.num_classes, dtype=torch.long))
        self._history = _core.SelfTuningHistory()
        if self._ranks is not None:
            # DDP's broadcast would write the queue, between forward and backward if a step has several.
            self._ddp_params_and_buffers_to_ignore = ["queue_list", "queue_ptr"]

    def forward(
        self, im_q: torch.Tensor, im_k: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See the class."""
        whole = self._ranks is None and not self._changed
        if torch.compiler.is_compiling() and whole and not shards.among(self):
            return self._compiled_forward(im_q, im_k, labels)
        settings = self._settings()
        settings.check(im_q, im_k, labels, self.queue_list, self.queue_ptr)
        rows = None if self._ranks is None else self._announce(len(labels))
        h_q, y_q = _training_outputs("encoder_q", self.encoder_q(im_q))
        _check_mode("encoder_k", self.encoder_k)
        with torch.no_grad():
            self._momentum_update_key_encoder()
            h_k, _ = _training_outputs("encoder_k", self.encoder_k(im_k))
        enqueued = None if rows is None else self._gathered(rows, h_k, labels)
        if self._changed:
            return self._row_by_row(h_q, h_k, labels, enqueued), self._targets(h_q), y_q
        pgc_logits = self._history.step(h_q, h_k, labels, self.queue_list, self.queue_ptr, settings, enqueued)
        return pgc_logits, self._targets(h_q), y_q

    @torch.no_grad()
    def _momentum_update_key_encoder(self) -> None:
        """Update the key encoder. A subclass may override this."""
        with shards.resharded("SelfTuning", self.encoder_k, self.encoder_q):
            _core.ema_update(self.encoder_k, self.encoder_q, self.m)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, h: torch.Tensor, label: torch.Tensor) -> None:
        """Replace the oldest key of a class. If a subclass overrides it, it is called for each row, with a
        process group for those of all ranks."""
        labels = torch.as_tensor(label, device=h.device).reshape(1).expand(len(h))
        self._settings().enqueue(h, labels, self.queue_list, self.queue_ptr)

    @property
    def _changed(self) -> bool:
        """Whether a subclass, a patch of a class, or an attribute of this object replaces a step."""
        return any(
            getattr(type(self), name) is not step or name in self.__dict__ for name, step in _STEPS.items()
        )

    def _row_by_row(
        self,
        h_q: torch.Tensor,
        h_k: torch.Tensor,
        labels: torch.Tensor,
        enqueued: tuple[torch.Tensor, ...] | None,
    ) -> torch.Tensor:
        settings = (self.num_classes, self.K, self.m, self.T)
        pgc_logits, _ = _log_probabilities(h_q, h_k, labels, self.queue_list, *settings, [False])
        keys, classes = (h_k, labels) if enqueued is None else enqueued
        for row, label in zip(keys.split(1), classes, strict=True):
            self._dequeue_and_enqueue(row, label)
        return pgc_logits

    def _compiled_forward(
        self, im_q: torch.Tensor, im_k: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # The same steps as operators: the graph keeps a copy of the queue for backward.
        queue = (self.queue_list, self.queue_ptr)
        settings = (self.num_classes, self.K, self.m, self.T)
        h_q, y_q = _training_outputs("encoder_q", self.encoder_q(im_q))
        _check_mode("encoder_k", self.encoder_k)
        with torch.no_grad():
            parameters = (list(self.encoder_k.parameters()), list(self.encoder_q.parameters()))
            _momentum(*parameters, im_q, im_k, labels, *queue, *settings)
            h_k, _ = _training_outputs("encoder_k", self.encoder_k(im_k))
        pgc_logits, _ = _log_probabilities(h_q, h_k, labels, self.queue_list, *settings, [False])
        with torch.no_grad():
            _enqueue(h_k, labels, *queue, *settings)
        return pgc_logits, self._targets(h_q), y_q

    def _targets(self, h_q: torch.Tensor) -> torch.Tensor:
        targets = torch.zeros(h_q.shape[0], 1 + self.K * self.num_classes, device=h_q.device)
        targets[:, : 1 + self.K] = 1.0 / (self.K + 1)
        return targets

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Objects that tllib pickled have no history.
        super().__setstate__({"_history": _core.SelfTuningHistory()} | state)

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"num_classes={self.num_classes}, K={self.K}, m={self.m}, T={self.T}"

    def _announce(self, count: int) -> Rows:
        width = len(self.queue_list)
        rows = self._ranks.rows(
            count, self.queue_list.device, projection_dim=width, num_classes=self.num_classes, K=self.K
        )
        if not self._alike:
            rows.counts()
            # Initialized at random, on each rank by its own generator.
            self._ranks.broadcast_(self.queue_list)
            self._ranks.broadcast_(self.queue_ptr)
            self._alike = True
        return rows

    def _gathered(self, rows: Rows, h_k: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        expected = (len(labels), len(self.queue_list))
        if h_k.shape != expected:
            raise ValueError(f"SelfTuning: keys must have shape {expected}, got {tuple(h_k.shape)}")
        return tuple(rows.gather([h_k, labels.to(h_k.device).long()]).tensors)

    def _settings(self) -> _core.SelfTuningSettings:
        # Read at every step: they are public attributes.
        return _core.SelfTuningSettings(self.num_classes, self.K, self.m, self.T)


#: The steps that may be replaced.
_STEPS = {
    name: getattr(SelfTuning, name) for name in ("_momentum_update_key_encoder", "_dequeue_and_enqueue")
}
_SETTINGS = "int num_classes, int K, float m, float T"


def _check_and_average(keys, queries, im_q, im_k, labels, queue_list, queue_ptr, *settings):
    _core.SelfTuningSettings(*settings).check(im_q, im_k, labels, queue_list, queue_ptr)
    _core.ema_update_parameters(keys, queries, settings[2])


_momentum = define(
    "self_tuning_momentum",
    "(Tensor(a!)[] keys, Tensor[] queries, Tensor im_q, Tensor im_k, Tensor labels, Tensor queue_list, "
    f"Tensor queue_ptr, {_SETTINGS}) -> ()",
    _check_and_average,
    lambda *_: None,
    recorded=False,
)


def _forward(h_q, h_k, labels, queue_list, num_classes, K, m, T, wanted):
    settings = _core.SelfTuningSettings(num_classes, K, m, T)
    kept = queue_list.clone() if wanted[0] else queue_list.new_empty(0)
    return settings.forward(h_q, h_k, labels, queue_list), kept


def _fake_forward(h_q, h_k, labels, queue_list, num_classes, K, m, T, wanted):
    dtype = torch.get_default_dtype()
    for x in (h_q, h_k, queue_list):
        dtype = torch.promote_types(dtype, x.dtype)
    kept = torch.empty_like(queue_list) if wanted[0] else queue_list.new_empty(0)
    return h_q.new_empty(h_q.shape[0], 1 + K * num_classes, dtype=dtype), kept


def _setup_context(ctx, inputs, output):
    h_q, h_k, labels, _, *ctx.settings, _ = inputs
    pgc_logits, kept = output
    ctx.mark_non_differentiable(kept)
    return pgc_logits, h_q, h_k, labels, kept


_log_probabilities = define(
    "self_tuning",
    f"(Tensor h_q, Tensor h_k, Tensor labels, Tensor queue_list, {_SETTINGS}, bool[] wanted) "
    "-> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_backward = define(
    "self_tuning_backward",
    "(Tensor grad_output, Tensor pgc_logits, Tensor h_q, Tensor h_k, Tensor labels, Tensor queue_list, "
    f"{_SETTINGS}) -> Tensor",
    lambda *inputs: _core.SelfTuningSettings(*inputs[6:]).backward(*inputs[:6]),
    lambda grad_output, pgc_logits, h_q, *_: torch.empty_like(h_q, memory_format=torch.contiguous_format),
)
differentiate(
    "self_tuning",
    lambda ctx, kept, grad_output, _: (_backward(grad_output, *kept, *ctx.settings), *[None] * 8),
    _setup_context,
    composed=None,
    differentiable=1,
)
_enqueue = define(
    "self_tuning_enqueue",
    f"(Tensor h_k, Tensor labels, Tensor(a!) queue_list, Tensor(b!) queue_ptr, {_SETTINGS}) -> ()",
    lambda *inputs: _core.SelfTuningSettings(*inputs[4:]).enqueue(*inputs[:4]),
    lambda *_: None,
)


def _copy_parameters(encoder_q: nn.Module, encoder_k: nn.Module) -> None:
    sources, targets = list(encoder_q.parameters()), list(encoder_k.parameters())
    if [p.shape for p in sources] != [p.shape for p in targets]:
        raise ValueError("SelfTuning: encoder_q and encoder_k must have parameters of the same shapes")
    for source, target in zip(sources, targets, strict=True):
        target.data.copy_(source.data)
        target.requires_grad = False


def _check_mode(name: str, encoder: nn.Module) -> None:
    """Raise before the queue changes, for a module whose mode determines what it will return."""
    if isinstance(encoder, Classifier) and not encoder.training:
        raise ValueError(
            f"SelfTuning: {name} must return (projections, predictions), as in training mode, "
            "and is in evaluation mode"
        )


def _training_outputs(name: str, outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(outputs, (tuple, list)) and len(outputs) == 2:
        return outputs[0], outputs[1]
    # A tensor with two rows would unpack as well, into nonsense.
    raise ValueError(
        f"SelfTuning: {name} must return (projections, predictions), as in training mode, "
        f"got {type(outputs).__name__}"
    )
