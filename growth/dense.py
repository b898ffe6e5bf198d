"""The dense gradient, a tile of rows at a time: what every other search is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from growth.connections import Block, Connections, Grid, check_query
from growth.pairs import Pairs, as_pairs
from growth.running_top import Floats, Keys, RunningTop
from growth.strategy import check_metric

TILE_FLOATS = 1 << 20


@dataclass(frozen=True)
class Dense:
    """The ``count`` best pairs by computing all of G, exactly, without ever holding it.

    Computes a tile of rows of G, keeps what beats the running threshold and forgets the tile: one
    product of the cost of a dense weight gradient, memory of one tile and O(count). Among equal
    scores the lowest key wins. ``Exact`` finds the same and skips most of the work.

    metric: ``abs-ip`` (|G|), ``ip`` (G), ``l2`` (minus the squared distance of the vectors).
    tile_floats: entries of G held at a time.
    """

    metric: str = "abs-ip"
    tile_floats: int = TILE_FLOATS
    needs_pairs: ClassVar[bool] = True
    observes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_metric(self.metric)

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
        grid = check_query(pairs, count, active, block, self.metric)
        found = stream(pairs, grid, count, active, self.metric, self.tile_floats)
        return found._replace(report={"search": "dense"})


def stream(
    pairs: Pairs,
    grid: Grid,
    count: int,
    active: Tensor,
    metric: str,
    tile_floats: int = TILE_FLOATS,
) -> Connections:
    """The best ``count`` inactive connections of a grid, a tile of whole rows at a time."""
    top: RunningTop | None = None
    norms = pairs.squared_norms() if metric == "l2" else None
    active = active.to(pairs.device)
    step = max(1, tile_floats // (pairs.n_in * grid.block[0]))
    for start in range(0, grid.n_rows if count else 0, step):
        stop = min(start + step, grid.n_rows)
        scores = _scores(pairs, grid, start, stop, metric, norms).flatten()
        first = start * grid.n_cols
        inside = torch.searchsorted(
            active, torch.tensor([first, first + scores.numel()], device=active.device)
        )
        scores[active[inside[0] : inside[1]] - first] = -torch.inf
        if top is None:
            top = RunningTop(count, _numpy_dtype(scores))
        keys, found = _reaching(scores, top.threshold)
        keys += first
        top.offer(keys, found)
    return connections(top, grid, pairs, 2 * pairs.samples * pairs.n_in * pairs.n_out)


def connections(top: RunningTop | None, grid: Grid, pairs: Pairs, flops: int) -> Connections:
    """What a finished search found; no search at all found nothing."""
    keys, scores = (RunningTop(0) if top is None else top).result()
    # NumPy divides by one number several times as fast as PyTorch.
    row = keys // grid.n_cols
    col = keys - row * grid.n_cols
    parts = [torch.from_numpy(part).to(pairs.device) for part in (row, col, scores)]
    return Connections(parts[0], parts[1], parts[2], flops)


def _scores(
    pairs: Pairs,
    grid: Grid,
    start: int,
    stop: int,
    metric: str,
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
    return tile.abs_() if metric == "abs-ip" else tile


def _reaching(scores: Tensor, threshold: float) -> tuple[Keys, Floats]:
    """Positions, and scores, of those that reach a threshold. NumPy on the CPU: several times as
    fast as PyTorch there."""
    if scores.device.type == "cpu":
        values = scores.numpy()
        at = np.flatnonzero(values >= threshold)
        return at, values[at]
    where = (scores >= threshold).nonzero().squeeze(1)
    return where.cpu().numpy(), scores[where].cpu().numpy()


def _numpy_dtype(scores: Tensor) -> Any:
    return np.float64 if scores.dtype == torch.float64 else np.float32
