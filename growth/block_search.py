"""Growth of whole blocks, by a way that is chosen or given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from growth.auto import Auto
from growth.blocks import best_blocks
from growth.connections import Block, Connections, check_query
from growth.dense import Dense
from growth.errors import InputError
from growth.lowrank import LowRank
from growth.pairs import Pairs, as_pairs

WAYS = ("auto", "tiles", "gram", "lowrank")


@dataclass(frozen=True)
class Blocks:
    """The ``count`` blocks of the largest Frobenius norm of G; single connections are blocks of 1.

    way: ``tiles``, G a tile of rows at a time, exact; ``gram``, Gram matrices of the blocks'
    vectors, exact, for batches that are short against the block (``growth.blocks``); ``lowrank``,
    Gram matrices of the factors of G, and rescoring (``LowRank``), which keeps a promise of recall;
    ``auto``: the cheapest, chosen once a layer (``Auto``). All but ``tiles`` fall back to exact
    searches where they cannot be had.

    recall: the promise of ``lowrank`` and ``auto``, in [0, 1]. rank: the first that is tried.
    """

    way: str = "auto"
    recall: float = 0.95
    rank: int = 16
    needs_pairs: ClassVar[bool] = True
    observes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise InputError(f"way {self.way!r} is unknown: choose {', '.join(WAYS)}")
        LowRank(self.rank, self.recall)

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
        if self.way == "gram":
            grid = check_query(pairs, count, active, block)
            return best_blocks(pairs, grid, count, active, gram=True)
        if self.way == "tiles":
            return Dense()(pairs, count, active, block=block)
        search = Auto(self.recall) if self.way == "auto" else LowRank(self.rank, self.recall)
        return search(pairs, count, active, block=block, generator=generator, state=state)
