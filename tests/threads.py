"""torch's number of threads, for a while."""

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
