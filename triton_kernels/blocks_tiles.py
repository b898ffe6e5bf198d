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
# Of the activations of narrow blocks, about so much is copied at a time.
PIECE_BYTES = 8 << 20
# Columns that are read fewer times than this are not worth a copy.
_READ = 2


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
    out: Tensor | None = None,
) -> Tensor:
    """dy^T x at the alive blocks alone: (capacity, bh, bw), free slots zero; or -> ``out``,
    contiguous and of what is computed in, whose free slots hold anything. What is multiplied is
    copied some rows at a time, since rows far apart share their places in the cache. Narrow blocks
    would copy the same again and again: for them, all of x, up to ``PIECE_BYTES``, at once.
    """
    # Not at the top: numba takes a second to import.
    from triton_kernels.blocks_gradient_numba import ROWS, gradient
    from triton_kernels.registers import gradient_tile, narrow

    bh, bw = block
    blocks = blocks_of(row_offsets, cols, slots)
    batch, alive = x.shape[0], blocks.slots.size
    # Every alive block is written whole; only free slots need zeros.
    make = x.new_empty if capacity == alive and batch else x.new_zeros
    grad = make(capacity, bh, bw, dtype=_WIDE[x.dtype]) if out is None else out
    if not batch:
        return _cast(grad.zero_(), x.dtype)
    tile = gradient_tile(bw, grad.itemsize)
    strips = narrow(bw, grad.itemsize) and alive * bw >= _READ * x.shape[1]
    cuts = _shares(alive, alive * batch * bh * bw, torch.get_num_threads())
    rooms = _rooms(grad, cuts, ROWS * (bh + 16 * tile[1]))
    kernel, numbers, done = gradient(*tile, strips), _numbers(grad), 0
    for some, other in _pieces(x, dy) if strips else [(x, dy)]:
        copied = _strips(some, bw) if strips else _numbers(some)
        shape = (some.shape[0], x.shape[1], dy.shape[1], bh, bw, done)
        _run(kernel, (copied, _numbers(other), *blocks, numbers, rooms, cuts, shape), cuts)
        done += some.shape[0]
        del copied  # before the next one is made
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
    depth, width = values.shape[:0:-1] if transposed else values.shape[1:]
    batch, k = x.shape
    out = x.new_empty(batch, n, dtype=_WIDE[x.dtype])
    kind = (k, depth, width, out.itemsize)
    work = memory.get(order, ("work", *kind), lambda: _Work(order, *kind))
    plan = work.plan(batch, torch.get_num_threads())
    rooms = _rooms(out, plan.cuts, plan.room(k) + transposed * work.longest * depth * width)
    start = work.start
    if bias is not None:
        start = start.copy()
        start[:n] = _numbers(bias)
    index = (work.offsets, work.minor, work.slots)
    tensors = (_numbers(x), _numbers(values), transposed, *index, start, _numbers(out))
    _run(plan.kernel, (*tensors, rooms, plan.cuts, (batch, k, n, depth, width)), plan.cuts)
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


class _Plan(NamedTuple):
    """How a product is shared, and by what kernel it is computed in tiles of (rows, 16 * vectors).

    cuts: the shares in the work, as ``blocks_numba.product`` takes them; packed_rows: those of x
    that each of them packs at a time, or none.
    """

    cuts: Index
    kernel: Callable[..., None]
    tile: tuple[int, int]
    packed_rows: int

    def room(self, n: int) -> int:
        """Numbers that each share needs room for, of n columns, less the weights that it turns."""
        return 16 * self.tile[0] * self.tile[1] + self.packed_rows * n


class _Work:
    """An order of the blocks, of (depth, width), as ``product`` takes it for n columns.

    longest: the most blocks of a row (or column); start: a bias of nothing; plan: for a batch and
    so many threads, of which those of the last few batches are kept.
    """

    def __init__(
        self, order: tuple[Tensor, Tensor, Tensor], n: int, depth: int, width: int, itemsize: int
    ) -> None:
        blocks = blocks_of(*order)
        self.minor, self.slots = blocks.minor, blocks.slots
        self.offsets = order[0].numpy().astype(np.int64)
        counts = np.diff(self.offsets)
        self.longest = int(counts.max(initial=0))
        self.start = np.zeros(counts.size * width, f"f{itemsize}")
        self._width, self._itemsize = width, itemsize
        # How often a column of the activations is read, by 16 columns of the outputs each time.
        self._read = self.slots.size * depth * width / 16 / max(1, n)
        # What is written where no block is costs about one row of a block.
        self._costs = (counts * depth + 1) * width
        self.plan = lru_cache(maxsize=8)(self._plan)

    def _plan(self, batch: int, count: int) -> _Plan:
        # Not at the top: numba takes a second to import.
        from triton_kernels.blocks_numba import ROWS, product
        from triton_kernels.registers import narrow, product_tile

        rows = np.diff(np.arange(0, batch, ROWS), append=batch)
        ends = np.outer(rows, self._costs).cumsum()
        total = int(ends[-1]) if ends.size else 0
        shares = _shares(total, total, count)
        cuts = np.array([0, *np.searchsorted(ends, shares[1:-1], "right"), ends.size], np.int64)
        # Each share packs what it reads: many shares of the same rows would pack the same, and
        # take memory for it; and what is hardly read is not worth it.
        most = rows.size * min(2, self._read / _READ)
        packed = narrow(self._width, self._itemsize) and batch >= 16 and len(shares) - 1 <= most
        tile = (16, 1) if packed else product_tile(self._width, self._itemsize)
        return _Plan(cuts, product(*tile, packed), tile, packed * ROWS)


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
    return _cast(tensor.detach(), _WIDE[tensor.dtype]).contiguous().numpy().reshape(-1)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which takes its time even where it does nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
