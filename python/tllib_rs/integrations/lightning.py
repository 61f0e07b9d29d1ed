"""The EMA teacher as a callback of `Lightning <https://lightning.ai>`_, 2.6 or newer."""

import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from tllib_rs.self_training._mean_teacher import shards
from tllib_rs.self_training.mean_teacher import EMATeacher

__all__ = ["EMATeacherCallback"]


class EMATeacherCallback(Callback):
    """Keeps an :class:`~tllib_rs.self_training.mean_teacher.EMATeacher` of the module that is trained.

    The teacher is in evaluation mode and exists from the start of the fit (:meth:`of` finds it). It is
    updated once after each batch in which the optimizer stepped, and is saved in and loaded from the
    checkpoints, with alpha and step. A checkpoint's ``state_dict`` stays the student's.

    Args:
        alpha (float): decay factor in [0, 1].
        network (str): the sub-module of the LightningModule to average; all of it by default.
        evaluate (bool): validate and test with the teacher's parameters and buffers, copied into the student.
            The student's own values are saved before and restored bit for bit afterwards.
        buffers (str): as for :class:`~tllib_rs.self_training.mean_teacher.EMATeacher`; the default is "copy".
        options: further keyword arguments of :class:`~tllib_rs.self_training.mean_teacher.EMATeacher`.

    Raises:
        AttributeError: the LightningModule has no such ``network``.
        ValueError: ``evaluate`` for a network that ``fully_shard`` was called on.
    """

    def __init__(
        self,
        alpha: float = 0.999,
        *,
        network: str = "",
        evaluate: bool = True,
        buffers: str = "copy",
        **options: Any,
    ):
        self._arguments = {"alpha": alpha, "buffers": buffers, **options, "track": True}
        EMATeacher(nn.Module(), **self._arguments | {"teacher": None})  # raises here, not when the fit starts
        self._network = network
        self._evaluate = evaluate
        self._steps = 0
        #: What was loaded from a checkpoint before there was a teacher.
        self._loaded: dict[str, Any] | None = None
        #: The student's own values during an evaluation, by name, with the tensors that hold the teacher's.
        self._student: dict[str, tuple[Tensor, Tensor]] = {}
        self.teacher: EMATeacher | None = None

    @staticmethod
    def of(trainer: Trainer, network: str = "") -> "EMATeacherCallback":
        """The callback that ``trainer`` has for ``network``."""
        for callback in trainer.callbacks:
            if isinstance(callback, EMATeacherCallback) and callback._network == network:
                return callback
        raise ValueError(f"EMATeacherCallback: the trainer has none for the network {network!r}")

    @property
    def state_key(self) -> str:
        """One for each network."""
        return self._generate_state_key(network=self._network)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the teacher, now that the module is on its device and any checkpoint is loaded."""
        self._prepare(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the optimizer's steps from here on."""
        # Strategies that load the checkpoint late have done so by now.
        self._prepare(pl_module)
        self._steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the teacher, if the optimizer made a step."""
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self.teacher.update()

    def _prepare(self, pl_module: LightningModule) -> None:
        network = pl_module.get_submodule(self._network)
        # Tensors created in inference mode could not be updated outside of it.
        with torch.inference_mode(False):
            if self.teacher is None or self.teacher.model is not network:
                self.teacher = EMATeacher(network, **self._arguments)
                self.teacher.eval()
            if self._loaded is not None:
                self.teacher.load_state_dict(self._loaded["teacher"])
                self._loaded = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the teacher's values into the student."""
        self._show_teacher(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the student's own values."""
        self._show_student()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the teacher's values into the student."""
        self._show_teacher(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the student's own values."""
        self._show_student()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the student's own values."""
        self._show_student()

    def _show_teacher(self, pl_module: LightningModule) -> None:
        if not self._evaluate:
            return
        self._prepare(pl_module)
        student = self.teacher.model
        if shards.fully_sharded(student):
            raise ValueError("EMATeacherCallback: evaluate must be False for a network that is fully sharded")
        ours, theirs = _tensors(self.teacher.teacher), _tensors(student)
        with torch.no_grad():
            self._student = {name: (tensor, tensor.clone()) for name, tensor in theirs.items()}
            for shown, tensor in zip(ours.values(), theirs.values(), strict=True):
                tensor.copy_(shown)

    def _show_student(self) -> None:
        with torch.no_grad():
            for tensor, value in self._student.values():
                tensor.copy_(value)
        self._student = {}

    def state_dict(self) -> dict[str, Any]:
        """The callback's part of a checkpoint: the teacher's state."""
        return self._loaded or ({} if self.teacher is None else {"teacher": self.teacher.state_dict()})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's part for the teacher, which may not be there yet."""
        self._loaded = state_dict

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the student's own values into a checkpoint that is written during an evaluation."""
        prefix = f"{self._network}." if self._network else ""
        for name, (_, value) in self._student.items():
            if prefix + name in checkpoint["state_dict"]:
                checkpoint["state_dict"][prefix + name] = value

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Warn if a checkpoint has no teacher."""
        if not checkpoint.get("callbacks", {}).get(self.state_key):
            warnings.warn(
                f"{self.state_key}: the checkpoint holds no teacher; it starts as a copy of the student",
                stacklevel=2,
            )


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all of their names."""
    named = dict(net.named_parameters(remove_duplicate=False))
    return named | dict(net.named_buffers(remove_duplicate=False))
