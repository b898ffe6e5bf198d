"""Products with a sparse weight that never scatter it: gathered blocks, a bounded chunk at a time.

The reference form of the block-sparse kernels, on any device. All tensors are in the padded
block units of :class:`triton_kernels.layout.Layout`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_kernels.layout import expand

# Floats gathered at a time: 32 MB.
CHUNK_FLOATS = 8 << 20


def _chunks(alive: int, floats_per_block: int) -> Iterator[slice]:
    step = max(1, CHUNK_FLOATS // max(1, floats_per_block))
    for start in range(0, alive, step):
        yield slice(start, start + step)


def _as_blocks(x: Tensor, width: int) -> Tensor:
    """(batch, n) -> (blocks, batch, width), zero-padded."""
    x = F.pad(x, (0, -x.shape[1] % width))
    return x.view(x.shape[0], x.shape[1] // width, width).transpose(0, 1)


def forward(
    x: Tensor, values: Tensor, row_offsets: Tensor, cols: Tensor, slots: Tensor, n_out: int
) -> Tensor:
    """x: (batch, n_in) -> x W^T: (batch, n_out)."""
    bh, bw = values.shape[1:]
    source = _as_blocks(x, bw)
    rows = expand(row_offsets, cols.numel())
    y = x.new_zeros(row_offsets.numel() - 1, x.shape[0], bh)
    for part in _chunks(cols.numel(), x.shape[0] * (bh + bw)):
        weight = values[slots[part].long()]
        y.index_add_(0, rows[part], torch.bmm(source[cols[part].long()], weight.transpose(1, 2)))
    return y.transpose(0, 1).flatten(1)[:, :n_out]


def input_gradient(
    dy: Tensor, values: Tensor, col_offsets: Tensor, rows_t: Tensor, slots_t: Tensor, n_in: int
) -> Tensor:
    """dy: (batch, n_out) -> dy W: (batch, n_in), over the transposed order."""
    bh, bw = values.shape[1:]
    source = _as_blocks(dy, bh)
    cols = expand(col_offsets, rows_t.numel())
    dx = dy.new_zeros(col_offsets.numel() - 1, dy.shape[0], bw)
    for part in _chunks(rows_t.numel(), dy.shape[0] * (bh + bw)):
        weight = values[slots_t[part].long()]
        dx.index_add_(0, cols[part], torch.bmm(source[rows_t[part].long()], weight))
    return dx.transpose(0, 1).flatten(1)[:, :n_in]


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
    left, right = _as_blocks(dy, bh), _as_blocks(x, bw)
    rows = expand(row_offsets, cols.numel())
    grad = x.new_zeros(capacity, bh, bw)
    for part in _chunks(cols.numel(), x.shape[0] * (bh + bw)):
        product = torch.bmm(left[rows[part]].transpose(1, 2), right[cols[part].long()])
        grad[slots[part].long()] = product
    return grad
