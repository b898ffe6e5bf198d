"""Threads for compiled kernels that run without the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any

# A process that was forked does not have the threads of its parent's OpenMP, which waits for them.
_forked = False


def run(
    kernel: Callable[..., None], arguments: Sequence[Any], parts: Sequence[tuple[int, int]]
) -> None:
    """``kernel(*arguments, first, last)`` for every part, on as many threads: PyTorch's own where
    they can be had. kernel: a function that numba compiled. Raises if a part does."""
    if len(parts) == 1:
        kernel(*arguments, *parts[0])
    elif parts:
        (_run_in_pool if _forked else _many())(kernel, arguments, parts)


@cache
def _many() -> Callable[..., None]:
    # Not at the top: numba takes a second to import.
    from triton_kernels import openmp_numba

    return openmp_numba.run if openmp_numba.available() else _run_in_pool


def _run_in_pool(
    kernel: Callable[..., None], arguments: Sequence[Any], parts: Sequence[tuple[int, int]]
) -> None:
    """The first part here, each of the others on a thread of its own."""
    others = [_pool().submit(kernel, *arguments, *part) for part in parts[1:]]
    try:
        kernel(*arguments, *parts[0])
    finally:
        wait(others)
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "sparsegrow")


def _after_fork() -> None:
    global _forked
    _forked = True
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
