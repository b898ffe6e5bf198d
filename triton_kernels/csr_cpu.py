"""Unstructured products on the CPU, the same functions as ``csr``: numba where it is installed.

Activations are copied with features first, in tiles of the batch that stay in a core's cache, of
which each nonzero reads one row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from triton_kernels import threads
from triton_kernels.waves import Memory

# Numbers in a tile of the batch, in vectors of 16: no more than the batch fills.
_VECTORS = (1, 2, 4)
# Fewer products than this are not worth a second thread.
_SHARED = 1 << 20


@cache
def _numba() -> bool:
    return find_spec("numba") is not None


def available(x: Tensor) -> bool:
    return x.device.type == "cpu" and _numba()


_kept = Memory()


def product(
    x: Tensor, values: Tensor, offsets: Tensor, index: Tensor, slots: Tensor, width: int
) -> Tensor:
    """x: (batch, n) -> (batch, width) = x M^T, where M: (width, n) is given by its compressed rows
    and ``values[slots]``. With the transposed order of a weight, its input gradient."""
    own = _tiles(x)
    weights = values.view(-1).index_select(0, slots).to(own.dtype)
    sums = own.new_empty(len(own), width, own.shape[2])
    multiply, _ = _kernels(own)
    _share(multiply, offsets, len(x), (own, weights), (offsets, index, sums))
    return sums.transpose(1, 2).flatten(0, 1)[: len(x)].to(x.dtype)


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
    right, left = _tiles(x), _tiles(dy)
    found = right.new_empty(cols.numel())
    _, sample = _kernels(right)
    _share(sample, row_offsets, len(x), (right, left), (row_offsets, cols, found))
    grad = x.new_zeros(capacity, 1, 1)
    grad.view(-1).index_copy_(0, slots.long(), found.to(x.dtype))
    return grad


def _kernels(tiled: Tensor) -> tuple[Callable[..., None], Callable[..., None]]:
    # Not at the top: numba takes a second to import.
    from triton_kernels.csr_numba import kernels

    return kernels(tiled.shape[2] // 16)


def _tiles(x: Tensor) -> Tensor:
    """Kept as long as x lives: the gradient of the weight needs those of the other two products."""
    return _kept.get((x,), "tiles", lambda: tiles(x))


def tiles(x: Tensor) -> Tensor:
    """(batch, n) -> (tiles, n, batch in a tile), zero-padded, in single precision at least."""
    batch, n = x.shape
    tile = 16 * next((v for v in _VECTORS if 16 * v >= batch), _VECTORS[-1])
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    whole, rest = divmod(batch, tile)
    out = torch.empty(whole + (rest > 0), n, tile, dtype=dtype)
    out[:whole] = x[: whole * tile].unflatten(0, (whole, tile)).transpose(1, 2)
    if rest:
        out[whole, :, :rest] = x[whole * tile :].T
        out[whole, :, rest:] = 0
    return out


def _share(
    kernel: Callable[..., None],
    offsets: Tensor,
    batch: int,
    tensors: tuple[Tensor, ...],
    rest: tuple[Tensor, ...],
) -> None:
    """Run a kernel on as many threads as PyTorch has, each with as many nonzeros. Rows are whole,
    so that the result does not depend on how many there are."""
    arrays = [t.numpy() for t in (*tensors, *rest)]
    ends = offsets.numpy()
    rows, nonzeros = len(ends) - 1, int(ends[-1])
    count = torch.get_num_threads() if nonzeros * batch >= _SHARED else 1
    bounds = np.searchsorted(ends, np.arange(1, count) * nonzeros // count)
    cuts = [0, *bounds.tolist(), rows]
    parts = [(a, b) for a, b in pairwise(cuts) if a < b]
    threads.run(kernel, arrays, parts)
