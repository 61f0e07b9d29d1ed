"""FlexMatch: `FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling (NIPS 2021)
<https://arxiv.org/abs/2110.08263>`_."""

import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tllib_rs import _core
from tllib_rs._library import define

__all__ = ["DynamicThresholdingModule"]


# torch.compile knows a module by a number: its operators take no object, and the labels of all samples
# as an argument that is written would be copied at each step.
_modules: weakref.WeakValueDictionary[int, "DynamicThresholdingModule"] = weakref.WeakValueDictionary()
_numbers = itertools.count()

_compiled_status = define(
    "flexmatch_status",
    "(int module, Tensor pseudo_labels, bool warmup) -> Tensor",
    lambda module, *inputs: _modules[module]._state.status(*inputs),
    lambda module, pseudo_labels, warmup: torch.empty_like(
        pseudo_labels, dtype=torch.float32, memory_format=torch.contiguous_format
    ),
    ordered=True,
)
_compiled_update = define(
    "flexmatch_update",
    "(int module, Tensor idxes, Tensor selected_mask, Tensor pseudo_labels) -> ()",
    lambda module, *inputs: _modules[module]._state.update(*inputs),
    lambda *_: None,
    ordered=True,
)


class DynamicThresholdingModule:
    r"""A threshold for each class that follows how well the class is learned.

    With :math:`n_c` the number of unlabelled samples whose latest confident pseudo label is :math:`c`,

    .. math::
        \beta(c) = \frac{n_c}{\max_k n_k}, \qquad \tau(c) = \mathcal{M}(\beta(c)) \cdot \tau

    The maximum runs over the classes and, with warm-up, over the samples without a label as well. Where
    one single value fills all samples, every :math:`\beta` is 0.

    The counts are kept up to date by :meth:`update`, so a step costs :math:`O(B)` however many samples
    there are. Outside writes to :attr:`net_outputs` are noticed and counted, once; while you keep a
    reference to it, once a step.

    Args:
        threshold (float): the fixed threshold :math:`\tau`.
        warmup (bool): whether samples that were never selected take part in the maximum.
        mapping_func (callable): :math:`\mathcal{M}`, tensor to tensor, element by element.
        num_classes (int): number of classes.
        n_unlabeled_samples (int): number of unlabelled samples.
        device (torch.device): where :attr:`net_outputs` lives.

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype.
        ValueError: shapes that differ; no classes or samples.
        IndexError: an index or label out of range (on the CPU; on other devices the device raises).
        RuntimeError: devices that differ.

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
    ):
        self.threshold = threshold
        self.warmup = warmup
        self.mapping_func = mapping_func
        self.num_classes = num_classes
        self.n_unlabeled_samples = n_unlabeled_samples
        self.device = device
        self._state = _core.FlexMatch(num_classes, n_unlabeled_samples, bool(warmup), device)
        self._register()

    def _register(self) -> None:
        self._number = next(_numbers)
        _modules[self._number] = self

    @property
    def net_outputs(self) -> torch.Tensor:
        """(n_unlabeled_samples,), int64: each sample's latest confident label, -1 before the first.

        May be read, written in place, and assigned."""
        return self._state.net_outputs

    @net_outputs.setter
    def net_outputs(self, labels: torch.Tensor) -> None:
        self._state.net_outputs = labels

    def get_threshold(self, pseudo_labels: torch.Tensor) -> torch.Tensor:
        """The threshold of each label's class, float32 (or what ``mapping_func`` makes of it), in the
        shape of ``pseudo_labels`` (int64)."""
        if torch.compiler.is_compiling():
            status = _compiled_status(self._number, pseudo_labels, bool(self.warmup))
        else:
            status = self._state.status(pseudo_labels, bool(self.warmup))
        return self.threshold * self.mapping_func(status)

    def update(self, idxes: torch.Tensor, selected_mask: torch.Tensor, pseudo_labels: torch.Tensor) -> None:
        """Note the labels of the selected samples.

        Args:
            idxes (tensor): (minibatch,), int64, the samples' positions in the unlabelled set. Of equal
                ones the last selected counts.
            selected_mask (tensor): (minibatch,), any numeric dtype, 1 where a sample is selected.
            pseudo_labels (tensor): (minibatch,), int64.
        """
        if torch.compiler.is_compiling():
            _compiled_update(self._number, idxes, selected_mask, pseudo_labels)
        else:
            self._state.update(idxes, selected_mask, pseudo_labels)

    def class_counts(self) -> torch.Tensor:
        """(num_classes + 1,), int64: samples without a label, then samples per class. A copy."""
        return self._state.counts()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """``{"net_outputs": ...}``, a copy; the arguments of the constructor are not part of it."""
        return {"net_outputs": self.net_outputs.clone()}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor] | torch.Tensor) -> None:
        """Load what :meth:`state_dict` returned, or a bare ``net_outputs`` as scripts for tllib save it.

        The tensor is copied to :attr:`device`. State is unchanged after an error.

        Raises:
            TypeError: neither a mapping nor a tensor, or not int64.
            ValueError: other keys than ``net_outputs``, or the labels of another number of samples.
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
        self.net_outputs = labels.detach().clone()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_state"], state["_number"]
        return state | {"net_outputs": self.net_outputs.clone()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        labels = state.pop("net_outputs")
        self.__dict__.update(state)
        self._state = _core.FlexMatch(
            self.num_classes, self.n_unlabeled_samples, bool(self.warmup), labels.device
        )
        self._state.net_outputs = labels
        self._register()
