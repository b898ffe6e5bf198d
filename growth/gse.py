"""Guided stochastic exploration: the best of a random subset of the inactive connections."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from growth.connections import Block, Connections, Grid, check_query
from growth.errors import InputError
from growth.pairs import Pairs, as_pairs
from growth.rescore import rescoring_flops, scores_at
from growth.sampling import sample_outside
from growth.select import select_largest
from growth.subblock import block_sums

SAMPLINGS = ("uniform", "norm", "sign")

# Times that more is drawn, twice as much each time, before the rest is made up uniformly: where a
# few neurons have all the weight, most draws are of the same connections.
_ROUNDS = 8
# Where no generator is given: never PyTorch's global one.
_SEED = 0


@dataclass(frozen=True)
class Gse:
    """The ``count`` largest |G| of a random subset (Heddes, Srinivasa, Givargis & Nicolau 2024,
    "Always-sparse training by growing connections with guided stochastic exploration").

    Draws ``subset`` times as many pairs as are active, and at least ``count``, with replacement;
    output and input are drawn independently. What was drawn twice or is active is left out; while
    there are too few, more is drawn, and what is missing in the end is made up uniformly. Only the
    gradients of the subset are computed: O(samples * active), of any width. A convolution is
    searched as a linear layer over its unfolded input, batch and positions. Blocks are drawn by the
    summed weights of their rows and columns, and scored by their Frobenius norms.

    sampling: how likely a neuron is drawn. ``uniform``: all alike; ``norm``: in proportion to the
    sum over the batch of |x_i|, and |dz_j|; ``sign``: to |sum of s_b x_bi|, and |sum of s_b dz_bj|,
    s_b a random sign of each example. subset: number of pairs drawn, as a multiple of the active.
    """

    sampling: str = "uniform"
    subset: float = 1.0
    needs_pairs: ClassVar[bool] = True
    observes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.sampling not in SAMPLINGS:
            raise InputError(
                f"sampling {self.sampling!r} is unknown: choose {', '.join(SAMPLINGS)}"
            )
        if not 0 < self.subset < math.inf:
            raise InputError(f"subset {self.subset} must be a positive multiple of the active")

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
        if generator is None:
            generator = torch.Generator().manual_seed(_SEED)
        of_cols, of_rows = self._weights(pairs, grid, generator)
        draw_rows, draw_cols = _draws(of_rows, grid.n_rows), _draws(of_cols, grid.n_cols)

        taken = active.cpu()
        subset = torch.empty(0, dtype=torch.int64)
        size = max(count, math.ceil(self.subset * taken.numel()))
        for _ in range(_ROUNDS if count else 0):
            keys = draw_rows(size, generator) * grid.n_cols + draw_cols(size, generator)
            subset = torch.cat([subset, keys]).unique()
            subset = subset[~torch.isin(subset, taken, assume_unique=True)]
            if subset.numel() >= count:
                break
            size *= 2
        made_up = max(0, count - subset.numel())
        if made_up:
            others = torch.cat([taken, subset]).sort().values
            others = sample_outside(others, grid.size, made_up, generator)
            subset = torch.cat([subset, others]).sort().values

        keys = subset.to(pairs.device)
        scores = scores_at(pairs, grid, keys)
        best = select_largest(scores, count)
        keys = keys[best]
        flops = rescoring_flops(pairs, grid, subset.numel())
        if self.sampling != "uniform":
            flops += 2 * pairs.samples * (pairs.n_in + pairs.n_out)
        report: dict[str, str | float] = {
            "search": "gse",
            "sampling": self.sampling,
            "subset": float(subset.numel()),
            "made_up": float(made_up),
        }
        return Connections(
            keys // grid.n_cols, keys % grid.n_cols, scores[best], flops, report=report
        )

    def _weights(
        self, pairs: Pairs, grid: Grid, generator: torch.Generator
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of the block columns and the block rows, float64 on the CPU; None: all alike."""
        if self.sampling == "uniform":
            return None, None
        of_x = of_dz = torch.zeros((), dtype=torch.float64)
        for x, dz in pairs.chunks():
            if self.sampling == "norm":
                of_x = of_x + x.abs().sum(0, dtype=torch.float64).cpu()
                of_dz = of_dz + dz.abs().sum(0, dtype=torch.float64).cpu()
            else:
                signs = torch.randint(2, (x.shape[0],), generator=generator) * 2 - 1
                signs = signs.to(x.device, x.dtype)
                of_x, of_dz = of_x + (signs @ x).cpu(), of_dz + (signs @ dz).cpu()
        of_x = of_x.abs().view(grid.taps, grid.channels)
        return (
            block_sums(of_x, grid.block[1]).flatten(),
            block_sums(of_dz.abs(), grid.block[0]),
        )


def _draws(weights: Tensor | None, size: int) -> Callable[[int, torch.Generator], Tensor]:
    """What draws so many of ``size`` numbers, with replacement, in proportion to their weights;
    uniformly where these are all zero, or beyond float64."""
    total = 0.0 if weights is None else float(weights.sum())
    if weights is None or not 0 < total < math.inf:
        return lambda count, generator: torch.randint(size, (count,), generator=generator)
    reached = weights.cumsum(0)
    last = int(weights.nonzero()[-1])

    def draw(count: int, generator: torch.Generator) -> Tensor:
        where = torch.rand(count, dtype=torch.float64, generator=generator) * reached[-1]
        # Rounded up to the very end, a number belongs to the last that has a weight.
        return torch.searchsorted(reached, where, right=True).clamp_(max=last)

    return draw
