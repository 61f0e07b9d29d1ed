"""Shared by the methods that work across ranks: the process group, all-reduced sums, and gathered rows.

Every rank must make the same calls in the same order. Each call here issues the same number of collectives
whatever the data, even for an empty batch; invalid arguments raise before anything is sent.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import forward_ad


class Ranks:
    """The ranks of a process group. Copies share it, and it is not pickled.

    Args:
        owner: the class, for messages.
        group: a process group of which this process is a member.
    """

    def __init__(self, owner: str, group: Any):
        check_group(owner, group)
        self.owner, self.group = owner, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    @classmethod
    def of(cls, owner: str, group: Any) -> "Ranks | None":
        """``None`` for no group.

        Raises:
            TypeError: not a process group.
            ValueError: this process is not a member of it.
            RuntimeError: the group was destroyed, or torch is built without torch.distributed.
        """
        return None if group is None else cls(owner, group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return self

    def __reduce__(self):
        raise TypeError(f"{self.owner}: a process_group cannot be pickled; save the state_dict")

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` summed over the ranks, in place; the same bits on every rank."""
        dist.all_reduce(values, group=self.group)
        return values

    def broadcast_(self, values: torch.Tensor) -> None:
        """The first rank's ``values`` on every rank, in place."""
        dist.broadcast(values, group=self.group, group_src=0)

    def refuse_tangents(self, *tensors: torch.Tensor) -> None:
        """Raise for a tensor with a tangent of forward mode: the other ranks do not get it."""
        level = forward_ad._current_level
        if level >= 0 and any(forward_ad.unpack_dual(x, level=level).tangent is not None for x in tensors):
            raise RuntimeError(f"{self.owner}: no derivative in forward mode across ranks")

    def rows(self, count: int, device: torch.device, **alike: int) -> "Rows":
        """Start to exchange the numbers of rows, ``count`` on this rank, and what must be ``alike``."""
        return Rows(self, count, device, alike)


def check_group(owner: str, group: Any) -> None:
    """Raise as :meth:`Ranks.of` does."""
    if not dist.is_available():
        raise RuntimeError(f"{owner}: process_group needs a torch that is built with torch.distributed")
    if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{owner}: this process is not a member of process_group")
    if not isinstance(group, dist.ProcessGroup):
        kind = type(group).__name__
        raise TypeError(f"{owner}: process_group must be a torch.distributed.ProcessGroup, got {kind}")
    try:
        member = dist.get_rank(group) >= 0
    except (ValueError, RuntimeError, KeyError) as error:
        raise RuntimeError(f"{owner}: process_group is not initialized, or was destroyed") from error
    if not member:
        raise ValueError(f"{owner}: this process is not a member of process_group")


class Rows:
    """Rows of all ranks in rank order; the number of rows may differ between ranks.

    Two messages: first the row counts, because an all-gather needs the same size on all ranks and none knows
    the largest; this one is asynchronous until :meth:`gather`. Then all tensors, as the bytes of their rows,
    in one message.

    The first message also holds integers that must be the same on all ranks, so that a mismatch raises on
    every rank; messages of different sizes would hang or return garbage.
    """

    def __init__(self, ranks: Ranks, count: int, device: torch.device, alike: dict[str, int]):
        self._ranks, self._alike = ranks, tuple(alike)
        self._sent = torch.tensor([count, *alike.values()], dtype=torch.int64).to(device)
        self._headers = self._sent.new_empty(ranks.size * len(self._sent))
        self._counts: list[int] | None = None
        self._work = dist.all_gather_into_tensor(self._headers, self._sent, group=ranks.group, async_op=True)

    def counts(self) -> list[int]:
        """The number of rows on each rank.

        Raises:
            ValueError: on every rank, if values that must be alike differ between ranks.
        """
        if self._counts is not None:
            return self._counts
        self._work.wait()
        counts, *facts = self._headers.view(self._ranks.size, -1).t().tolist()
        for name, values in zip(self._alike, facts, strict=True):
            if len(set(values)) > 1:
                raise ValueError(f"{self._ranks.owner}: {name} must be the same on every rank, got {values}")
        self._counts = counts
        return counts

    def gather(self, tensors: Sequence[torch.Tensor]) -> "Gathered":
        """All ranks' rows of each tensor, (count, ...). Their dtypes and the sizes of their rows must be the
        same on every rank.

        Raises:
            ValueError: on every rank, if values that must be alike differ between ranks.
        """
        counts = self.counts()
        ranks, largest = self._ranks, max(counts)
        rows = [_bytes(x) for x in tensors]
        packed = torch.cat(rows, dim=1)
        own = packed.new_zeros(largest, packed.shape[1])
        own[: len(packed)] = packed
        everything = own.new_empty(ranks.size * largest, packed.shape[1])
        dist.all_gather_into_tensor(everything, own, group=ranks.group)
        kept = torch.cat([everything[r * largest : r * largest + n] for r, n in enumerate(counts)])
        parts = kept.split([x.shape[1] for x in rows], dim=1)
        gathered = [_of_bytes(part, x) for part, x in zip(parts, tensors, strict=True)]
        return Gathered(ranks, gathered, sum(counts[: ranks.rank]))


class Gathered:
    """``tensors``: the gathered tensors, without a gradient; this rank's rows begin at ``start``."""

    def __init__(self, ranks: Ranks, tensors: list[torch.Tensor], start: int):
        self._ranks, self.tensors, self.start = ranks, tensors, start

    def through(self, index: int, own: torch.Tensor) -> torch.Tensor:
        """The tensor at ``index``, differentiable with respect to ``own``, this rank's rows of it."""
        tensor = self.tensors[index]
        if not (own.requires_grad and torch.is_grad_enabled()):
            return tensor
        return _OwnRows.apply(own, tensor, self.start, self._ranks)


class _OwnRows(torch.autograd.Function):
    """All rows in forward; in backward the gradient of this rank's rows times the number of ranks, which is
    the gradient of the sum of the ranks' equal losses. Nothing is sent in backward."""

    @staticmethod
    def forward(ctx, own, tensor, start, ranks):
        ctx.start, ctx.count, ctx.ranks = start, len(own), ranks
        return tensor

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError(f"{ctx.ranks.owner}: no second derivative (create_graph=True) across ranks")
        return grad.narrow(0, ctx.start, ctx.count) * ctx.ranks.size, None, None, None


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """(rows, bytes of a row), uint8."""
    flat = x.detach().resolve_conj().resolve_neg().contiguous()
    count, width = len(x), x.shape[1:].numel()
    return flat.reshape(count, width).view(torch.uint8)


def _of_bytes(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    # A copy: the column starts at an arbitrary byte, and a view as another dtype must be aligned.
    rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.view(like.dtype).reshape(len(rows), *like.shape[1:])


def dtype_number(dtype: torch.dtype) -> int:
    """A number for ``dtype``, the same in every process."""
    return int.from_bytes(str(dtype).removeprefix("torch.").encode()[:7], "big")
