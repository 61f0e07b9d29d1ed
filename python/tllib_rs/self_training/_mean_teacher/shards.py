"""Networks whose parameters are DTensors (``fully_shard``, tensor parallelism): each rank sees its shards."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def possible() -> bool:
    """Whether this process can hold a DTensor: it has imported them, and has a process group."""
    return "torch.distributed.tensor" in sys.modules and torch.distributed.is_initialized()


def _held(net: nn.Module) -> bool:
    """Whether a parameter of ``net`` is a DTensor now."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in net.parameters())


def _live() -> list[nn.Module]:
    """The modules of this process that ``fully_shard`` was called on."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    return [module for module in list(_module_state_mapping) if isinstance(module, FSDPModule)]


def fully_sharded(net: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on ``net`` or a module of it."""
    return not set(net.modules()).isdisjoint(_live())


def _any_live() -> bool:
    return bool(_live())


# What torch.compiler.assume_constant_result would set, but that imports the compiler. Traced code cannot
# look up the modules.
_any_live._dynamo_marked_constant = True


def among(net: nn.Module) -> bool:
    """Whether parameters of ``net`` may be shards, or gathered from shards; also works in a function that is
    being compiled."""
    return possible() and (_any_live() or _held(net))


def owners(net: nn.Module) -> list[nn.Module]:
    """The modules that ``fully_shard`` was called on and that shard parameters of ``net``: they may be within
    it or around it."""
    live = _live()
    own = set(net.modules()) if live else set()
    return [module for module in live if any(part in own for part in _parts(module))]


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The modules whose parameters ``module`` shards."""
    group = module._get_fsdp_state()._fsdp_param_group
    for parameter in group.fsdp_params if group is not None else ():
        yield parameter._module_info.module
        yield from parameter._module_info.shared_modules


def reshard(name: str, *nets: nn.Module) -> list[nn.Module]:
    """Reshard the owners of ``nets``: they keep parameters that were gathered for a forward until backward,
    and writes to those are lost. Returns the owners that held gathered parameters.

    Raises:
        RuntimeError: called within the forward of an owner that keeps its gathered parameters.
    """
    gathered = {module: None for net in nets for module in owners(net) if not _holds_shards(module)}
    for module in gathered:
        module.reshard()
    if not all(map(_holds_shards, gathered)):
        raise RuntimeError(
            f"{name}: within the forward of a module that fully_shard was called on, which keeps gathered "
            "copies until backward, and what is written into those is lost; shard it with "
            "reshard_after_forward=True"
        )
    return list(gathered)


def _holds_shards(owner: nn.Module) -> bool:
    return owner._get_fsdp_state()._fsdp_param_group.is_sharded


@contextmanager
def resharded(name: str, written: nn.Module, read: nn.Module) -> Iterator[None]:
    """For use within a forward: the owners of both networks are resharded, and those outside of both networks
    are unsharded again afterwards.

    Raises:
        RuntimeError: as :func:`reshard`.
    """
    gathered = reshard(name, written, read)
    try:
        yield
    finally:
        within = {*written.modules(), *read.modules()} if gathered else set()
        for module in gathered:
            if module not in within:
                module.unshard()


def local_pairs(
    teachers: Iterable[Tensor], students: Iterable[Tensor], kind: str
) -> list[tuple[Tensor, Tensor]]:
    """Corresponding tensors, with DTensors replaced by this rank's shards. No communication.

    Raises:
        ValueError: numbers, shapes, meshes or placements differ.
    """
    teachers, students = list(teachers), list(students)
    if len(teachers) != len(students):
        raise ValueError(
            f"EMATeacher: teacher and student must have the same {kind}s, "
            f"got {len(teachers)} and {len(students)}"
        )
    return [_local_pair(t, s, kind) for t, s in zip(teachers, students, strict=True)]


def _local_pair(teacher: Tensor, student: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    if teacher.shape != student.shape:
        raise ValueError(
            f"EMATeacher: teacher {kind} must have the student's shape {list(student.shape)}, "
            f"got shape {list(teacher.shape)}"
        )
    if not possible():
        return teacher, student
    from torch.distributed.tensor import DTensor

    sharded = isinstance(teacher, DTensor), isinstance(student, DTensor)
    if not any(sharded):
        return teacher, student
    if not all(sharded):
        one, other = ("teacher", "student") if sharded[0] else ("student", "teacher")
        raise ValueError(
            f"EMATeacher: {kind}s must be sharded on both sides or on neither, "
            f"got a DTensor in the {one} and a plain tensor in the {other}, of shape {list(teacher.shape)}"
        )
    _check_placements(teacher, student, kind)
    with torch.no_grad():
        return teacher.to_local(), student.to_local()


def _check_placements(teacher: Tensor, student: Tensor, kind: str) -> None:
    if teacher.placements != student.placements:
        raise ValueError(
            f"EMATeacher: teacher {kind} must have the student's placements {student.placements}, "
            f"got {teacher.placements}, of shape {list(teacher.shape)}"
        )
    ours, theirs = teacher.device_mesh, student.device_mesh
    # The devices may differ (a teacher on the CPU); which rank holds what may not.
    if ours is not theirs and not torch.equal(ours.mesh, theirs.mesh):
        raise ValueError(
            f"EMATeacher: teacher {kind} must be on the student's mesh {theirs.mesh.tolist()}, "
            f"got {ours.mesh.tolist()}"
        )
    if any(placement.is_partial() for placement in teacher.placements):
        raise ValueError(f"EMATeacher: {kind}s must be sharded or replicated, got {teacher.placements}")
