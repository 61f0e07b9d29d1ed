"""Runs a function on several gloo ranks, each a process of its own on this machine.

    def sums(rank, step):
        x = torch.tensor([rank + step])
        dist.all_reduce(x)
        return x.item()

    assert run_ranks(4, sums, 10) == [46] * 4

The function must be defined at the top level of a module, so that the ranks can import it. It finds the
default process group ready on all ranks, and must not destroy it: the processes end when the last rank has
returned.
"""

import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Died:
    """The outcome of a rank that ended without a result: its exit code, the negative of a signal's number."""

    exit_code: int | None


class RankError(AssertionError):
    """A rank raised (its traceback is the message), died unexpectedly, or did not end in time."""


# The ranks are forked from one clean process that has imported torch but never run it, so that starting one
# takes no import, and does not depend on threads that a fork of the test's own process would lose.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch.distributed", "tests.ranks"])


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 300.0,
    group_timeout: float = 60.0,
    dying: Sequence[int] = (),
) -> list[Any]:
    """``function(rank, *arguments)`` on every rank; the results in the order of the ranks.

    Args:
        world_size: how many ranks.
        function: what each runs, defined at the top of a module. Its result must be picklable.
        arguments: picklable too.
        timeout: seconds after which all ranks are killed and :class:`RankError` is raised.
        group_timeout: the process group's own time-out in seconds, after which its operations raise.
        dying: the ranks that are expected to end without a result; theirs is :class:`Died`.

    Raises:
        RankError: see there.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        ranks = [
            _start(rank, world_size, store, group_timeout, function, arguments) for rank in range(world_size)
        ]
        try:
            return _collect(ranks, time.monotonic() + timeout, set(dying))
        finally:
            for process, connection in ranks:
                process.kill()
                process.join()
                connection.close()


def _start(rank: int, *arguments: Any) -> tuple[Any, Connection]:
    ours, its = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_rank, args=(its, rank, *arguments), daemon=True)
    process.start()
    its.close()  # so that a rank's death closes its pipe
    return process, ours


def _rank(
    connection: Connection,
    rank: int,
    world_size: int,
    store: str,
    group_timeout: float,
    function: Callable[..., Any],
    arguments: Sequence[Any],
) -> None:
    """In the child: ``(True, result)`` or ``(False, traceback)``."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        _connect(
            rank, world_size, dist.FileStore(store, world_size), datetime.timedelta(seconds=group_timeout)
        )
        outcome = True, function(rank, *arguments)
    except BaseException:
        outcome = False, traceback.format_exc()
    # By value: a tensor in shared memory would end with this process.
    connection.send_bytes(pickle.dumps(outcome))
    # If a rank exited now, those still working would see a closed connection, and their errors might be
    # reported before the one that explains them. The wait ends when the parent kills this rank or is gone.
    connection.poll(None)
    # Skips the interpreter's shutdown, which may wait for ranks that are gone.
    os._exit(0)


def _connect(rank: int, world_size: int, store: dist.Store, timeout: datetime.timedelta) -> None:
    # Ranks take their time to import what they run: the group's time-out counts from when all have done so.
    _meet("started", rank, world_size, store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    # The first rank that is connected to all others may be done, or dead, before another has heard from it.
    _meet("connected", rank, world_size, store)


def _meet(where: str, rank: int, world_size: int, store: dist.Store) -> None:
    store.set(f"{where}/{rank}", "")
    store.wait([f"{where}/{other}" for other in range(world_size)], datetime.timedelta(minutes=1))


def _collect(ranks: Sequence[tuple[Any, Connection]], deadline: float, dying: set[int]) -> list[Any]:
    results: dict[int, Any] = {}
    open_ = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    while open_:
        ready = wait(list(open_), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(open_.values())} did not end in time")
        for connection in ready:
            rank = open_.pop(connection)
            results[rank] = _outcome(rank, ranks[rank][0], connection, dying)
    return [results[rank] for rank in range(len(ranks))]


def _outcome(rank: int, process: Any, connection: Connection, dying: set[int]) -> Any:
    try:
        fine, value = pickle.loads(connection.recv_bytes())
    except EOFError:
        process.join()
        if rank not in dying:
            raise RankError(f"rank {rank} died, exit code {process.exitcode}") from None
        return Died(process.exitcode)
    if not fine:
        raise RankError(f"rank {rank} raised\n{value}")
    return value
