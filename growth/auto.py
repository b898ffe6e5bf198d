"""Choosing the search that suits a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from growth.connections import Block, Connections, Grid, check_query
from growth.dense import Dense
from growth.errors import InputError
from growth.exact import Exact
from growth.gram import gram_factors
from growth.lowrank import STEPS, EntryScreen, LowRank
from growth.pairs import Pairs, as_pairs
from growth.recall import RecallSample
from growth.scan import column_norms
from growth.strategy import Strategy
from triton_kernels.costs import (
    gram_ns,
    gram_pays,
    longer_than_wide,
    lowrank_ns,
    lowrank_pays,
    scan_ns,
    scan_pays,
    tiles_ns,
)


class _Choice(NamedTuple):
    """A search by its name in a state, ``exact``, ``dense`` or ``lowrank:RANK``, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Auto:
    """The cheapest of the searches that keep a promise of recall, chosen once a layer.

    Small layers, and those whose vectors are longer than the layer is wide (convolutions), have G
    accumulated (``Dense``). For the others some rows of G are computed, and the Gram matrices'
    singular values: they tell which share of the pairs the norm-ordered ``Exact`` would compute,
    and which rank ``LowRank`` would need, and measured constants (``triton_kernels.costs``) what
    either would cost. Nearest-neighbour indexes are never chosen: none is faster than these.

    The choice is the ``state`` that comes back with the connections: passed to the next search of
    the same layer, it holds for it. ``report`` says ``growth``, what was chosen, and ``why``.

    recall: the promise, in [0, 1]; 1 allows exact searches alone.
    """

    recall: float = 0.95
    needs_pairs: ClassVar[bool] = True
    observes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        LowRank(recall=self.recall)

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
        chosen = (
            self._choose(pairs, grid, count, active)
            if state is None
            else _Choice(state, "chosen before")
        )
        found = self._strategy(chosen.name)(pairs, count, active, block=block, generator=generator)
        report = {"growth": chosen.name, "why": chosen.why, **found.report}
        return found._replace(report=report, state=chosen.name)

    def _strategy(self, name: Any) -> Strategy:
        kind, _, rank = str(name).partition(":")
        if kind == "lowrank" and rank.isdecimal() and int(rank):
            return LowRank(int(rank), self.recall)
        if name not in ("exact", "dense"):
            raise InputError(
                f"state {name!r} is no choice of auto: pass the state that its last search "
                "returned, or none"
            )
        return Exact() if name == "exact" else Dense()

    def _choose(self, pairs: Pairs, grid: Grid, count: int, active: Tensor) -> _Choice:
        n_out, n_in, depth = pairs.n_out, pairs.n_in, pairs.samples
        if pairs.device.type != "cpu":
            return _Choice("exact", f"on {pairs.device.type} the exact search is one kernel")
        if not pairs.has_vectors:
            return _Choice("dense", "the gradient is there already")
        if grid.block != (1, 1):
            return self._choose_for_blocks(pairs, grid, count)
        if not scan_pays(n_out, n_in, depth):
            long = longer_than_wide(n_out, n_in, depth)
            why = "the vectors are long for the layer" if long else "the layer is small"
            return _Choice("dense", f"{why}: {n_out} x {n_in}, {depth} samples")
        return self._choose_for_entries(pairs, count, active)

    def _choose_for_entries(self, pairs: Pairs, count: int, active: Tensor) -> _Choice:
        x, dz = pairs.vectors()
        n_out, n_in, depth = pairs.n_out, pairs.n_in, pairs.samples
        screen = EntryScreen(x, dz)
        sample = RecallSample(
            screen.row_norms(), screen.sampled_rows, active.numpy(), count, screen.scores
        )
        share = _reaching(x, dz, sample.threshold)
        exact = scan_ns(n_out, n_in, depth, share, 3 * count)
        choice = _Choice("exact", f"it computes {share:.0%} of the products")
        wanted = int(LowRank.candidates * count)
        if not (self.recall < 1 and lowrank_pays(n_out, n_in, depth, LowRank.rank, wanted)):
            return choice
        ranks = [int(LowRank.rank * k) for k in STEPS if 2 * LowRank.rank * k <= depth]
        right, left = gram_factors(x, dz, ranks[-1])
        for rank in ranks:
            factors = right[:rank], left[:rank]
            approximate = screen.approximate_scores(*factors, sample.rows)
            if sample.foreseen(approximate, wanted).at_least < self.recall:
                continue
            own = _reaching(*factors, sample.least(approximate, wanted))
            scanned = scan_ns(n_out, n_in, rank, own, 3 * wanted)
            beside = lowrank_ns(n_out, n_in, depth, rank, sample.exact.size, wanted)
            faster = exact / (scanned + beside)
            if faster > 1:
                return _Choice(
                    f"lowrank:{rank}",
                    f"rank {rank} keeps the promise, {faster:.1f} x as fast as exact",
                )
            return choice._replace(
                why=f"{choice.why}; rank {rank} would do and take {1 / faster:.1f} x as long"
            )
        return choice._replace(why=f"{choice.why}; no rank up to {ranks[-1]} keeps the promise")

    def _choose_for_blocks(self, pairs: Pairs, grid: Grid, count: int) -> _Choice:
        shape = pairs.n_out, pairs.n_in, pairs.samples
        by_grams = gram_pays(*shape, grid.block)
        exact = gram_ns(*shape, grid.block) if by_grams else tiles_ns(*shape)
        way = "Gram matrices are" if by_grams else "a product is"
        choice = _Choice("exact", f"{way} the cheapest for blocks of {grid.block}")
        rescored = int(LowRank.candidates * count) * grid.block[0] * grid.block[1]
        if not (self.recall < 1 and lowrank_pays(*shape, LowRank.rank, rescored)):
            return choice
        # Twice the first rank will do for most; ``LowRank`` looks for itself.
        rank = 2 * LowRank.rank
        screen = gram_ns(pairs.n_out, pairs.n_in, rank, grid.block)
        checked = pairs.n_out * pairs.n_in // 20
        faster = exact / (screen + lowrank_ns(*shape, rank, checked, 0))
        if faster <= 1:
            return choice
        why = f"about {faster:.1f} x as fast as exact, where a rank keeps the promise"
        return _Choice(f"lowrank:{LowRank.rank}", why)


def _reaching(x: Tensor, dz: Tensor, threshold: float) -> float:
    """The share of the pairs whose norms' product reaches a threshold."""
    if threshold <= 0:
        return 1.0
    of_x, of_dz = np.sort(column_norms(x)), column_norms(dz)
    # What reaches it but for rounding is computed as well.
    threshold *= 1 - 1e-6
    with np.errstate(divide="ignore"):
        below = of_x.searchsorted(threshold / of_dz)
    return 1 - float(below.mean()) / of_x.size
