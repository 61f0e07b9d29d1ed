"""torch's number of threads, for a while, and the processors that there are."""

import os
from contextlib import contextmanager

import torch


@contextmanager
def threads_of(count):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def processors():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
