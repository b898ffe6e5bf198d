"""Exact search: the gradient a tile of rows at a time, and a running top-K."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from growth.connections import Block, Connections, Grid, check_query
from growth.errors import InputError
from growth.pairs import Pairs, as_pairs
from growth.select import kth_largest, positions_above, select_largest
from growth.strategy import METRICS


@dataclass(frozen=True)
class Exact:
    """The ``count`` best pairs, exactly, without ever holding G.

    Computes a tile of rows of G, keeps what beats the running threshold (the count-th best so
    far: always a lower bound of the final one), and forgets the tile. Memory: one tile and
    O(count). Rows are visited in ascending order, so that among equal scores the lowest key wins.

    metric: ``abs-ip`` (|G|), ``ip`` (G), ``l2`` (minus the squared distance of the vectors).
    tile_floats: entries of G held at a time.
    """

    metric: str = "abs-ip"
    tile_floats: int = 4 << 20
    needs_pairs: ClassVar[bool] = True
    observes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InputError(f"metric {self.metric!r} is unknown: choose {', '.join(METRICS)}")

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
        if self.metric != "abs-ip" and block != (1, 1):
            raise InputError(f"metric {self.metric!r} compares single neurons: use block 1")
        norms = pairs.squared_norms() if self.metric == "l2" else None
        active = active.to(pairs.device)

        best = _RunningTop(count, pairs.device)
        step = max(1, self.tile_floats // (pairs.n_in * block[0]))
        for start in range(0, grid.n_rows, step):
            stop = min(start + step, grid.n_rows)
            scores = self._scores(pairs, grid, start, stop, norms).flatten()
            first = start * grid.n_cols
            inside = torch.searchsorted(
                active, torch.tensor([first, first + scores.numel()], device=active.device)
            )
            scores[active[inside[0] : inside[1]] - first] = -torch.inf
            best.offer(scores, first)
        keys, scores = best.result()
        flops = 2 * pairs.samples * pairs.n_in * pairs.n_out
        return Connections(keys // grid.n_cols, keys % grid.n_cols, scores, flops)

    def _scores(
        self,
        pairs: Pairs,
        grid: Grid,
        start: int,
        stop: int,
        norms: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """(block rows, n_cols) scores of block rows [start, stop)."""
        bh = grid.block[0]
        rows = slice(start * bh, min(stop * bh, grid.n_out))
        tile = pairs.products(rows.start, rows.stop)
        if grid.block != (1, 1):
            return grid.pool(tile)
        if norms is not None:
            return tile.mul_(2).sub_(norms[0]).sub_(norms[1][rows, None])
        return tile.abs_() if self.metric == "abs-ip" else tile


class _RunningTop:
    """The best ``count`` of a stream of scores that comes in ascending key order.

    Candidates wait in one buffer: allocated one by one between two tiles, they would outlive the
    tiles and leave holes of nearly a tile's size in the heap, gigabytes at 65536 x 65536.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.count = count
        self.threshold: Tensor | None = None
        # Partitioning at three times the count keeps its cost per candidate constant.
        self.room = 3 * count + (64 << 10)
        self.keys = torch.empty(0, dtype=torch.int64, device=device)
        self.scores = torch.empty(0, device=device)
        self.held = 0

    def offer(self, scores: Tensor, first_key: int) -> None:
        """scores: 1-D, of the keys from ``first_key`` on; -inf marks what may not be chosen."""
        if self.count == 0:
            return
        if self.keys.numel() == 0:
            self.keys, self.scores = self.keys.new_empty(self.room), scores.new_empty(self.room)
        if self.threshold is None:
            at = select_largest(scores, min(self.count, scores.numel()))
            at = at[scores[at] > -torch.inf]
        else:
            # A tie with the threshold has a higher key than those already kept, and loses.
            at = positions_above(scores, self.threshold)
            if at.numel() > self.count:
                at = at[select_largest(scores[at], self.count)]
        if self.held + at.numel() > self.room:
            self._compact()
        new = slice(self.held, self.held + at.numel())
        self.keys[new] = at + first_key
        self.scores[new] = scores[at]
        self.held = new.stop
        if self.threshold is None and self.held >= self.count:
            self._compact()

    def _compact(self) -> None:
        keys, scores = self.keys[: self.held], self.scores[: self.held]
        if self.held >= self.count:
            at = select_largest(scores, self.count)
            self.threshold = kth_largest(scores, self.count).clone()
            keys[: at.numel()], scores[: at.numel()] = keys[at], scores[at]
            self.held = at.numel()

    def result(self) -> tuple[Tensor, Tensor]:
        if self.count:
            self._compact()
        if self.held < self.count:
            raise InputError(
                f"only {self.held} of {self.count} connections have a finite score: the recorded "
                "vectors are too large, lower the learning rate or the loss scale"
            )
        return self.keys[: self.count].clone(), self.scores[: self.count].clone()
