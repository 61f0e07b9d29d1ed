"""Mean teacher: `Mean teachers are better role models: Weight-averaged consistency targets improve
semi-supervised deep learning results (NIPS 2017) <https://arxiv.org/abs/1703.01780>`_."""

import copy
from typing import Any

import torch
from torch import nn

from tllib_rs import _core
from tllib_rs._library import define

__all__ = ["EMATeacher", "set_requires_grad", "update_bn"]


class AlphaError(ValueError, AssertionError):
    """A decay factor out of range. tllib asserts here, so it can be caught as AssertionError too."""


def _checked(alpha: float) -> float:
    try:
        _core.check_alpha(alpha)
    except ValueError as error:
        raise AlphaError(str(error)) from None
    return alpha


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
)


class EMATeacher:
    r"""A teacher whose parameters are the exponential moving average of a student's,

    .. math::
        \theta' \leftarrow \alpha \theta' + (1 - \alpha) \theta

    over the parameters of the moment; buffers are left alone (see :func:`update_bn`). The update is in
    place: parameters keep their identity and storage. Student and teacher may differ in dtype and device;
    the teacher keeps its own.

    Args:
        model (torch.nn.Module): the student. The teacher starts as a copy of it.
        alpha (float): decay factor in [0, 1].

    Inputs:
        - x (tensor): input of the teacher network.

    Raises:
        TypeError: ``model`` is no module; a parameter is neither floating point nor complex.
        ValueError: ``alpha`` outside [0, 1]; parameters of teacher and student that do not correspond.

    Examples::

        >>> teacher = EMATeacher(classifier, alpha=0.9)
        >>> y_teacher = teacher(x)
        >>> teacher.update()  # after each step of the optimizer
    """

    def __init__(self, model: nn.Module, alpha: float):
        if not isinstance(model, nn.Module):
            raise TypeError(f"EMATeacher: model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.alpha = _checked(alpha)
        self.teacher = copy.deepcopy(model)
        set_requires_grad(self.teacher, False)

    def set_alpha(self, alpha: float) -> None:
        """Change the decay factor."""
        self.alpha = _checked(alpha)

    def update(self) -> None:
        """Move the teacher towards the student."""
        if torch.compiler.is_compiling():
            with torch.no_grad():
                _compiled_update(list(self.teacher.parameters()), list(self.model.parameters()), self.alpha)
        else:
            _core.ema_update(self.teacher, self.model, self.alpha)

    def __call__(self, x: torch.Tensor) -> Any:
        return self.teacher(x)

    def train(self, mode: bool | None = True) -> None:
        """Set the teacher's training mode."""
        self.teacher.train(mode)

    def eval(self) -> None:
        """Set the teacher to evaluation mode."""
        self.train(False)

    def state_dict(self) -> dict[str, Any]:
        """The teacher's state, as ``teacher.state_dict()``."""
        return self.teacher.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the teacher's state."""
        self.teacher.load_state_dict(state_dict)

    @property
    def module(self) -> nn.Module:
        """What a DataParallel or DistributedDataParallel teacher wraps."""
        return self.teacher.module


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
