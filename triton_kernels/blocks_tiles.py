"""Block-sparse linear products on the CPU that copy little of the activations: loops compiled by
numba (see ``blocks_numba``) run through the alive blocks of a row of the weight while its outputs
stay in registers.

Blocks whose sides are multiples of 16. Every sum is made by one thread in a fixed order, so that
the result does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

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
# More of the activations are not copied at a time.
PIECE_BYTES = 8 << 20


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
    copied some rows at a time, since rows far apart share their places in the cache; for narrow
    blocks, which would copy the same again and again, all of x, up to ``PIECE_BYTES``, at once."""
    # Not at the top: numba takes a second to import.
    from triton_kernels.blocks_gradient_numba import ROWS, gradient
    from triton_kernels.registers import gradient_tile, narrow

    bh, bw = block
    blocks = blocks_of(row_offsets, cols, slots)
    # Every alive block is written whole; only free slots need zeros.
    whole = capacity == cols.numel() and len(x) > 0
    make = x.new_empty if whole else x.new_zeros
    grad = make(capacity, bh, bw, dtype=_WIDE[x.dtype])
    tile = gradient_tile(bw, grad.itemsize)
    alive = cols.numel()
    cuts = _shares(alive, alive * len(x) * bh * bw, torch.get_num_threads())
    rooms = _rooms(grad, cuts, ROWS * (bh + 16 * tile[1]))
    strips = narrow(bw, grad.itemsize)
    kernel, done = gradient(*tile, strips), 0
    for some, other in _pieces(x, dy) if strips else [(x, dy)]:
        shape = (len(some), x.shape[1], dy.shape[1], bh, bw, done)
        numbers = _strips(some, bw) if strips else _numbers(some)
        _run(kernel, (numbers, _numbers(other), *blocks, _numbers(grad), rooms, cuts, shape), cuts)
        done += len(some)
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
    from triton_kernels.blocks_numba import ROWS, product
    from triton_kernels.registers import narrow, product_tile

    depth, width = values.shape[:0:-1] if transposed else values.shape[1:]
    work = memory.get(order, ("work", depth, width), lambda: _Work(order, depth, width))
    out = x.new_empty(len(x), n, dtype=_WIDE[x.dtype])
    start = out.new_zeros((len(work.offsets) - 1) * width)
    if bias is not None:
        start[:n] = bias
    cuts = work.cuts(len(x), torch.get_num_threads())
    # Each share packs what it reads, which does not pay where many of them read the same.
    few = len(cuts) - 1 <= 4 * -(-len(x) // ROWS)
    packed = narrow(width, out.itemsize) and len(x) >= 16 and few
    tile = (16, 1) if packed else product_tile(width, out.itemsize)
    turned = work.longest * depth * width if transposed else 0
    rooms = _rooms(out, cuts, 16 * tile[0] * tile[1] + packed * ROWS * x.shape[1] + turned)
    shape = (len(x), x.shape[1], n, depth, width)
    index = (work.offsets, work.minor, work.slots)
    tensors = (_numbers(x), _numbers(values), transposed, *index, _numbers(start), _numbers(out))
    _run(product(*tile, packed), (*tensors, rooms, cuts, shape), cuts)
    return _cast(out, x.dtype)


def _pieces(x: Tensor, dy: Tensor) -> list[tuple[Tensor, ...]]:
    """Rows of both, of which no more than ``PIECE_BYTES`` of x are copied at a time."""
    rows = max(64, PIECE_BYTES // (4 * x.shape[1]))
    return [(x, dy)] if len(x) <= rows else list(zip(x.split(rows), dy.split(rows), strict=True))


def _strips(x: Tensor, width: int) -> NDArray[Any]:
    """x: (batch, n) -> (strips of 16 columns, batch, 16), flat: of whole blocks of ``width``
    columns, zero beyond those of x."""
    batch, n = x.shape
    whole, left = divmod(n, 16)
    out = x.new_empty(-(-n // width) * width // 16, batch, 16, dtype=_WIDE[x.dtype])
    x = x.detach()
    out[:whole] = x[:, : n - left].unflatten(1, (whole, 16)).transpose(0, 1)
    out[whole:] = 0
    if left:
        out[whole, :, :left] = x[:, n - left :]
    return out.view(-1).numpy()  # type: ignore[no-any-return]


class _Work:
    """An order of the blocks as ``product`` takes it.

    longest: the most blocks of a row (or column); cuts: the shares of so many threads in the work
    for a batch, of which those of the last few batches are kept.
    """

    def __init__(self, order: tuple[Tensor, Tensor, Tensor], depth: int, width: int) -> None:
        blocks = blocks_of(*order)
        self.minor, self.slots = blocks.minor, blocks.slots
        self.offsets = order[0].numpy().astype(np.int64)
        counts = np.diff(self.offsets)
        self.longest = int(counts.max(initial=0))
        # What is written where no block is costs about one row of a block.
        self._costs = (counts * depth + 1) * width
        self.cuts = lru_cache(maxsize=8)(self._cuts)

    def _cuts(self, batch: int, count: int) -> Index:
        from triton_kernels.blocks_numba import ROWS

        rows = np.diff(np.arange(0, batch, ROWS), append=batch)
        ends = np.outer(rows, self._costs).cumsum()
        total = int(ends[-1]) if ends.size else 0
        inner = np.searchsorted(ends, _shares(total, total, count)[1:-1], "right")
        return np.array([0, *inner, ends.size], np.int64)


def _shares(size: int, work: int, count: int) -> Index:
    """Where the shares of so many threads begin and end in [0, size), or that of one alone."""
    parts = count if work >= _SHARED else 1
    return np.arange(parts + 1) * size // parts


def _rooms(like: Tensor, cuts: Index, numbers: int) -> NDArray[Any]:
    """For each share, memory of so many numbers that begins with a line of the cache."""
    return like.new_empty(len(cuts) - 1, -(-numbers // 16) * 16).numpy()


def _run(kernel: Callable[..., None], arguments: tuple[Any, ...], cuts: Index) -> None:
    threads.run(kernel, arguments, [(i, i + 1) for i in range(len(cuts) - 1)])


def _numbers(tensor: Tensor) -> NDArray[Any]:
    """All of them, flat, in what they are computed in."""
    wide = _cast(tensor.detach(), _WIDE[tensor.dtype]).contiguous()
    return wide.view(-1).numpy()  # type: ignore[no-any-return]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which takes its time even where it does nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
