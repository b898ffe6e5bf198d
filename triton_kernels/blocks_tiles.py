"""Block-sparse linear products on the CPU that keep no copy of activations: loops compiled by numba
(see ``blocks_numba``) run through the alive blocks of a row of the weight while its outputs stay in
registers.

Blocks whose sides are multiples of 16. Every sum is made by one thread in a fixed order, so that
the result does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triton_kernels import threads
from triton_kernels.waves import Index, blocks_of, memory

# What the products of each are computed in.
_WIDE = {
    torch.float64: torch.float64,
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float32),
}
# Fewer products than this are not worth a second thread.
_SHARED = 1 << 22


def available(x: Tensor, block: tuple[int, int]) -> bool:
    """For activations like ``x`` and a weight in such blocks, on this processor."""
    whole = all(side % 16 == 0 for side in block)
    return x.device.type == "cpu" and x.dtype in _WIDE and whole and _fused()


@cache
def _fused() -> bool:
    if find_spec("numba") is None:
        return False
    from triton_kernels.registers import fused

    return fused()


def forward(
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    n_out: int,
    bias: Tensor | None = None,
) -> Tensor:
    """x: (batch, n_in), bias: (n_out,) -> x W^T + bias: (batch, n_out)."""
    return _product(x, values, (row_offsets, cols, slots), n_out, bias, transposed=True)


def input_gradient(
    dy: Tensor, values: Tensor, col_offsets: Tensor, rows_t: Tensor, slots_t: Tensor, n_in: int
) -> Tensor:
    """dy: (batch, n_out) -> dy W: (batch, n_in), over the transposed order."""
    return _product(dy, values, (col_offsets, rows_t, slots_t), n_in, None, transposed=False)


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    capacity: int,
    block: tuple[int, int],
) -> Tensor:
    """dy^T x at the alive blocks alone: (capacity, bh, bw), free slots zero. What is multiplied is
    copied some rows at a time, since rows far apart share their places in the cache."""
    # Not at the top: numba takes a second to import.
    from triton_kernels.blocks_numba import GRADIENT_ROWS, gradient
    from triton_kernels.registers import gradient_tile

    bh, bw = block
    blocks = blocks_of(row_offsets, cols, slots)
    # Every alive block is written whole; only free slots need zeros.
    whole = capacity == cols.numel() and len(x) > 0
    grad = (torch.empty if whole else torch.zeros)(capacity, bh, bw, dtype=_WIDE[x.dtype])
    tile = gradient_tile(bw, grad.itemsize)
    cuts = _shares(cols.numel(), cols.numel() * len(x) * bh * bw)
    rooms = _rooms(grad, cuts, GRADIENT_ROWS * (bh + 16 * tile[1]))
    shape = (len(x), x.shape[1], dy.shape[1], bh, bw)
    tensors = (_numbers(x), _numbers(dy), *blocks, _numbers(grad))
    _run(gradient(*tile), (*tensors, rooms, cuts, shape), cuts)
    return _cast(grad, x.dtype)


def _product(
    x: Tensor,
    values: Tensor,
    order: tuple[Tensor, Tensor, Tensor],
    n: int,
    bias: Tensor | None,
    transposed: bool,
) -> Tensor:
    """(batch, k) times the blocks -> (batch, n)."""
    from triton_kernels.blocks_numba import product
    from triton_kernels.registers import product_tile

    depth, width = values.shape[:0:-1] if transposed else values.shape[1:]
    work = memory.get(
        order,
        (len(x), depth, width, torch.get_num_threads()),
        lambda: _Work.of(order, len(x), depth, width),
    )
    out = x.new_empty(len(x), n, dtype=_WIDE[x.dtype])
    start = out.new_zeros((len(work.offsets) - 1) * width)
    if bias is not None:
        start[:n] = bias
    tile = product_tile(width, out.itemsize)
    turned = work.longest * depth * width if transposed else 0
    rooms = _rooms(out, work.cuts, 16 * tile[0] * tile[1] + turned)
    shape = (len(x), x.shape[1], n, depth, width)
    index = (work.offsets, work.minor, work.slots)
    tensors = (_numbers(x), _numbers(values), transposed, *index, _numbers(start), _numbers(out))
    _run(product(*tile), (*tensors, rooms, work.cuts, shape), work.cuts)
    return _cast(out, x.dtype)


class _Work(NamedTuple):
    """An order of the blocks as ``product`` takes it, the most blocks of a row (or column), and the
    shares of the threads."""

    offsets: Index
    minor: Index
    slots: Index
    longest: int
    cuts: Index

    @classmethod
    def of(cls, order: tuple[Tensor, Tensor, Tensor], batch: int, depth: int, width: int) -> _Work:
        from triton_kernels.blocks_numba import ROWS

        blocks, offsets = blocks_of(*order), order[0].numpy().astype(np.int64)
        counts = np.diff(offsets)
        rows = np.diff(np.arange(0, batch, ROWS), append=batch)
        # What is written where no block is costs about one row of a block.
        ends = np.outer(rows, (counts * depth + 1) * width).cumsum()
        total = int(ends[-1]) if ends.size else 0
        inner = np.searchsorted(ends, _shares(total, total)[1:-1], "right")
        cuts = np.array([0, *inner, ends.size], np.int64)
        return cls(offsets, blocks.minor, blocks.slots, int(counts.max(initial=0)), cuts)


def _shares(count: int, work: int) -> Index:
    """Where the shares of PyTorch's threads begin and end in [0, count)."""
    parts = torch.get_num_threads() if work >= _SHARED else 1
    return np.arange(parts + 1) * count // parts


def _rooms(like: Tensor, cuts: Index, numbers: int) -> NDArray[Any]:
    """For each share, memory of so many numbers that begins with a line of the cache."""
    return like.new_empty(len(cuts) - 1, -(-numbers // 16) * 16).numpy()


def _run(kernel: Callable[..., None], arguments: tuple[Any, ...], cuts: Index) -> None:
    threads.run(kernel, arguments, [(i, i + 1) for i in range(len(cuts) - 1)])


def _numbers(tensor: Tensor) -> NDArray[Any]:
    """All of them, flat, in what they are computed in."""
    return _cast(tensor.detach(), _WIDE[tensor.dtype]).reshape(-1).numpy()  # type: ignore[no-any-return]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which takes its time even where it does nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
