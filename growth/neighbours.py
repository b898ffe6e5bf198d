"""What nearest-neighbour libraries share: from the neighbours of every gradient vector to exactly
``count`` connections, as the master thesis by Palaj (2023) flattens them (its figure 3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from growth.active import ActiveKeys
from growth.connections import Block, Connections, Grid
from growth.errors import InputError
from growth.exact import Exact
from growth.pairs import Pairs
from growth.running_top import RunningTop
from growth.strategy import METRICS
from growth.threads import one_thread

Floats = NDArray[np.float32]
Keys = NDArray[np.int64]

# Neighbours asked for at a time: 12 bytes each, and as much again while they are merged.
BATCH_NEIGHBOURS = 1 << 18
# Questions to the active keys, as a multiple of what is searched.
QUESTIONS = 8


class Index(Protocol):
    """An index of the n_in activation vectors. flops: what it has taken so far."""

    flops: int

    def search(self, query: Floats, k: int) -> tuple[Floats, Keys]:
        """The k nearest vectors of each query (m, samples).

        Returns (scores: (m, k), larger is nearer: inner products, or minus squared distances;
        columns: (m, k), -1 where the index has no more neighbours to give).
        """
        ...


def check_options(
    name: str, k_similar: float, metric: str, index: str, kinds: Sequence[str]
) -> None:
    """Refuse what no index can be asked for."""
    if not 0 < k_similar <= 1:
        raise InputError(f"k_similar {k_similar} must be a share in (0, 1]")
    if metric not in METRICS:
        raise InputError(f"metric {metric!r} is unknown: choose {', '.join(METRICS)}")
    if index not in kinds:
        raise InputError(f"{name} has no index {index!r}: choose {', '.join(kinds)}")


def check_graph(links: int, ef_construction: int, ef_search: int) -> None:
    """Refuse the parameters of a graph (HNSW) that none can be built with."""
    if links < 2:
        raise InputError(f"links {links} must be at least 2 a vector: 16 is usual")
    if ef_construction < 1 or ef_search < 1:
        raise InputError(
            f"ef_construction {ef_construction} and ef_search {ef_search} must be at least 1"
        )


def refuse_blocks(name: str, block: Block) -> None:
    if block != (1, 1):
        raise InputError(f"{name} searches single neurons, not blocks of {block}: use 'exact'")


def no_connections(device: torch.device) -> Connections:
    keys = torch.empty(0, dtype=torch.int64, device=device)
    return Connections(keys, keys.clone(), torch.empty(0, device=device))


def whole_vectors(pairs: Pairs) -> tuple[Floats, Floats]:
    """What the libraries want, in float32: (base: (n_in, length), query: (n_out, length)).

    The length is ``samples``, or n_in + n_out where that is less, as in convolutions: so many
    vectors span no more dimensions, and are rotated into those, which changes neither inner
    products nor distances. Memory (n_in + n_out) * length * 4 bytes.
    """
    if pairs.samples > pairs.n_in + pairs.n_out:
        both = _from_gram(pairs.gram())
        x, dz = both[: pairs.n_in], both[pairs.n_in :]
    else:
        x, dz = (vectors.T for vectors in pairs.vectors())
    base, query = (t.to("cpu", torch.float32).contiguous().numpy() for t in (x, dz))
    return base, query


def _from_gram(gram: Tensor) -> Tensor:
    """Vectors, a row each, of these inner products: (n, n) -> (n, n), float64."""
    norms = gram.diagonal().clamp_min(0).sqrt()
    # Of unit length, so that the short ones do not drown in the rounding of the long ones.
    unit = torch.where(norms > 0, 1 / norms, 0)
    scaled = unit[:, None] * gram * unit
    ridge = 1e-6
    with one_thread():
        while True:
            # The ridge is added to products of vectors with themselves alone: none that is asked
            # for changes, and all squared distances of a pair by as much.
            scaled.diagonal().fill_(1 + ridge)
            root, failed = torch.linalg.cholesky_ex(scaled)
            if not failed:
                return norms[:, None] * root
            ridge *= 10


class Candidates(RunningTop):
    """The best ``count`` of the inactive ones among what is offered.

    active: sorted int64 keys, in [0, size).
    """

    def __init__(self, count: int, active: Keys, size: int) -> None:
        super().__init__(count)
        self._active = ActiveKeys(active, size, QUESTIONS * count)

    def offer(self, keys: Keys, scores: Floats) -> None:
        reach = np.flatnonzero(scores >= self.threshold)
        keys, scores = keys[reach], scores[reach]
        free = self._active.absent(keys)
        super().offer(*((keys, scores) if free is None else (keys[free], scores[free])))


def grow_from_neighbours(
    pairs: Pairs,
    grid: Grid,
    count: int,
    active: torch.Tensor,
    query: Floats,
    index: Index,
    *,
    k_similar: float,
    metric: str,
    name: str,
) -> Connections:
    """The best ``count`` among the k = ceil(n_in * k_similar) neighbours of every query.

    For ``abs-ip`` every query is asked with both signs. All answers are flattened and the active
    ones left out; where fewer than ``count`` are left, everything is asked again with twice the k.
    query: (n_out, samples). name: of the library and the index, for the report.
    """
    taken = active.cpu().numpy()
    k = min(grid.n_cols, math.ceil(grid.n_cols * k_similar))
    repeated = 0
    while True:
        found = Candidates(count, taken, grid.size)
        _ask_all(found, index, query, k, grid.n_cols, both_signs=metric == "abs-ip")
        if found.held >= count or k == grid.n_cols:
            break
        k, repeated = min(grid.n_cols, 2 * k), repeated + 1
    report = {"search": name, "k": k, "queries repeated": repeated}
    return completed(pairs, grid, count, taken, found, metric, index.flops, report)


def _ask_all(
    found: Candidates, index: Index, query: Floats, k: int, n_cols: int, both_signs: bool
) -> None:
    step = max(1, BATCH_NEIGHBOURS // (2 * k if both_signs else k))
    for start in range(0, len(query), step):
        batch = query[start : start + step]
        scores, cols = index.search(batch, k)
        if both_signs:
            negative, negative_cols = index.search(-batch, k)
            scores = np.abs(np.concatenate([scores, negative], axis=1))
            cols = np.concatenate([cols, negative_cols], axis=1)
        width = cols.shape[1]
        scores, cols = scores.ravel(), cols.ravel()
        at = np.flatnonzero((scores >= found.threshold) & (cols >= 0))
        # Some are an answer to both signs, above all where k is large.
        keys, first = np.unique((start + at // width) * n_cols + cols[at], return_index=True)
        found.offer(keys, scores[at[first]])


def completed(
    pairs: Pairs,
    grid: Grid,
    count: int,
    active: Keys,
    found: Candidates,
    metric: str,
    flops: int,
    report: dict[str, Any],
) -> Connections:
    """What was found; where an index gives too few even when asked for all, the missing ones are
    the best of the others, by the exact search."""
    keys, scores = found.so_far()
    missing = count - keys.size
    if missing:
        # Both are sorted, and disjoint.
        seen = torch.from_numpy(np.sort(np.concatenate([active, keys])))
        rest = Exact(metric)(pairs, missing, seen)
        keys = np.concatenate([keys, (rest.row * grid.n_cols + rest.col).cpu().numpy()])
        scores = np.concatenate([scores, rest.score.cpu().numpy().astype(np.float32)])
        order = keys.argsort()
        keys, scores, flops = keys[order], scores[order], flops + rest.flops
    report = {**report, "completed exactly": missing}
    key = torch.from_numpy(keys).to(pairs.device)
    score = torch.from_numpy(scores).to(pairs.device)
    return Connections(key // grid.n_cols, key % grid.n_cols, score, flops, report)
