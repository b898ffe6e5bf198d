"""How the alive blocks of a weight are written down for a kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Layout(NamedTuple):
    """Alive blocks by row and, the same ones, by column; int32 unless a count exceeds 2^31.

    Block (r, c) covers ``block[0]`` outputs and ``block[1]`` channels at one tap, c running over
    taps x ceil(channels / block[1]); edge blocks are zero-padded. ``values[slot]`` holds a block.

    row_offsets: (n_rows + 1,), cols: (alive,), slots: (alive,), sorted by row, then column.
    col_offsets: (n_cols + 1,), rows_t: (alive,), slots_t: (alive,), sorted by column, then row.
    """

    row_offsets: Tensor
    cols: Tensor
    slots: Tensor
    col_offsets: Tensor
    rows_t: Tensor
    slots_t: Tensor
    n_out: int
    taps: int
    channels: int

    @property
    def n_in(self) -> int:
        return self.taps * self.channels


def expand(offsets: Tensor, count: int) -> Tensor:
    """Offsets of a compressed order -> the index of every entry, int64 (count,)."""
    index = torch.arange(offsets.numel() - 1, device=offsets.device)
    return index.repeat_interleave(offsets.diff(), output_size=count)


def scatter(
    values: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    n_out: int,
    taps: int,
    channels: int,
) -> Tensor:
    """The dense weight (n_out, taps, channels): transient, for one product."""
    bh, bw = values.shape[1:]
    rows, cols = expand(row_offsets, cols.numel()), cols.long()
    alive = values[slots.long()]
    if bh == bw == 1:
        dense = values.new_zeros(n_out * taps * channels)
        dense[rows * (taps * channels) + cols] = alive.view(-1)
        return dense.view(n_out, taps, channels)
    blocks = -(-channels // bw)
    dense = values.new_zeros(row_offsets.numel() - 1, bh, taps * blocks, bw)
    dense[rows, :, cols] = alive
    return dense.view(-1, taps, blocks * bw)[:n_out, :, :channels]


def gather(
    dense: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    capacity: int,
    block: tuple[int, int],
) -> Tensor:
    """The adjoint of :func:`scatter`: (n_out, taps, channels) -> (capacity, bh, bw), free slots
    and the padding of edge blocks zero."""
    bh, bw = block
    n_out, taps, channels = dense.shape
    rows, cols = expand(row_offsets, cols.numel()), cols.long()
    values = dense.new_zeros(capacity, bh, bw)
    if bh == bw == 1:
        at = rows * (taps * channels) + cols
        values.view(-1)[slots.long()] = dense.reshape(-1)[at]
        return values
    dense = F.pad(dense, (0, -channels % bw, 0, 0, 0, -n_out % bh))
    blocks = dense.shape[2] // bw
    values[slots.long()] = dense.reshape(-1, bh, taps * blocks, bw)[rows, :, cols]
    return values
