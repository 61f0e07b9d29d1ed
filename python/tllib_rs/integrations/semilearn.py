"""FlexMatch's thresholds inside USB (the package ``semilearn``), without its recount of all samples.

USB's hook copies the labels of all unlabeled samples to the host and counts them in Python, at every step.
The hook here gives the same masks and updates the counts incrementally::

    algorithm = get_algorithm(args, net_builder, tb_log, logger)
    replace_hook(algorithm)
"""

from typing import Any

import torch
from semilearn.algorithms.flexmatch import FlexMatchThresholdingHook as Original

from tllib_rs.self_training.flexmatch import DynamicThresholdingModule

__all__ = ["FlexMatchThresholdingHook", "replace_hook"]


def _as_it_is(status: torch.Tensor) -> torch.Tensor:
    return status


class FlexMatchThresholdingHook(Original):
    r"""Drop-in replacement for ``semilearn.algorithms.flexmatch.FlexMatchThresholdingHook``.

    With :math:`\beta` the ``classwise_acc`` of the previous steps and :math:`\tau` the ``p_cutoff``, a sample
    with probabilities :math:`p` passes where

    .. math::
        \max_c p_c \ge \tau \, \frac{\beta(\hat c)}{2 - \beta(\hat c)}, \qquad \hat c = \arg\max_c p_c

    ``selected_label`` and ``classwise_acc`` may be read, written and assigned, and USB's checkpoints hold
    them under the same keys. Two things differ: ``masking`` with ``softmax_x_ulb=True`` works (USB's raises,
    as the hook has no ``compute_prob``), and the state moves to any device other than the CPU, not just CUDA.

    Args:
        ulb_dest_len (int): number of unlabeled samples.
        num_classes (int): number of classes.
        thresh_warmup (bool): whether samples that were never selected take part in the maximum of the
            counts. Default: True

    Raises:
        IndexError: an index or label out of range (on the CPU; on other devices the device raises).
    """

    @property
    def selected_label(self) -> torch.Tensor:
        """(ulb_dest_len,), int64: each sample's latest confident label, -1 before the first."""
        return self._state.net_outputs

    @selected_label.setter
    def selected_label(self, labels: torch.Tensor) -> None:
        # A threshold of 1 and the identity: get_threshold then returns the status itself.
        state = DynamicThresholdingModule(
            1.0, self.thresh_warmup, _as_it_is, self.num_classes, self.ulb_dest_len, labels.device
        )
        state.net_outputs = labels
        self._state = state

    @torch.no_grad()
    def update(self, *args: Any, **kwargs: Any) -> None:
        """Bring ``classwise_acc`` up to date."""
        everyone = torch.arange(self.num_classes, device=self.classwise_acc.device)
        status = self._state.get_threshold(everyone)
        # USB keeps the old values if all samples have the same one. No branch on it: that would synchronize.
        kept = self._state.class_counts().max() == self.ulb_dest_len
        self.classwise_acc.copy_(torch.where(kept, self.classwise_acc, status))

    @torch.no_grad()
    def masking(
        self,
        algorithm: Any,
        logits_x_ulb: torch.Tensor,
        idx_ulb: torch.Tensor,
        softmax_x_ulb: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The mask of the batch, (minibatch,), in the dtype of the probabilities. Also updates the state."""
        self._follow(logits_x_ulb.device)
        probabilities = logits_x_ulb.detach()
        if softmax_x_ulb:
            probabilities = algorithm.compute_prob(probabilities)
        confidence, labels = probabilities.max(dim=-1)
        accuracy = self.classwise_acc[labels]
        mask = confidence.ge(algorithm.p_cutoff * (accuracy / (2.0 - accuracy)))
        self._state.update(idx_ulb, confidence.ge(algorithm.p_cutoff), labels)
        self.update()
        return mask.to(confidence.dtype)

    def _follow(self, device: torch.device) -> None:
        """USB's hooks start on the CPU and move to the device of the first batch."""
        if self.classwise_acc.device != device:
            self.classwise_acc = self.classwise_acc.to(device)
        if self._state.device != device:
            self.selected_label = self.selected_label.to(device)


def replace_hook(algorithm: Any) -> FlexMatchThresholdingHook:
    """Replace USB's hook in ``algorithm`` by ours, which takes over its state; returns ours.

    Args:
        algorithm: any algorithm of USB whose hook ``"MaskingHook"`` is FlexMatch's.

    Raises:
        TypeError: the algorithm has no such hook.
    """
    hook = getattr(algorithm, "hooks_dict", {}).get("MaskingHook")
    if not isinstance(hook, Original):
        raise TypeError(
            "replace_hook: algorithm must have a FlexMatchThresholdingHook as its MaskingHook, "
            f"got {type(hook).__name__}"
        )
    ours = FlexMatchThresholdingHook(hook.ulb_dest_len, hook.num_classes, hook.thresh_warmup)
    # Copies: labels that share memory with the old hook's would have to be recounted at every step.
    ours.selected_label, ours.classwise_acc = hook.selected_label.clone(), hook.classwise_acc.clone()
    ours.name, ours.priority = hook.name, hook.priority
    algorithm.hooks_dict["MaskingHook"] = ours
    algorithm._hooks[:] = [ours if other is hook else other for other in algorithm._hooks]
    return ours
