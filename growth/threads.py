"""Running on one thread what several would slow down, or round differently."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes on one CPU thread inside.

    Products and factorisations of tall, narrow matrices are faster so, a hundred times on a busy
    machine; and their last bits no longer depend on the number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
