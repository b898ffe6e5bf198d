"""Threads for compiled kernels that run without the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any


def run(
    kernel: Callable[..., None], arguments: Sequence[Any], parts: Sequence[tuple[int, int]]
) -> None:
    """``kernel(*arguments, first, last)`` for every part: the first one here, each of the others on
    a thread of its own. Raises what a part raises."""
    others = [_pool().submit(kernel, *arguments, *part) for part in parts[1:]]
    if parts:
        kernel(*arguments, *parts[0])
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "sparsegrow")


if hasattr(os, "register_at_fork"):
    # Threads do not survive a fork.
    os.register_at_fork(after_in_child=_pool.cache_clear)
