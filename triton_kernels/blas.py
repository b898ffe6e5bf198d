"""Many small products in one call: the batched interface of the BLAS that PyTorch was built with.

PyTorch itself multiplies batches whose matrices lie one after the other. The blocks of a sparse
weight do not, and gathering them costs more than multiplying them. The library underneath, MKL in
the builds for x86, takes a list of addresses instead.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112
_SCALARS = {torch.float32: np.float32, torch.float64: np.float64}
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


def available(dtype: torch.dtype) -> bool:
    """Whether there is such a library for tensors of this dtype on the CPU."""
    return _routine(dtype) is not None


def multiply(
    left: Matrices,
    right: Matrices,
    out: Matrices,
    size: tuple[int, int, int],
    ends: Sequence[int],
    add: bool = False,
) -> None:
    """out[i] = left[i] @ right[i], or += where ``add``.

    size: (m, n, k) of each product, (m, k) @ (k, n). ends: where each turn ends in the lists; turns
    follow each other and no two of ``out`` within one overlap. What a turn finds is added to that
    of the ones before it. All tensors on the CPU, of one dtype that is ``available``. Runs on
    PyTorch's number of threads, and without the interpreter's lock. Nothing is checked here:
    matrices must lie inside their tensors.
    """
    routine = _routine(out.tensor.dtype)
    assert routine is not None
    # One group: a single number each. Eight bytes serve libraries with integers of four, too.
    numbers = np.array(
        [
            *(_TRANSPOSED if side.transposed else _AS_IT_IS for side in (left, right)),
            *size,
            *(side.stride for side in (left, right, out)),
        ],
        np.int64,
    )
    factors = np.array([1, add, 1], _SCALARS[out.tensor.dtype])
    addresses = [
        side.tensor.data_ptr() + side.starts * side.tensor.element_size()
        for side in (left, right, out)
    ]
    number, factor = (_cells(array) for array in (numbers, factors))
    lists = [array.ctypes.data for array in addresses]
    counts = np.diff(ends, prepend=0)
    at = 0
    for turn, (count, group) in enumerate(zip(counts.tolist(), _cells(counts), strict=True)):
        if count:
            a, b, c = (first + 8 * at for first in lists)
            beta = factor[1 if turn == 0 else 2]
            routine(
                _ROW_MAJOR,
                *number[:5],
                factor[0],
                *(a, number[5], b, number[6]),
                *(beta, c, number[7]),
                *(1, group),
            )
        at += count


def _cells(array: NDArray[Any]) -> list[int]:
    """The address of each element."""
    return [array.ctypes.data + i * array.itemsize for i in range(array.size)]


@cache
def _routine(dtype: torch.dtype) -> Callable[..., Any] | None:
    """The library's function; None where there is none."""
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
