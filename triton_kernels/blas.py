"""Many small products in one call: the batched interface of the BLAS that PyTorch was built with.

PyTorch itself multiplies batches whose matrices lie one after the other. The blocks of a sparse
weight do not, and gathering them costs more than multiplying them. The library underneath, MKL in
the builds for x86, takes a list of addresses instead.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112
_NAMES = {torch.float32: "cblas_sgemm_batch", torch.float64: "cblas_dgemm_batch"}
# Where PyTorch's wheels keep it.
_FILES = {"linux": "libtorch_cpu.so", "win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}


class Matrices(NamedTuple):
    """Equally large row-major matrices inside one tensor.

    starts: int64 (n,), where each begins, in elements from the tensor's first; stride: elements
    from one row to the next; transposed: whether the product takes their transposes.
    """

    tensor: Tensor
    starts: NDArray[np.int64]
    stride: int
    transposed: bool = False

    def of(self, part: NDArray[np.int64]) -> Matrices:
        return self._replace(starts=self.starts[part])


def available(dtype: torch.dtype) -> bool:
    """Whether there is such a library for tensors of this dtype on the CPU."""
    return _routine(dtype) is not None


def multiply(
    left: Matrices, right: Matrices, out: Matrices, size: tuple[int, int, int], add: bool
) -> None:
    """out[i] = left[i] @ right[i], or += where ``add``; no two of ``out`` overlap.

    size: (m, n, k) of each product, (m, k) @ (k, n). All on the CPU, of one dtype that is
    ``available``. Runs on PyTorch's number of threads, and without the interpreter's lock.
    Nothing is checked here: matrices must lie inside their tensors.
    """
    count = out.starts.size
    routine = _routine(out.tensor.dtype)
    assert routine is not None
    if not count:
        return
    # One group: a single number each. Eight bytes serve libraries with integers of four, too.
    m, n, k = (np.array([s], np.int64) for s in size)
    scalar = np.float32 if out.tensor.dtype == torch.float32 else np.float64
    transposes = [
        np.array([_TRANSPOSED if side.transposed else _AS_IT_IS], np.int64)
        for side in (left, right)
    ]
    strides = [np.array([side.stride], np.int64) for side in (left, right, out)]
    addresses = [_addresses(side) for side in (left, right, out)]
    alpha, beta = np.ones(1, scalar), np.full(1, add, scalar)
    arrays = (
        *transposes,
        *(m, n, k, alpha),
        *(addresses[0], strides[0], addresses[1], strides[1]),
        *(beta, addresses[2], strides[2]),
    )
    group = np.array([count], np.int64)
    routine(_ROW_MAJOR, *(a.ctypes.data for a in arrays), 1, group.ctypes.data)


def _addresses(side: Matrices) -> NDArray[np.int64]:
    return side.tensor.data_ptr() + side.starts * side.tensor.element_size()


@cache
def _routine(dtype: torch.dtype) -> Callable[..., Any] | None:
    """The library's function; None where there is none, or where it fails a small product."""
    if sys.byteorder != "little" or dtype not in _NAMES:
        return None
    path = Path(torch.__file__).parent / "lib" / _FILES.get(sys.platform, "")
    try:
        routine: Any = getattr(ctypes.CDLL(str(path)), _NAMES[dtype])
    except (OSError, AttributeError):
        return None
    pointers = [ctypes.c_void_p] * 13
    routine.argtypes = [ctypes.c_int, *pointers, ctypes.c_int, ctypes.c_void_p]
    routine.restype = None
    return routine  # type: ignore[no-any-return]
