"""Mean teacher: `Mean teachers are better role models: Weight-averaged consistency targets improve
semi-supervised deep learning results (NIPS 2017) <https://arxiv.org/abs/1703.01780>`_."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tllib_rs import _core
from tllib_rs._library import as_number, define
from tllib_rs.schedules import WarmUp
from tllib_rs.self_training._mean_teacher import networks, progress, shards

__all__ = ["EMATeacher", "set_requires_grad", "update_bn"]


class AlphaError(ValueError, AssertionError):
    """A decay factor out of range. tllib asserts here, so it can be caught as AssertionError too."""


def _checked(alpha: float) -> float:
    try:
        _core.check_alpha(alpha)
    except ValueError as error:
        raise AlphaError(str(error)) from None
    return as_number(alpha)


def _schedule(schedule: Callable[[int], float] | str | None, alpha: float) -> Callable[[int], float] | None:
    if schedule == "warmup":
        return WarmUp(alpha)
    if schedule is None or callable(schedule):
        return schedule
    raise ValueError(f"EMATeacher: schedule must be callable or 'warmup', got {schedule!r}")


def set_requires_grad(net: nn.Module, requires_grad: bool = False) -> None:
    """Set ``requires_grad`` of all parameters of ``net``."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"set_requires_grad: net must be a torch.nn.Module, got {type(net).__name__}")
    for parameter in net.parameters():
        parameter.requires_grad = requires_grad


_compiled_update = define(
    "ema_update",
    "(Tensor(a!)[] teachers, Tensor[] students, float alpha) -> ()",
    _core.ema_update_parameters,
    lambda teachers, students, alpha: None,
    recorded=False,
)


class EMATeacher:
    r"""A teacher whose parameters are the exponential moving average of a student's,

    .. math::
        \theta' \leftarrow \alpha \theta' + (1 - \alpha) \theta

    over the current parameters; buffers are left alone (see :func:`update_bn`). The update is in
    place: parameters keep their identity and storage. Student and teacher may differ in dtype and device;
    the teacher keeps its own. Either may be wrapped by DataParallel, DistributedDataParallel or
    ``torch.compile``. Parameters that are DTensors (``fully_shard``) are averaged shard by shard, without
    communication.

    Args:
        model (torch.nn.Module): the student. The teacher starts as a copy of it.
        alpha (float): decay factor in [0, 1].
        teacher (torch.nn.Module, optional): the network that becomes the teacher and receives the values of
            ``model``, for a model that cannot be copied: one that ``fully_shard`` was called on.
        dtype (torch.dtype, optional): of the teacher's floating-point values, say ``torch.float32`` for a
            student in half precision.
        device (torch.device or str, optional): of the teacher.
        unwrap (bool): the teacher is a copy of the unwrapped module; its state has no wrapper prefixes.
        buffers (str): at each update ``"leave"`` buffers alone, ``"copy"`` the student's, or ``"average"``
            those with floating-point values and copy the others.
        schedule (callable or "warmup", optional): gives the decay factor of each update from its number,
            starting at 1. ``"warmup"`` is :class:`tllib_rs.schedules.WarmUp` up to ``alpha``.
        track (bool): count updates in ``step``, and save and load ``step`` and ``alpha`` with the state. A
            schedule implies it.

    Inputs:
        - x (tensor): input of the teacher network.

    Raises:
        TypeError: ``model`` is not a module; a parameter is neither floating point nor complex.
        ValueError: ``alpha`` outside [0, 1]; parameters of teacher and student that do not correspond; an
            unknown policy or schedule.

    Examples::

        >>> teacher = EMATeacher(classifier, alpha=0.9)
        >>> y_teacher = teacher(x)
        >>> teacher.update()  # after each step of the optimizer
    """

    # Class attributes, for teachers that tllib pickled, and so that a subclass may have a method named step.
    step: Any = 0
    _schedule: Callable[[int], float] | None = None
    _buffers = "leave"
    _track = _unwrap = False
    _plain = True

    def __init__(
        self,
        model: nn.Module,
        alpha: float,
        *,
        teacher: nn.Module | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        unwrap: bool = False,
        buffers: str = "leave",
        schedule: Callable[[int], float] | str | None = None,
        track: bool = False,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"EMATeacher: model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.alpha = _checked(alpha)
        self._buffers = networks.checked_buffers(buffers)
        self._schedule = _schedule(schedule, alpha)
        self._track = track or schedule is not None
        self._unwrap = unwrap
        self._plain = buffers == "leave" and not self._track
        self.teacher = networks.make(model, teacher, dtype, device, unwrap)
        set_requires_grad(self.teacher, False)

    def set_alpha(self, alpha: float) -> None:
        """Change the decay factor."""
        if self._schedule is not None:
            raise ValueError("EMATeacher: alpha follows the schedule and cannot be set")
        self.alpha = _checked(alpha)

    def update(self) -> None:
        """Move the teacher towards the student."""
        if self._plain and torch.compiler.is_compiling() and not shards.among(self.teacher):
            with torch.no_grad():
                _compiled_update(list(self.teacher.parameters()), list(self.model.parameters()), self.alpha)
        elif not self._plain or shards.possible():
            self._update()
        else:
            _core.ema_update(self.teacher, self.model, self.alpha)

    def _update(self) -> None:
        alpha = self.alpha if self._schedule is None else _checked(self._schedule(self.step + 1))
        networks.update(self.teacher, self.model, alpha, self._buffers)
        if self._track:
            self.step, self.alpha = self.step + 1, alpha

    def __call__(self, x: torch.Tensor) -> Any:
        return self.teacher(x)

    def train(self, mode: bool | None = True) -> None:
        """Set the teacher's training mode."""
        self.teacher.train(mode)

    def eval(self) -> None:
        """Set the teacher to evaluation mode."""
        self.train(False)

    def state_dict(self) -> dict[str, Any]:
        """The teacher's state, as ``teacher.state_dict()``. If step and alpha are tracked, it carries them
        beside its keys."""
        state = self.teacher.state_dict()
        return progress.attach(state, self.step, self.alpha) if self._track else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the teacher's state."""
        found = progress.find(state_dict) if self._track else None
        if self._unwrap:
            state_dict = networks.bare_state(state_dict, self.teacher)
        what = "the state carries no step and alpha"
        if found is not None and progress.is_own(state_dict, self.teacher.state_dict()):
            # It was written in place, so it carries the previous step and alpha.
            found = None
            what = "the state is this teacher's own, written in place (torch.distributed.checkpoint does so)"
        self.teacher.load_state_dict(state_dict)
        if found is not None:
            self.step, self.alpha = found
        elif self._track:
            warnings.warn(
                f"EMATeacher: {what}; going on from step {self.step} with alpha {self.alpha}", stacklevel=2
            )

    @property
    def module(self) -> nn.Module:
        """The module inside a DataParallel or DistributedDataParallel teacher."""
        return self.teacher if self._unwrap else self.teacher.module


def update_bn(model: nn.Module, ema_model: nn.Module) -> None:
    """Copy running statistics from ``model`` to ``ema_model``, for every module whose name has 'bn' in it.

    As in tllib every such module is taken for a batch norm.

    Raises:
        KeyError: a module with such a name has no running statistics. Nothing was copied then.
    """
    for name, net in (("model", model), ("ema_model", ema_model)):
        if not isinstance(net, nn.Module):
            raise TypeError(f"update_bn: {name} must be a torch.nn.Module, got {type(net).__name__}")
    names = ("running_mean", "running_var", "num_batches_tracked")
    copies = []
    for (ema_name, ema_module), (name, module) in zip(
        ema_model.named_modules(), model.named_modules(), strict=False
    ):
        if "bn" in ema_name and "bn" in name:
            target, source = ema_module.state_dict(), module.state_dict()
            copies += [(target[key], source[key]) for key in names]
    with torch.no_grad():
        for target, source in copies:
            target.copy_(source)
