"""Products with a dense weight on the CPU by the loops of ``blocks_tiles``, for which it lies in
strips of 16 columns: (columns / 16, rows, 16), both rounded up to whole blocks of 64 rows.

To the loops, a strip is a column of blocks, all of them alive. What there is beyond the last row
and column may be anything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triton_kernels import blocks_tiles, scatter_cpu
from triton_kernels.scatter_cpu import HEIGHT, WIDTH, Dense
from triton_kernels.waiting import Index

# Rows and columns may be rounded up by this share.
_PADDED = 1 / 8


def available(values: Tensor, n_out: int, n_in: int) -> bool:
    """For a weight of such values, on this processor."""
    # Some machines multiply half precision natively; in double, nobody has measured it.
    if values.dtype != torch.float32:
        return False
    rows = scatter_cpu.rows_at_once(n_out, n_in, values.shape[1], values.element_size())
    if -rows % HEIGHT > rows * _PADDED or -n_in % WIDTH > n_in * _PADDED:
        return False
    return blocks_tiles.available(values, (HEIGHT, WIDTH))


def shape(rows: int, columns: int) -> tuple[int, int, int]:
    return -(-columns // WIDTH), -(-rows // HEIGHT) * HEIGHT, WIDTH


def dense(strips: Tensor, rows: int, columns: int) -> Dense:
    """So many of them, as ``scatter_cpu`` takes them."""
    return Dense(strips, (rows, 1, columns), (WIDTH, 0, strips.stride(0), 1))


class Blocks(NamedTuple):
    """The blocks of so many rows of a weight, in strips of which others may be longer: in the order
    of rows, and in that of columns."""

    rows: Index
    columns: Index

    @classmethod
    def of(cls, strips: Tensor, rows: int) -> Blocks:
        count, high = len(strips), -(-rows // HEIGHT)
        slots = torch.arange(strips.shape[1] // HEIGHT * count, dtype=torch.int32, device="cpu")
        slots = slots.view(count, -1)[:, :high]

        def order(slots: Tensor) -> Index:
            major, minor = slots.shape
            offsets = minor * torch.arange(major + 1, dtype=torch.int32, device="cpu")
            each = torch.arange(minor, dtype=torch.int32, device="cpu")
            return offsets, each.repeat(major), slots.flatten()

        return cls(order(slots.T), order(slots))


def forward(x: Tensor, strips: Tensor, blocks: Blocks, rows: int, bias: Tensor | None) -> Tensor:
    """x W^T + bias: (batch, rows)."""
    return blocks_tiles.forward(x, strips.view(-1, HEIGHT, WIDTH), *blocks.rows, rows, bias)


def input_gradient(dy: Tensor, strips: Tensor, blocks: Blocks, columns: int) -> Tensor:
    """dy W: (batch, columns)."""
    values = strips.view(-1, HEIGHT, WIDTH)
    return blocks_tiles.input_gradient(dy, values, *blocks.columns, columns)


def weight_gradient(x: Tensor, dy: Tensor, strips: Tensor, blocks: Blocks) -> None:
    """dy^T x -> ``strips``."""
    out = strips.view(-1, HEIGHT, WIDTH)
    blocks_tiles.weight_gradient(x, dy, *blocks.rows, len(out), (HEIGHT, WIDTH), out)
