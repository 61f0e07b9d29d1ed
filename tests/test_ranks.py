"""The helper that the distributed tests run on."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Died, RankError, run_ranks


def _sum(rank, offset):
    x = torch.tensor([rank + offset])
    dist.all_reduce(x)
    return x


def _raise(rank):
    if rank == 1:
        raise KeyError("rank one's own")
    dist.barrier()


def _die(rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return rank


def _sleep(rank):
    time.sleep(60)


def test_results_come_in_rank_order():
    assert [int(x) for x in run_ranks(4, _sum, 10)] == [46] * 4


def test_an_error_of_a_rank_is_raised_with_its_traceback():
    with pytest.raises(RankError, match="rank 1 raised(.|\n)*rank one's own"):
        run_ranks(2, _raise, group_timeout=3)


def test_deaths():
    # With six ranks, one that dies at once would often be missing for some that are still connecting.
    assert run_ranks(6, _die, dying=[1]) == [0, Died(-signal.SIGKILL), 2, 3, 4, 5]
    with pytest.raises(RankError, match="rank 1 died, exit code -9"):
        run_ranks(2, _die)


def test_nothing_outlives_the_time_out():
    start = time.monotonic()
    with pytest.raises(RankError, match="did not end in time"):
        run_ranks(2, _sleep, timeout=3)
    assert time.monotonic() - start < 20
