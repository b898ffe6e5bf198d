"""Search of a convolution's averaged maps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from growth.connections import Block, Connections, check_query
from growth.errors import InputError
from growth.exact import Exact
from growth.pairs import Pairs, as_pairs
from growth.rescore import is_dear, rescoring_flops, scores_at
from growth.select import select_largest


@dataclass(frozen=True)
class Pooled:
    """The best of the candidates that averages of 2 x 2 positions suggest, by exact scores.

    The unfolded input and the gradient of a convolution are averaged over neighbouring positions,
    without unfolding anything (see ``ConvPairs.pooled``), and searched exactly: a quarter of the
    work. The ``candidates`` * ``count`` best are scored anew over all positions, and the best kept.
    A linear layer, and a map less than two positions wide or high, has nothing to average and is
    searched exactly; so is every layer where the new scores alone would take as long as that.

    candidates: at least 1, as a multiple of ``count``.
    """

    candidates: float = 2.0
    needs_pairs: ClassVar[bool] = True
    observes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.candidates < math.inf:
            raise InputError(f"candidates {self.candidates} must be at least 1 times the count")

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
        wanted = min(math.ceil(self.candidates * count), grid.size - active.numel())
        coarse = pairs if is_dear(pairs, grid, wanted) else pairs.pooled()
        if coarse is pairs:
            found = Exact()(pairs, count, active, block=block)
            return found._replace(report={"search": "pool", "pooled": "no"})
        found = Exact()(coarse, wanted, active, block=block)
        scores = scores_at(pairs, grid, found.row * grid.n_cols + found.col)
        best = select_largest(scores, count)
        flops = found.flops + rescoring_flops(pairs, grid, wanted)
        report: dict[str, str | float] = {
            "search": "pool",
            "pooled": "yes",
            "candidates": float(wanted),
        }
        return Connections(found.row[best], found.col[best], scores[best], flops, report)
