"""Search among the neurons of the largest vectors alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from growth.connections import Block, Connections, Grid, check_query
from growth.errors import InputError
from growth.exact import Exact
from growth.pairs import Pairs, as_pairs
from growth.select import select_largest

# How much larger the next sub-block is than one with too few inactive connections.
_STEP = 1.25


@dataclass(frozen=True)
class Subblock:
    """The ``count`` best pairs of those outputs and inputs whose vectors are the longest, exactly.

    A product is at most the product of two lengths, so that the largest ones seldom lie elsewhere:
    a share of .35 either way takes 12 % of the products. Of a convolution, channels are chosen, all
    taps of each: they see the same pixels but for the border. Of blocks, whole rows and columns of
    them, by the lengths of what they cover together. Where the sub-block holds fewer than ``count``
    inactive connections it is enlarged, both ways alike, until it holds enough.

    share: of the outputs, and of the inputs, in (0, 1].
    """

    share: float = 0.35
    needs_pairs: ClassVar[bool] = True
    observes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share {self.share} of the neurons must lie in (0, 1]")

    def __call__(
        self,
        pairs: Pairs | tuple[Tensor, Tensor],
        count: int,
        active: Tensor,
        *,
        block: Block = (1, 1),
        generator: torch.Generator | None = None,
        state: Any = None,
    ) -> Connections:
        pairs = as_pairs(pairs)
        grid = check_query(pairs, count, active, block)
        of_x, of_dz = pairs.squared_norms()
        of_rows = block_sums(of_dz, block[0])
        of_channels = block_sums(of_x.view(grid.taps, grid.channels).sum(0), block[1])
        share, part = self.share, _part(grid, of_rows, of_channels, self.share)
        taken = part.inside(active.to(pairs.device))
        while part.size - taken.numel() < count:
            share = min(1.0, share * _STEP)
            part = _part(grid, of_rows, of_channels, share)
            taken = part.inside(active.to(pairs.device))

        rows = _members(part.rows, block[0], grid.n_out)
        channels = _members(part.channels, block[1], grid.channels)
        found = Exact()(pairs.narrowed(rows, channels), count, taken, block=block)
        row, col = part.outside(found.row, found.col)
        flops = found.flops + 2 * pairs.samples * (pairs.n_in + pairs.n_out)
        report: dict[str, str | float] = {
            "search": "subblock",
            "share": share,
            "of_all": part.size / grid.size,
        }
        return Connections(row, col, found.score, flops, report)


class _Part(NamedTuple):
    """Some rows and some channels, sorted, of a grid of blocks, numbered anew."""

    grid: Grid
    rows: Tensor
    channels: Tensor

    @property
    def size(self) -> int:
        return self.rows.numel() * self.channels.numel() * self.grid.taps

    def inside(self, keys: Tensor) -> Tensor:
        """Those of sorted keys of the grid that lie in the part, as its own keys, sorted."""
        per_tap = self.grid.n_cols // self.grid.taps
        col = keys % self.grid.n_cols
        row = _places(self.rows, self.grid.n_rows)[keys // self.grid.n_cols]
        channel = _places(self.channels, per_tap)[col % per_tap]
        own = (row * self.grid.taps + col // per_tap) * self.channels.numel() + channel
        return own[(row >= 0) & (channel >= 0)]

    def outside(self, row: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns in the grid of what was found in the part."""
        per_tap, own = self.grid.n_cols // self.grid.taps, self.channels.numel()
        return self.rows[row], col // own * per_tap + self.channels[col % own]


def _part(grid: Grid, of_rows: Tensor, of_channels: Tensor, share: float) -> _Part:
    rows, channels = (
        select_largest(norms, max(1, math.ceil(share * norms.numel())))
        for norms in (of_rows, of_channels)
    )
    return _Part(grid, rows, channels)


def _places(chosen: Tensor, size: int) -> Tensor:
    """Where each of ``size`` numbers stands among the chosen; -1: nowhere."""
    places = chosen.new_full((size,), -1)
    places[chosen] = torch.arange(chosen.numel(), device=chosen.device)
    return places


def block_sums(weights: Tensor, size: int) -> Tensor:
    """Over runs of ``size`` along the last dimension, the last of which may be shorter."""
    weights = F.pad(weights, (0, -weights.shape[-1] % size))
    return weights.unflatten(-1, (-1, size)).sum(-1)


def _members(blocks: Tensor, size: int, end: int) -> Tensor:
    """The rows, or channels, of some blocks; the last block of all may be cut off."""
    members = (blocks[:, None] * size + torch.arange(size, device=blocks.device)).flatten()
    return members[members < end]
