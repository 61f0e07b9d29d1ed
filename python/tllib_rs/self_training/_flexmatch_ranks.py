"""FlexMatch across the ranks of a process group: what is exchanged, and when.

Every exchange runs on the CPU, over the module's own gloo group. Its collectives therefore run in the same
order on every rank, whenever a rank reads the result, and whatever else runs on the caller's group.
"""

import datetime
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
import torch.distributed as dist

from tllib_rs import _core
from tllib_rs._distributed import check_group

CLASS = "DynamicThresholdingModule"
LAYOUTS = ("replicated", "sharded")
#: Words that a rank has room for in the first exchange, and the increment by which the room grows.
ROOM = 64


class Alone:
    """One process: everything takes effect at once."""

    def __init__(self, state: _core.FlexMatch):
        self._state = state

    def update(self, idxes: torch.Tensor, selected_mask: torch.Tensor, pseudo_labels: torch.Tensor) -> None:
        """One step."""
        self._state.update(idxes, selected_mask, pseudo_labels)

    def check(self) -> None:
        """Raise if labels cannot be exchanged any more, or not in this process."""

    def complete(self) -> None:
        """Finish the exchange that is under way, if there is one."""

    def settle(self) -> None:
        """Apply all steps so far to the labels."""

    def class_counts(self) -> torch.Tensor:
        """Counts over all samples."""
        return self._state.counts()

    def synchronize(self) -> None:
        """Share outside writes with all ranks."""


class _Ranks(Alone):
    """What both layouts share. After a failed exchange every further one fails, too: the ranks may have
    diverged."""

    def __init__(self, state: _core.FlexMatch, group: dist.ProcessGroup):
        super().__init__(state)
        self._group = group
        self._size = dist.get_world_size(group)
        #: Waits for the pending exchange and returns its result.
        self._pending: Callable[[], torch.Tensor] | None = None
        self._broken: str | None = None
        self._process = os.getpid()

    def _fail(self, error: RuntimeError) -> RuntimeError:
        self._broken = self._broken or str(error)
        return RuntimeError(f"{CLASS}: the exchange between the ranks failed: {self._broken}")

    def _forked(self) -> bool:
        """Whether this is a copy in a forked process, such as a worker: it has no group and no thread."""
        return os.getpid() != self._process

    def check(self) -> None:
        if self._broken is not None:
            raise self._fail(RuntimeError(self._broken))
        if self._forked():
            raise RuntimeError(
                f"{CLASS}: update, load_state_dict and synchronize exchange labels with the other ranks, "
                "which a process forked from a rank cannot do"
            )

    def _run(self, collective: Any, *tensors: torch.Tensor) -> dist.Work:
        self.check()
        try:
            return collective(*tensors, group=self._group, async_op=True)
        except RuntimeError as error:
            raise self._fail(error) from error

    def _wait(self, work: dist.Work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._fail(error) from error

    def _take(self) -> torch.Tensor | None:
        """The result of the pending exchange, or ``None`` if there is none. If the wait is interrupted, the
        exchange stays pending. One that was pending when this process was forked never ends here."""
        if self._broken is None and self._forked():
            return None
        self.check()
        if self._pending is None:
            return None
        brought = self._pending()
        self._pending = None
        return brought

    def _gather(self, sent: torch.Tensor) -> torch.Tensor:
        """``sent`` of every rank, (ranks, n)."""
        received = sent.new_empty(self._size * sent.numel())
        self._wait(self._run(dist.all_gather_into_tensor, received, sent))
        return received.view(self._size, -1)


class Replicated(_Ranks):
    """Every rank holds all labels.

    A rank sends ``n, w_1 .. w_n`` with one word for each selected sample, in a buffer of a size that all
    agree on. If some rank has more, all ranks see it from the ``n`` and exchange the rest; from then on
    the buffer has that size. The words are applied in rank order, as one process would apply the
    concatenated batch.

    A background thread does this: a rank that reads the state also waits for a second exchange, in which the
    others must take part whatever they are waiting for themselves.
    """

    def __init__(self, state: _core.FlexMatch, group: dist.ProcessGroup, words: int):
        super().__init__(state, group)
        self._word = torch.int32 if words < 2**31 else torch.int64
        self._room = ROOM
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tllib_rs_flexmatch")

    def update(self, idxes: torch.Tensor, selected_mask: torch.Tensor, pseudo_labels: torch.Tensor) -> None:
        self.check()
        words = self._state.pack(idxes, selected_mask, pseudo_labels).to(self._word)
        self.complete()
        self._pending = self._thread.submit(self._exchange, words).result
        if self._state.is_shared():
            # A holder of net_outputs may read it at any time, and may write to it only after this step.
            self.complete()

    def _exchange(self, words: torch.Tensor) -> torch.Tensor:
        """The words of all ranks, in rank order. Runs in the thread."""
        head, rest = words[: self._room], words[self._room :]
        table = self._gather(_padded(head, self._room, words.numel()))
        counts, gathered = table[:, :1], table[:, 1:]
        most = int(counts.max())
        if most > self._room:
            more = self._gather(_padded(rest, most - self._room, rest.numel()))
            gathered = torch.cat([gathered, more[:, 1:]], dim=1)
            self._room = -(-most // ROOM) * ROOM
        return gathered[torch.arange(gathered.shape[1]) < counts]

    def complete(self) -> None:
        words = self._take()
        if words is not None:
            self._state.apply(words)

    settle = complete

    def class_counts(self) -> torch.Tensor:
        self.complete()
        return self._state.counts()

    def synchronize(self) -> None:
        counts = self._gather(self.class_counts().cpu())
        others = (counts != counts[0]).any(dim=1).nonzero().flatten().tolist()
        if others:
            raise RuntimeError(
                f"{CLASS}: net_outputs differs between ranks: the counts of rank 0 are not those of {others}"
            )


def _padded(words: torch.Tensor, room: int, count: int) -> torch.Tensor:
    """``count``, the words, and zeros."""
    padded = words.new_zeros(room + 1)
    padded[0] = count
    padded[1 : 1 + words.numel()] = words
    return padded


class Sharded(_Ranks):
    """Every rank holds the labels of its own samples; the counts are summed over the ranks."""

    def __init__(
        self,
        state: _core.FlexMatch,
        group: dist.ProcessGroup,
        totals: torch.Tensor,
        device: torch.device | str,
    ):
        super().__init__(state, group)
        self._totals = totals
        self._device = device
        state.set_totals(totals)

    def update(self, idxes: torch.Tensor, selected_mask: torch.Tensor, pseudo_labels: torch.Tensor) -> None:
        self.check()
        self.complete()
        self._state.update(idxes, selected_mask, pseudo_labels)
        self._start()

    def _start(self) -> None:
        counts = self._state.counts().cpu()
        work = self._run(dist.all_reduce, counts)

        def brought() -> torch.Tensor:
            self._wait(work)
            return counts

        self._pending = brought

    def complete(self) -> None:
        counts = self._take()
        if counts is not None:
            self._totals = counts
            self._state.set_totals(counts)

    def class_counts(self) -> torch.Tensor:
        self.complete()
        return self._totals.to(self._device, copy=True)

    def synchronize(self) -> None:
        self.complete()
        self._start()
        self.complete()


class Settings(Protocol):
    """What a module was constructed with."""

    threshold: float
    warmup: bool
    num_classes: int
    n_unlabeled_samples: int
    device: torch.device | str
    process_group: dist.ProcessGroup | None
    layout: str
    dtype: torch.dtype


def join(state: _core.FlexMatch, module: Settings) -> Alone:
    """The exchange for a module with these settings. Waits until all ranks have called it.

    ``ValueError`` on every rank where a setting differs between them, or for an unknown layout.
    """
    layout, classes, samples = module.layout, module.num_classes, module.n_unlabeled_samples
    if layout not in LAYOUTS:
        raise ValueError(f"{CLASS}: layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    if module.process_group is None:
        return Alone(state)
    words = samples * (classes + 1)
    if layout == "replicated" and words >= 2**63:
        raise ValueError(
            f"{CLASS}: layout 'replicated' needs n_unlabeled_samples * (num_classes + 1) below 2**63, "
            f"got {samples} * {classes + 1}"
        )
    settings = {
        "layout": layout,
        "num_classes": classes,
        "n_unlabeled_samples": samples,
        "dtype": module.dtype,
        "threshold": float(module.threshold),
        "warmup": bool(module.warmup),
    }
    group = _own_group(module.process_group)
    table = _Ranks(state, group)._gather(torch.tensor([_code(value) for value in settings.values()]))
    columns = {
        name: [_value(code, settings[name]) for code in codes]
        for name, codes in zip(settings, table.T.tolist(), strict=True)
    }
    _compare(columns)
    if layout == "replicated":
        return Replicated(state, group, words)
    totals = torch.zeros(classes + 1, dtype=torch.int64)
    totals[0] = sum(columns["n_unlabeled_samples"])
    return Sharded(state, group, totals, module.device)


def _compare(settings: Mapping[str, Sequence[Any]]) -> None:
    """The layout is compared first: sharded ranks may have different numbers of samples."""
    for name, values in settings.items():
        if name == "n_unlabeled_samples" and settings["layout"][0] == "sharded":
            continue
        for rank, value in enumerate(values):
            if value != values[0]:
                raise ValueError(
                    f"{CLASS}: the ranks differ in {name}: {values[0]} on rank 0, {value} on rank {rank}"
                )


_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)


def _code(value: Any) -> int:
    """A setting as 64 bits."""
    for kinds in (_DTYPES, LAYOUTS):
        if value in kinds:
            return kinds.index(value)
    return struct.unpack("<q", struct.pack("<d", value))[0] if isinstance(value, float) else int(value)


def _value(code: int, like: Any) -> Any:
    """The inverse of :func:`_code`."""
    for kinds in (_DTYPES, LAYOUTS):
        if like in kinds:
            return kinds[code]
    return struct.unpack("<d", struct.pack("<q", code))[0] if isinstance(like, float) else type(like)(code)


def _own_group(process_group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group of the same ranks with the same timeout."""
    check_group(CLASS, process_group)
    members = dist.get_process_group_ranks(process_group)
    return dist.new_group(
        members,
        timeout=_time_out(process_group),
        backend="gloo",
        # Processes that are not members do not take part.
        use_local_synchronization=len(members) < dist.get_world_size(),
    )


def _time_out(group: dist.ProcessGroup) -> datetime.timedelta | None:
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None:
            return options._timeout
    return None
