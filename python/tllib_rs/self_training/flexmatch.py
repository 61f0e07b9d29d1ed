"""FlexMatch: `FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling (NIPS 2021)
<https://arxiv.org/abs/2110.08263>`_."""

import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch.distributed import ProcessGroup

from tllib_rs import _core
from tllib_rs._library import as_number, define
from tllib_rs.self_training import _flexmatch_ranks

__all__ = ["DynamicThresholdingModule"]


# Compiled graphs refer to a module by number: operators cannot take the object, and the labels of all
# samples as a mutated argument would be copied at each step.
_modules: weakref.WeakValueDictionary[int, "DynamicThresholdingModule"] = weakref.WeakValueDictionary()
_numbers = itertools.count()

_compiled_status = define(
    "flexmatch_status",
    "(int module, Tensor pseudo_labels, bool warmup) -> Tensor",
    lambda module, *inputs: _modules[module]._status(*inputs),
    lambda module, pseudo_labels, warmup: torch.empty_like(
        pseudo_labels, dtype=torch.float32, memory_format=torch.contiguous_format
    ),
    ordered=True,
)
_compiled_update = define(
    "flexmatch_update",
    "(int module, Tensor idxes, Tensor selected_mask, Tensor pseudo_labels) -> ()",
    lambda module, *inputs: _modules[module]._ranks.update(*inputs),
    lambda *_: None,
    ordered=True,
)


def _break_graph() -> None:
    """The operators above read and write labels that no compiled graph knows of: within one graph, reads and
    writes of the tensor would not stay in order with them."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()


class DynamicThresholdingModule:
    r"""A threshold for each class that follows how well the class is learned.

    With :math:`n_c` the number of unlabeled samples whose latest confident pseudo label is :math:`c`,

    .. math::
        \beta(c) = \frac{n_c}{\max_k n_k}, \qquad \tau(c) = \mathcal{M}(\beta(c)) \cdot \tau

    The maximum runs over the classes and, with warm-up, over the samples without a label as well. If all
    samples have the same value, every :math:`\beta` is 0.

    :meth:`update` maintains the counts incrementally, so a step costs :math:`O(B)` however many samples
    there are. Outside writes to :attr:`net_outputs` are detected, and all labels are then recounted once;
    while you keep a reference to it, they are recounted once per call. A replayed CUDA graph does not detect
    them: after a write in place, call :meth:`get_threshold` once outside of the graph; after assigning
    :attr:`net_outputs` or loading a state, capture again.

    Args:
        threshold (float): the fixed threshold :math:`\tau`.
        warmup (bool): whether samples that were never selected take part in the maximum.
        mapping_func (callable): :math:`\mathcal{M}`, tensor to tensor, element by element.
        num_classes (int): number of classes.
        n_unlabeled_samples (int): number of unlabeled samples.
        device (torch.device): where :attr:`net_outputs` lives.
        process_group (ProcessGroup, optional): the ranks that train together, such as
            ``torch.distributed.group.WORLD``. Each then has the thresholds that one process would have with
            the batches of all ranks concatenated in rank order. Default: this process alone.
        layout (str): ``"replicated"``: every rank holds the labels of all samples, and any sampler works.
            ``"sharded"``: ``n_unlabeled_samples`` is the number of this rank's own samples, indices count
            from 0 on each rank, and only counts are exchanged.
        dtype (torch.dtype): of :attr:`net_outputs`: int8 for at most 128 classes, int16 for at most
            32,768, int32, or int64, which tllib has.

    With a process group, all ranks construct the module and call :meth:`update` (with an empty batch if they
    have none), :meth:`load_state_dict` and :meth:`synchronize` equally often; the other methods are not
    collective. ``update`` starts one asynchronous exchange and returns; the first call that needs the result
    waits for it. It runs on the CPU over the module's own gloo group, so labels on a device cost one
    synchronization per step. Outside writes to :attr:`net_outputs` must be made on every rank (replicated),
    or take effect from this rank's next ``update`` or ``synchronize`` (sharded). The module cannot be
    pickled.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: shapes that differ; no classes or samples; more classes than ``dtype`` holds; ranks
            that were constructed differently.
        IndexError: an index or label out of range (on the CPU; on other devices the device raises).
        RuntimeError: devices that differ; a rank that died, or did not call within the group's timeout.
            Bad input raises before anything is sent: the rank may try again while the others wait.

    Examples::

        >>> module = DynamicThresholdingModule(0.95, True, lambda x: x / (2 - x), 10, 50000, "cpu")
        >>> threshold = module.get_threshold(pseudo_labels)
        >>> mask = (confidence >= threshold).float()
        >>> module.update(idxes, mask, pseudo_labels)
    """

    def __init__(
        self,
        threshold: float,
        warmup: bool,
        mapping_func: Callable[[torch.Tensor], torch.Tensor],
        num_classes: int,
        n_unlabeled_samples: int,
        device: torch.device | str,
        *,
        process_group: ProcessGroup | None = None,
        layout: Literal["replicated", "sharded"] = "replicated",
        dtype: torch.dtype = torch.int64,
    ):
        self.threshold = as_number(threshold)
        self.warmup = warmup
        self.mapping_func = mapping_func
        self.num_classes = as_number(num_classes)
        self.n_unlabeled_samples = as_number(n_unlabeled_samples)
        self.device = device
        self.process_group = process_group
        self.layout = layout
        self.dtype = dtype
        self._connect()

    def _connect(self) -> None:
        self._state = _core.FlexMatch(
            self.num_classes, self.n_unlabeled_samples, self.device, dtype=self.dtype
        )
        self._ranks = _flexmatch_ranks.join(self._state, self)
        self._number = next(_numbers)
        _modules[self._number] = self

    @property
    def net_outputs(self) -> torch.Tensor:
        """(n_unlabeled_samples,), of ``dtype``: each sample's latest confident label, -1 before the first.

        May be read, written in place, and assigned. A compiled function breaks its graph there."""
        _break_graph()
        self._ranks.settle()
        return self._state.net_outputs

    @net_outputs.setter
    def net_outputs(self, labels: torch.Tensor) -> None:
        self._ranks.settle()
        self._state.net_outputs = labels

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "net_outputs":
            # The compiler would call the setter after the graph.
            _break_graph()
        super().__setattr__(name, value)

    def get_threshold(self, pseudo_labels: torch.Tensor) -> torch.Tensor:
        """The threshold of each label's class, float32 (or what ``mapping_func`` makes of it), in the
        shape of ``pseudo_labels`` (int64 or int32)."""
        if torch.compiler.is_compiling():
            status = _compiled_status(self._number, pseudo_labels, bool(self.warmup))
        else:
            status = self._status(pseudo_labels, bool(self.warmup))
        return self.threshold * self.mapping_func(status)

    def _status(self, pseudo_labels: torch.Tensor, warmup: bool) -> torch.Tensor:
        self._ranks.complete()
        return self._state.status(pseudo_labels, warmup)

    def update(self, idxes: torch.Tensor, selected_mask: torch.Tensor, pseudo_labels: torch.Tensor) -> None:
        """Note the labels of the selected samples. With a process group all ranks call it.

        Args:
            idxes (tensor): (minibatch,), int64 or int32, the samples' positions in the unlabeled set. Of
                duplicates, the last selected one counts.
            selected_mask (tensor): (minibatch,), any numeric dtype, 1 where a sample is selected.
            pseudo_labels (tensor): (minibatch,), int64 or int32.
        """
        if torch.compiler.is_compiling():
            _compiled_update(self._number, idxes, selected_mask, pseudo_labels)
        else:
            self._ranks.update(idxes, selected_mask, pseudo_labels)

    def class_counts(self) -> torch.Tensor:
        """(num_classes + 1,), int64: samples without a label, then samples per class, over all ranks. A
        copy."""
        return self._ranks.class_counts()

    def synchronize(self) -> None:
        """Share outside writes to :attr:`net_outputs` with the other ranks (sharded), or check that the
        counts are the same on all ranks (replicated). All ranks call it; without a group it does nothing.

        Raises:
            RuntimeError: the counts differ (replicated).
        """
        self._ranks.synchronize()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """``{"net_outputs": ...}`` of this rank's samples, a copy; the arguments of the constructor are not
        part of it."""
        return {"net_outputs": self.net_outputs.clone()}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor] | torch.Tensor) -> None:
        """Load what :meth:`state_dict` returned, or a bare ``net_outputs`` as scripts for tllib save it.

        The tensor, of any of the dtypes that labels may have, is copied to :attr:`device` and ``dtype``.
        If it is invalid, the state is unchanged. With a process group all ranks call it; it ends with a
        :meth:`synchronize`.

        Raises:
            TypeError: neither a mapping nor a tensor, or of another dtype.
            ValueError: other keys than ``net_outputs``, or another number of labels.
            IndexError: a label that is neither -1 nor a class.
        """
        if isinstance(state_dict, Mapping):
            if set(state_dict) != {"net_outputs"}:
                raise ValueError(
                    "DynamicThresholdingModule: state_dict must have the one key 'net_outputs', "
                    f"got {sorted(map(str, state_dict))}"
                )
            labels = state_dict["net_outputs"]
        else:
            labels = state_dict
        if not isinstance(labels, torch.Tensor):
            raise TypeError(
                "DynamicThresholdingModule: state_dict must be a mapping with net_outputs, or that "
                f"torch.Tensor itself, got {type(labels).__name__}"
            )
        self._ranks.check()
        self._ranks.settle()
        self._state.load(labels)
        self._ranks.synchronize()

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(
                "DynamicThresholdingModule: a module with a process group can be neither pickled nor copied; "
                "construct another on all ranks and load this one's state_dict"
            )
        state = self.__dict__.copy()
        del state["_state"], state["_ranks"], state["_number"]
        labels = self.net_outputs
        # An array, since torch sends a tensor to a spawned process as shared memory: a copy made here would
        # be freed before the process opens it, and the labels themselves would be written by both processes.
        # torch.load maps the device of the empty tensor as it is told to.
        return state | {"net_outputs": labels.cpu().numpy(), "labels_device": labels.new_empty(0)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        labels = state.pop("net_outputs")
        # tllib pickles the tensor itself, and has none of these settings.
        if not isinstance(labels, torch.Tensor):
            labels = torch.tensor(labels, device=state.pop("labels_device").device)
        self.__dict__.update({"process_group": None, "layout": "replicated", "dtype": labels.dtype} | state)
        device, self.device = self.device, labels.device
        self._connect()
        self.device = device
        self._state.net_outputs = labels
