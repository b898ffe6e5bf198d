"""Random growth: uniformly over what is inactive, as SET does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from growth.connections import Block, Connections, Grid, check_query
from growth.pairs import Pairs, as_pairs
from growth.sampling import sample_outside


@dataclass(frozen=True)
class Random:
    """``count`` inactive connections, uniformly (Mocanu et al. 2018). Scores are zero. The vectors
    of ``pairs`` are not looked at, only their sizes."""

    needs_pairs: ClassVar[bool] = False
    observes: ClassVar[bool] = False

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
        grid: Grid = check_query(pairs, count, active, block)
        keys = sample_outside(active, grid.size, count, generator).to(pairs.device)
        return Connections(
            keys // grid.n_cols, keys % grid.n_cols, torch.zeros(count, device=pairs.device)
        )
