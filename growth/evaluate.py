"""How good a search is, and what it costs, against the exact one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from growth.connections import Block, Connections, Grid, check_query
from growth.exact import Exact
from growth.pairs import Pairs, as_pairs
from growth.peak_memory import PeakMemory
from growth.rescore import scores_at
from growth.strategy import Strategy

# Scores this near to the threshold, relative to it, are equal but for rounding.
_ROUNDING = 1e-6


class Quality(NamedTuple):
    """What one search found and took, beside the reference.

    recall: share of the exact best ``count`` that was found; another connection counts as found
    where its score is that of the last of them. mass: sum of the exact scores of what was found,
    over that of the best; turned round where scores are negative (``l2``, a sum of distances), so
    that 1 is best. seconds: wall time, of the first call with all that it loads. memory: peak bytes
    beyond what was held before, None where they cannot be measured; see
    :class:`growth.peak_memory.PeakMemory`. flops, report: what the search says of itself.
    """

    recall: float
    mass: float
    seconds: float
    reference_seconds: float
    memory: int | None
    reference_memory: int | None
    flops: int
    reference_flops: int
    report: Mapping[str, str | float]


def evaluate(
    strategy: Strategy,
    pairs: Pairs | tuple[Tensor, Tensor],
    count: int,
    active: Tensor,
    *,
    block: Block = (1, 1),
    generator: torch.Generator | None = None,
    state: Any = None,
    reference: Strategy | None = None,
) -> Quality:
    """Run a search and the reference on the same query, and compare.

    All arguments but ``reference`` are those of the search. reference: the exact search by default,
    of the strategy's metric. A strategy that observes is compared with the gradient of ``pairs``
    alone, not with that of the steps that its state is made of.

    Scores are computed anew, exactly, for what either search found, so that it does not matter what
    they say; G is never held. Raises InputError on a query that cannot be answered.
    """
    pairs = as_pairs(pairs)
    metric = _metric(strategy)
    grid = check_query(pairs, count, active, block, metric)
    exact = Exact(metric) if reference is None else reference
    best = _run(lambda: exact(pairs, count, active, block=block), pairs.device)
    own = _run(
        lambda: strategy(pairs, count, active, block=block, generator=generator, state=state),
        pairs.device,
    )
    recall, mass = _compared(own.found, best.found, pairs, grid, metric)
    return Quality(
        recall,
        mass,
        own.seconds,
        best.seconds,
        own.memory,
        best.memory,
        own.found.flops,
        best.found.flops,
        own.found.report,
    )


def _metric(strategy: Any) -> str:
    """The strategy's, or that of the one it wraps."""
    if hasattr(strategy, "metric"):
        return str(strategy.metric)
    return _metric(strategy.strategy) if hasattr(strategy, "strategy") else "abs-ip"


class _Run(NamedTuple):
    found: Connections
    seconds: float
    memory: int | None


def _run(search: Callable[[], Connections], device: torch.device) -> _Run:
    with PeakMemory(device) as peak:
        start = time.perf_counter()
        found = search()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return _Run(found, seconds, peak.bytes)


def _compared(
    found: Connections, best: Connections, pairs: Pairs, grid: Grid, metric: str
) -> tuple[float, float]:
    """(recall, mass)."""
    own, its = (f.row * grid.n_cols + f.col for f in (found, best))
    if its.numel() == 0:
        return 1.0, 1.0
    keys = torch.cat([own, its]).unique()
    scores = _scores(pairs, grid, keys, metric).double()
    # Those of both from one computation: in two, rounding may tell equal ones apart.
    own_scores, its_scores = (scores[torch.searchsorted(keys, k)] for k in (own, its))
    threshold = its_scores.min()
    reached = torch.isin(own, its) | (own_scores >= threshold - _ROUNDING * threshold.abs())
    return float(reached.sum()) / its.numel(), _share(float(own_scores.sum()), its_scores)


def _share(mass: float, best: Tensor) -> float:
    """Of the most that there is."""
    most = float(best.sum())
    if mass == most:
        return 1.0
    if most > 0:
        return mass / most
    return most / mass if mass < 0 else math.inf


def _scores(pairs: Pairs, grid: Grid, keys: Tensor, metric: str) -> Tensor:
    """Exact scores of sorted keys."""
    if metric == "abs-ip":
        return scores_at(pairs, grid, keys)
    row, col = keys // grid.n_cols, keys % grid.n_cols
    products = pairs.products_at(row, col)
    if metric == "ip":
        return products
    of_x, of_dz = pairs.squared_norms()
    return 2 * products - of_x[col] - of_dz[row]
