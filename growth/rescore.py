"""Exact scores of candidates that a cheaper search has found."""

from __future__ import annotations

import torch
from torch import Tensor

from growth.connections import Grid
from growth.errors import InputError
from growth.pairs import SINGLES_SHARE, Pairs

# Entries of G, within blocks, that are looked up at a time.
_ENTRIES = 1 << 20


def scores_at(pairs: Pairs, grid: Grid, keys: Tensor) -> Tensor:
    """|G| of single connections, or Frobenius norms of G over blocks: (keys,).

    keys: int64, sorted, unique, row * n_cols + col. Memory O(keys) beside a chunk of the vectors.
    Raises InputError where products overflow so that a score is not a number.
    """
    if grid.block == (1, 1):
        scores = pairs.products_at(keys // grid.n_cols, keys % grid.n_cols).abs()
    else:
        step = max(1, _ENTRIES // (grid.block[0] * grid.block[1]))
        scores = torch.cat([_block_norms(pairs, grid, some) for some in keys.split(step)])
    if bool(scores.isnan().any()):
        raise InputError(
            "some products of the recorded vectors are not numbers: the vectors are too large, "
            "lower the learning rate or the loss scale"
        )
    return scores


def is_dear(pairs: Pairs, grid: Grid, count: int) -> bool:
    """Whether the scores of so many candidates take as long as all of G does."""
    entries = count * grid.block[0] * grid.block[1]
    return entries > SINGLES_SHARE * pairs.n_out * pairs.n_in


def rescoring_flops(pairs: Pairs, grid: Grid, count: int) -> int:
    entries = pairs.n_out * pairs.n_in
    if not is_dear(pairs, grid, count):
        entries = min(entries, count * grid.block[0] * grid.block[1])
    return 2 * pairs.samples * entries


def _block_norms(pairs: Pairs, grid: Grid, keys: Tensor) -> Tensor:
    bh, bw = grid.block
    row, col = keys // grid.n_cols, keys % grid.n_cols
    blocks = grid.n_cols // grid.taps
    down, across = (torch.arange(n, device=keys.device) for n in grid.block)
    output = row[:, None] * bh + down
    channel = (col % blocks)[:, None] * bw + across
    column = (col // blocks)[:, None] * grid.channels + channel
    inside = (output < grid.n_out)[:, :, None] & (channel < grid.channels)[:, None, :]
    entries = (output[:, :, None] * pairs.n_in + column[:, None, :])[inside]
    # Those of one row of G stand together, of whichever blocks they are.
    entries, order = entries.sort()
    found = pairs.products_at(entries // pairs.n_in, entries % pairs.n_in)
    of_blocks = torch.empty_like(found)
    of_blocks[order] = found
    squares = found.new_zeros(inside.shape)
    squares[inside] = of_blocks.square()
    return squares.sum((1, 2)).sqrt()
