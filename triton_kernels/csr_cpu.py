"""Unstructured products on the CPU, the same functions as ``csr``: numba where it is installed."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from triton_kernels import threads

# Numbers of the batch at a time, in vectors of 16: no more than the batch fills, and so few that
# the features of all of them stay in a core's cache, of which they may take so many bytes.
_VECTORS = (1, 2, 4)
_CACHED = 1 << 19
# Fewer products than this are not worth a second thread.
_SHARED = 1 << 20


@cache
def _numba() -> bool:
    return find_spec("numba") is not None


def available(x: Tensor) -> bool:
    return x.device.type == "cpu" and _numba()


def product(
    x: Tensor, values: Tensor, offsets: Tensor, index: Tensor, slots: Tensor, width: int
) -> Tensor:
    """x: (batch, n) -> (batch, width) = x M^T, where M: (width, n) is given by its compressed rows
    and ``values[slots]``. With the transposed order of a weight, its input gradient."""
    dtype, x = x.dtype, _wide(x)
    y = x.new_empty(len(x), width)
    _walk(x, None, values, (offsets, index, slots), y, None)
    return y.to(dtype)


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    capacity: int,
    block: tuple[int, int] = (1, 1),
) -> Tensor:
    """dy^T x at the alive entries alone: (capacity, 1, 1), free slots zero."""
    dtype, x = x.dtype, _wide(x)
    grad = _gradient(x, slots, capacity)
    _walk(x, _wide(dy), None, (row_offsets, cols, slots), None, grad)
    return grad.to(dtype)


def gradients(
    x: Tensor, dy: Tensor, values: Tensor, col_offsets: Tensor, rows_t: Tensor, slots_t: Tensor
) -> tuple[Tensor, Tensor]:
    """That of x, (batch, n_in), and that of the values, (capacity, 1, 1): both products read the
    same of dy, which here happens once, and takes most of the time of either."""
    dtype, x = x.dtype, _wide(x)
    dx, grad = torch.empty_like(x), _gradient(x, slots_t, len(values))
    _walk(_wide(dy), x, values, (col_offsets, rows_t, slots_t), dx, grad)
    return dx.to(dtype), grad.to(dtype)


def _wide(x: Tensor) -> Tensor:
    """In single precision at least."""
    return (x if x.dtype == torch.float64 else x.float()).detach().contiguous()


def _gradient(x: Tensor, slots: Tensor, capacity: int) -> Tensor:
    return (x.new_empty if slots.numel() == capacity else x.new_zeros)(capacity, 1, 1)


def _walk(
    x: Tensor,
    own: Tensor | None,
    values: Tensor | None,
    order: tuple[Tensor, Tensor, Tensor],
    y: Tensor | None,
    grad: Tensor | None,
) -> None:
    """The pass over the nonzeros that fills y, or grad, or both: see ``csr_numba``. On as many
    threads as PyTorch has, each with as many nonzeros. Rows are whole, so that the result does not
    depend on how many there are; each thread copies all of x for itself, a tile at a time."""
    # Not at the top: numba takes a second to import.
    from triton_kernels.csr_numba import walk
    from triton_kernels.vectors import WIDTH

    line = WIDTH * x.shape[1] * x.element_size()
    fitting = [v for v in _VECTORS if v * line <= _CACHED] or _VECTORS[:1]
    vectors = next((v for v in fitting if WIDTH * v >= len(x)), fitting[-1])
    ends = order[0].numpy()
    rows, nonzeros = len(ends) - 1, int(ends[-1])
    count = torch.get_num_threads() if nonzeros * len(x) >= _SHARED else 1
    cuts = np.searchsorted(ends, np.arange(1, count) * nonzeros // count)
    # In whole vectors, so that two threads never write to the same line of the cache.
    cuts = WIDTH * np.round(cuts / WIDTH).astype(int)
    parts = [(a, b) for a, b in pairwise([0, *cuts.tolist(), rows]) if a < b]

    none = x.new_empty(0, 0)
    weights = none if values is None else values.detach().to(x.dtype)
    tensors = (
        *(x, none if own is None else own, weights.reshape(-1), *order),
        *(none if y is None else y, (none if grad is None else grad).view(-1)),
    )
    arrays = [tensor.numpy() for tensor in tensors]
    threads.run(walk(vectors), [*arrays, y is not None, grad is not None], parts)
