"""Networks whose parameters are DTensors (``fully_shard``, tensor parallelism): each rank sees its shards."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def possible() -> bool:
    """Whether this process can hold a DTensor: it has imported them, and has a process group."""
    return "torch.distributed.tensor" in sys.modules and torch.distributed.is_initialized()


def fully_sharded(net: nn.Module) -> Iterator[nn.Module]:
    """The modules of ``net`` that ``fully_shard`` was called on."""
    if "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FSDPModule

        yield from (module for module in net.modules() if isinstance(module, FSDPModule))


def held(net: nn.Module) -> bool:
    """Whether a parameter of ``net`` is a DTensor now."""
    if not possible():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in net.parameters())


@contextmanager
def resharded(net: nn.Module, written: nn.Module) -> Iterator[None]:
    """Within the forward of ``net``: its modules hold their shards while those of ``written`` change, and
    ``net`` what it had gathered again afterwards.

    Raises:
        RuntimeError: ``net`` keeps what it has gathered until backward.
    """
    modules = list(fully_sharded(net)) if possible() else []
    for module in modules:
        module.reshard()
    if net in modules and not held(written):
        raise RuntimeError(
            "SelfTuning: fully_shard keeps gathered copies of the key encoder's parameters, and what is "
            "written into those is lost: shard with reshard_after_forward=True, or both encoders too"
        )
    yield
    if net in modules:
        net.unshard()


def reshard(net: nn.Module) -> None:
    """Have the modules hold their shards. After a forward without backward the outermost ones still hold
    gathered copies, and what is written into those is lost."""
    for module in fully_sharded(net):
        module.reshard()


def local_pairs(
    teachers: Iterable[Tensor], students: Iterable[Tensor], kind: str
) -> list[tuple[Tensor, Tensor]]:
    """Tensors that correspond, DTensors replaced by this rank's shards. No communication.

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
