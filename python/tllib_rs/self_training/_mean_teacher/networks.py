"""The teacher's network: made from the student's, and moved towards it."""

import copy
from collections import OrderedDict
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from tllib_rs import _core
from tllib_rs.self_training._mean_teacher import shards

BUFFERS = ("leave", "copy", "average")


def bare(net: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and ``torch.compile`` wrappers."""
    while True:
        if isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            net = net.module
        elif "_orig_mod" in net._modules:
            net = net._modules["_orig_mod"]
        else:
            return net


def bare_state(state: dict[str, Any], net: nn.Module) -> dict[str, Any]:
    """``state`` without the wrapper prefixes that all of its keys have and ``net``'s keys do not."""
    for prefix in ("_orig_mod.", "module.") * 2:
        if _all_start(state, prefix) and not _all_start(net.state_dict(), prefix):
            metadata = getattr(state, "_metadata", None)
            state = OrderedDict(state)
            if metadata is not None:
                state._metadata = OrderedDict(metadata)
            consume_prefix_in_state_dict_if_present(state, prefix)
    return state


def _all_start(keys: Iterable[str], prefix: str) -> bool:
    return all(key.startswith(prefix) for key in keys)


def checked_buffers(buffers: str) -> str:
    """``buffers``, if it is one of the policies."""
    if buffers not in BUFFERS:
        raise ValueError(f"EMATeacher: buffers must be one of {', '.join(BUFFERS)}, got {buffers!r}")
    return buffers


def make(
    model: nn.Module,
    teacher: nn.Module | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    unwrap: bool,
) -> nn.Module:
    """The network of the teacher, with the values of ``model``: a copy, or the one handed in."""
    if teacher is None:
        return _copy(bare(model) if unwrap else model, _checked_dtype(dtype), device)
    if unwrap or dtype is not None or device is not None:
        raise ValueError("EMATeacher: dtype, device and unwrap shape a copy, and teacher takes its place")
    return _adopt(teacher, model)


def _checked_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"EMATeacher: dtype must be a torch.dtype, got {type(dtype).__name__}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"EMATeacher: dtype must be floating point, got {dtype}")
    return dtype


def _copy(model: nn.Module, dtype: torch.dtype | None, device: torch.device | str | None) -> nn.Module:
    """A deep copy, with floating-point values in ``dtype`` and everything on ``device``."""
    if shards.fully_sharded(model):
        raise ValueError(
            "EMATeacher: a model that fully_shard was called on cannot be copied; shard a second network in "
            "the same way and hand it in as teacher=, or make the EMATeacher before you shard both"
        )
    memo = {}
    if dtype is not None or device is not None:
        # Converted while copying: a teacher for the CPU never takes memory on the device.
        memo = {id(t): _converted(t, dtype, device) for t in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def _converted(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    dtype = dtype if tensor.is_floating_point() else None
    copied = tensor.detach().to(device=device or tensor.device, dtype=dtype or tensor.dtype, copy=True)
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _adopt(teacher: nn.Module, model: nn.Module) -> nn.Module:
    """``teacher``, with the values of ``model``."""
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"EMATeacher: teacher must be a torch.nn.Module, got {type(teacher).__name__}")
    own = set(map(id, teacher.parameters()))
    if teacher is model or any(id(parameter) in own for parameter in model.parameters()):
        raise ValueError("EMATeacher: teacher must have parameters of its own, got some of model's")
    shards.reshard("EMATeacher", teacher, model)
    with torch.no_grad():
        for ours, theirs in _pairs(teacher, model, "parameter") + _pairs(teacher, model, "buffer"):
            ours.copy_(theirs)
    return teacher


def _pairs(teacher: nn.Module, student: nn.Module, kind: str) -> list[tuple[Tensor, Tensor]]:
    """Corresponding parameters or buffers, as this rank's shards."""
    return shards.local_pairs(*(getattr(net, f"{kind}s")() for net in (teacher, student)), kind)


def update(teacher: nn.Module, student: nn.Module, alpha: float, buffers: str) -> None:
    """``teacher <- alpha * teacher + (1 - alpha) * student``, and the buffers by their policy.

    Everything is checked before anything is written.
    """
    shards.reshard("EMATeacher", teacher, student)
    if buffers == "leave":
        _core.ema_update(teacher, student, alpha)
        return
    averaged, copied = [], []
    for pair in _pairs(teacher, student, "buffer"):
        both = all(t.is_floating_point() or t.is_complex() for t in pair)
        (averaged if buffers == "average" and both else copied).append(pair)
    ours = [*teacher.parameters(), *(t for t, _ in averaged)]
    theirs = [*student.parameters(), *(s for _, s in averaged)]
    _core.ema_update_parameters(ours, theirs, alpha)
    with torch.no_grad():
        for ours, theirs in copied:
            ours.copy_(theirs)
