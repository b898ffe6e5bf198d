"""Block-sparse linear products on the CPU: every alive block is one product of matrices, and many
of them are one call (see ``triton_kernels.blas`` and ``waves``).

Work and memory follow the alive blocks: beside the result there is a copy of some hundred rows of
the activations. Sums run in a fixed order on one number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from triton_kernels import blas
from triton_kernels.blas import Matrices
from triton_kernels.waves import Memory, Waves, add_products, blocks_of, waves_of

# Rows of a batch that are copied and multiplied at a time.
ROWS = 512

_kept = Memory()


def available(x: Tensor) -> bool:
    return x.device.type == "cpu" and blas.available(wide(x.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What half precision is computed in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def forward(
    x: Tensor, values: Tensor, row_offsets: Tensor, cols: Tensor, slots: Tensor, n_out: int
) -> Tensor:
    """x: (batch, n_in) -> x W^T: (batch, n_out)."""
    return _product(x, values, (row_offsets, cols, slots), n_out, transposed=True)


def input_gradient(
    dy: Tensor, values: Tensor, col_offsets: Tensor, rows_t: Tensor, slots_t: Tensor, n_in: int
) -> Tensor:
    """dy: (batch, n_out) -> dy W: (batch, n_in), over the transposed order."""
    return _product(dy, values, (col_offsets, rows_t, slots_t), n_in, transposed=False)


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    capacity: int,
    block: tuple[int, int],
) -> Tensor:
    """dy^T x at the alive blocks alone: (capacity, bh, bw), free slots zero."""
    bh, bw = block
    blocks = blocks_of(row_offsets, cols, slots)
    # Every alive block is written whole; only free slots need zeros.
    whole = capacity == cols.numel() and len(x) > 0
    grad = (torch.empty if whole else torch.zeros)(capacity, bh, bw, dtype=wide(x.dtype))
    for start, stop in _chunks(len(x)):
        left, right = _planes(dy, start, stop, bh), _planes(x, start, stop, bw)
        rows = stop - start
        blas.multiply(
            Matrices(left, blocks.major * (rows * bh), bh, transposed=True),
            Matrices(right, blocks.minor * (rows * bw), bw),
            Matrices(grad, blocks.slots * (bh * bw), bw),
            (bh, bw, rows),
            [cols.numel()],
            add=start > 0,
        )
    return grad.to(x.dtype)


def _product(
    x: Tensor, values: Tensor, order: tuple[Tensor, Tensor, Tensor], n: int, transposed: bool
) -> Tensor:
    """(batch, k) times the blocks -> (batch, n)."""
    bh, bw = values.shape[1:]
    width, depth = (bh, bw) if transposed else (bw, bh)
    blocks = blocks_of(*order)
    targets = order[0].numel() - 1
    turns = waves_of(order, "linear", lambda: (blocks.major, targets))
    weight = Matrices(values.to(wide(values.dtype)), blocks.slots * (bh * bw), bw, transposed)
    out = x.new_empty(len(x), n)
    for start, stop in _chunks(len(x)):
        rows = stop - start
        source = _planes(x, start, stop, depth)
        sums = _targets(source, targets, rows, width, turns)
        add_products(
            source,
            blocks.minor * (rows * depth),
            weight,
            sums,
            blocks.major * (rows * width),
            turns,
            (rows, depth, width),
        )
        _from_planes(sums, out[start:stop])
    return out


def _targets(like: Tensor, targets: int, rows: int, width: int, turns: Waves) -> Tensor:
    """Planes to be written, zero where no block does."""
    sums = like.new_empty(targets, rows, width)
    if turns.empty.size:
        sums[torch.from_numpy(turns.empty)] = 0
    return sums


def _chunks(rows: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, ROWS):
        yield start, min(start + ROWS, rows)


def _planes(x: Tensor, start: int, stop: int, width: int) -> Tensor:
    """Planes of some rows. Of a batch that is one piece they are kept as long as x lives: the
    gradient of the weight needs those of the forward product, and of the input's gradient."""
    if len(x) <= ROWS:
        return _kept.get((x,), width, lambda: planes(x, width))
    return planes(x[start:stop], width)


def planes(x: Tensor, width: int) -> Tensor:
    """(rows, n) -> (blocks, rows, width), zero-padded, in a precision that can be multiplied."""
    rows, n = x.shape
    whole, rest = divmod(n, width)
    out = torch.empty(whole + (rest > 0), rows, width, dtype=wide(x.dtype))
    out[:whole] = x[:, : n - rest].unflatten(1, (whole, width)).transpose(0, 1)
    if rest:
        out[whole, :, :rest] = x[:, n - rest :]
        out[whole, :, rest:] = 0
    return out


def _from_planes(sums: Tensor, out: Tensor) -> None:
    """The other way: (blocks, rows, width) -> out: (rows, n)."""
    n, width = out.shape[1], sums.shape[2]
    whole, rest = divmod(n, width)
    out[:, : n - rest].unflatten(1, (whole, width)).copy_(sums[:whole].transpose(0, 1))
    if rest:
        out[:, n - rest :] = sums[whole, :, :rest]
