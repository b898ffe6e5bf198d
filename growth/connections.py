"""What a growth strategy returns, and the grid of blocks in which it counts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from growth.errors import InputError

if TYPE_CHECKING:
    from growth.pairs import Pairs

Block = tuple[int, int]


class Connections(NamedTuple):
    """New connections in block units, sorted by row and column.

    row, col: int64 (count,). score: float (count,), larger is more similar: |g| for ``abs-ip`` (the
    Frobenius norm of G over a block), g for ``ip``, minus the squared distance for ``l2``.
    flops: floating-point operations that the search took. report: what the search says of itself,
    words and numbers by name: how it searched, which share of the best it expects to have found.
    state: what to pass as ``state`` to the next search of this layer, from a strategy that decides
    something once; None from the others.
    """

    row: Tensor
    col: Tensor
    score: Tensor
    flops: int = 0
    report: Mapping[str, Any] = MappingProxyType({})
    state: str | None = None


class Grid(NamedTuple):
    """The blocks of a weight matrix of n_out rows and taps x channels columns.

    A block covers ``block[0]`` outputs and ``block[1]`` channels at one tap (a linear layer has one
    tap); edge blocks are padded. Blocks are numbered by key = row * n_cols + col.
    """

    n_rows: int
    n_cols: int
    n_out: int
    taps: int
    channels: int
    block: Block

    @classmethod
    def of(cls, n_out: int, n_in: int, taps: int, block: Block) -> Grid:
        channels = n_in // taps
        n_cols = taps * -(-channels // block[1])
        return cls(-(-n_out // block[0]), n_cols, n_out, taps, channels, block)

    @property
    def size(self) -> int:
        return self.n_rows * self.n_cols

    def pool(self, tile: Tensor) -> Tensor:
        """Frobenius norm of every block of a tile of whole block rows.

        tile: (rows, taps * channels), where only the last tile may end inside a block.
        Returns (block rows, n_cols).
        """
        bh, bw = self.block
        col_blocks = self.n_cols // self.taps
        tile = tile.square().view(tile.shape[0], self.taps, self.channels)
        pad = (0, col_blocks * bw - self.channels, 0, 0, 0, -tile.shape[0] % bh)
        if any(pad):
            tile = torch.nn.functional.pad(tile, pad)
        # Along the rows first: the second sum then has bw times less to read.
        of_rows = tile.view(-1, bh, self.taps * col_blocks, bw).sum(3)
        return of_rows.sum(1).sqrt_()


def check_query(
    pairs: Pairs, count: int, active: Tensor, block: Block, metric: str = "abs-ip"
) -> Grid:
    """Refuse a query that no strategy can answer; return its grid.

    Raises InputError when a block is not positive, or larger than 1 with a metric that has no sum
    over a block; when the active keys are not sorted, unique and in range, fewer than ``count``
    inactive connections are left, or the vectors hold NaN or inf.
    """
    if min(block) < 1:
        raise InputError(f"block {block} must be two positive sizes, such as (1, 1) or (16, 16)")
    if metric != "abs-ip" and block != (1, 1):
        raise InputError(f"metric {metric!r} compares single neurons: use block 1")
    grid = Grid.of(pairs.n_out, pairs.n_in, pairs.taps, block)
    if active.dtype != torch.int64 or active.dim() != 1:
        raise InputError(
            f"active must be a 1-D int64 tensor of keys row * {grid.n_cols} + col, "
            f"not {active.dim()}-D {active.dtype}"
        )
    if active.numel():
        if not bool((active[1:] > active[:-1]).all()):
            raise InputError("active keys must be sorted and unique: pass active.unique()")
        if int(active[0]) < 0 or int(active[-1]) >= grid.size:
            raise InputError(
                f"active keys must lie in [0, {grid.size}) for {grid.n_rows} x {grid.n_cols} "
                f"blocks, not {int(active[0])}..{int(active[-1])}"
            )
    left = grid.size - active.numel()
    if not 0 <= count <= left:
        raise InputError(
            f"cannot grow {count} connections: {left} of {grid.size} are inactive; "
            "ask for at most that many"
        )
    if not pairs.is_finite():
        raise InputError(
            "the recorded activations or gradients hold NaN or inf: skip the update of this step"
        )
    return grid
