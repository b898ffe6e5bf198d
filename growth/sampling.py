"""Uniform samples of a large index range, in time and memory of the sample, not of the range."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_distinct(size: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """``count`` distinct integers of [0, size), uniformly, sorted; int64 on the CPU.

    O(count): draws with rejection of what was drawn twice, and never permutes the range unless
    the sample is more than half of it.
    """
    if not 0 <= count <= size:
        raise ValueError(f"cannot draw {count} distinct values out of {size}")
    if 2 * count > size:
        return torch.randperm(size, generator=generator)[:count].sort().values
    chosen = torch.empty(0, dtype=torch.int64)
    while chosen.numel() < count:
        missing = count - chosen.numel()
        # 63 bits a draw: PyTorch's own range reduction of 32 bits favours some values of a large
        # range by several per cent.
        wide = torch.randint(2**63 - 1, (missing + missing // 8 + 16,), generator=generator)
        drawn = wide % size
        chosen = torch.cat([chosen, drawn]).unique()
    # More than enough were drawn; unique() sorted them, so which to leave out is drawn as well.
    keep = torch.randperm(chosen.numel(), generator=generator)[:count]
    return chosen[keep].sort().values


def sample_outside(
    taken: Tensor, size: int, count: int, generator: torch.Generator | None = None
) -> Tensor:
    """``count`` distinct integers of [0, size) that are not in ``taken``, uniformly, sorted.

    taken: sorted, unique int64. Draws ranks among what is left and shifts each past the taken
    values before it, so that it is exact and needs no rejection at any density.
    """
    taken = taken.cpu()
    ranks = sample_distinct(size - taken.numel(), count, generator)
    # taken[i] - i values are free before taken[i]: a rank at or beyond that lies behind it.
    free_before = taken - torch.arange(taken.numel())
    return ranks + torch.searchsorted(free_before, ranks, right=True)
