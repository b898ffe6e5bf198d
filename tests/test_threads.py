"""Compiled kernels on several threads."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch

numba = pytest.importorskip("numba")

from triton_kernels import openmp_numba, threads  # noqa: E402

WAYS = {"openmp": openmp_numba.run, "pool": threads._run_in_pool}
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="OpenMP of Linux alone")


@numba.njit(nogil=True)
def add(out, scales, first, last):  # type: ignore[no-untyped-def]
    by, (one, two) = scales
    for i in range(first, last):
        out[i] += by * i + one - two


@numba.njit(nogil=True)
def fail(out, first, last):  # type: ignore[no-untyped-def]
    for i in range(first, last):
        if i == 3:
            raise ValueError
        out[i] = 1


@pytest.fixture(params=[pytest.param("openmp", marks=linux), "pool"])
def way(request: pytest.FixtureRequest) -> Callable[..., None]:
    return WAYS[request.param]


@linux
def test_the_threads_are_those_of_pytorch() -> None:
    assert torch.backends.openmp.is_available()
    assert openmp_numba.available()
    assert threads._many() is openmp_numba.run
    out, tensor, count = np.zeros(9), torch.zeros(1 << 20), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        openmp_numba.run(add, [out, (1.0, (0, 0))], [(0, 3), (3, 9)])
        tensor.add_(1)
        before = set(os.listdir("/proc/self/task"))
        for _ in range(5):
            openmp_numba.run(add, [out, (1.0, (0, 0))], [(0, 3), (3, 9)])
            tensor.add_(1)
        assert set(os.listdir("/proc/self/task")) <= before  # no thread ended and came anew
    finally:
        torch.set_num_threads(count)


@pytest.mark.parametrize("count", [1, 2, 3, 64])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_part_is_done_once(way: Callable[..., None], count: int, dtype: type) -> None:
    ends = [10 * i // count * 13 for i in range(count + 1)]
    for _ in range(20):
        out = np.zeros(130, dtype)
        way(add, [out, (2.0, (5, 4))], list(pairwise(ends)))
        np.testing.assert_array_equal(out, 2 * np.arange(130) + 1)


def test_a_part_that_fails_fails_all(way: Callable[..., None]) -> None:
    out = np.zeros(6)
    with pytest.raises((RuntimeError, ValueError)):
        way(fail, [out], [(0, 2), (2, 4), (4, 6)])
    np.testing.assert_array_equal(out, [1, 1, 1, 0, 1, 1])


def test_several_callers_at_once(way: Callable[..., None]) -> None:
    """As autograd's and a loader's threads may be."""
    outs = [np.zeros(1000) for _ in range(4)]

    def call(out: np.ndarray) -> None:
        for _ in range(50):
            way(add, [out, (1.0, (0, 0))], [(0, 300), (300, 600), (600, 1000)])

    callers = [threading.Thread(target=call, args=(out,)) for out in outs]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for out in outs:
        np.testing.assert_array_equal(out, 50.0 * np.arange(1000))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_after_a_fork() -> None:
    """Whose child has none of its parent's threads."""
    out, parts = np.zeros(10), [(0, 5), (5, 10)]
    threads.run(add, [out, (1.0, (0, 0))], parts)
    child = os.fork()
    if child == 0:
        status = 1
        signal.alarm(60)  # rather than wait for what never comes
        try:
            mine = np.zeros(10)
            threads.run(add, [mine, (1.0, (0, 0))], parts)
            status = int(not np.array_equal(mine, np.arange(10.0)))
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
