"""Growth by nearest-neighbour queries with faiss, as the master thesis by Palaj (2023) does it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from growth.connections import Block, Connections, check_query
from growth.errors import InputError, MissingLibraryError
from growth.pairs import Pairs, as_pairs
from growth.select import select_largest
from growth.strategy import METRICS


@dataclass(frozen=True)
class Faiss:
    """An index of the activation vectors, queried with the gradient vectors.

    Every one of the n_out queries returns its k = ceil(n_in * k_similar) nearest of the n_in
    activation vectors; all answers are flattened, those already active left out, and the ``count``
    best kept. For ``abs-ip`` each gradient vector is queried with both signs. Where too few are
    left, the query is repeated with twice the k until there are enough. k_similar = 1 is exact; a
    smaller one misses pairs of heavy rows (see the thesis' figure 3.1).

    faiss wants whole vectors: memory (n_in + n_out) * samples * 4 bytes, a convolution's input
    unfolded whole. This is slower than the exact search at every width that was measured; it is
    here because the thesis' results were made with it.

    metric: ``abs-ip``, ``ip``, ``l2``. k_similar: share of the activation vectors in (0, 1].
    """

    k_similar: float = 0.15
    metric: str = "abs-ip"
    needs_pairs: ClassVar[bool] = True
    observes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.k_similar <= 1:
            raise InputError(f"k_similar {self.k_similar} must be a share in (0, 1]")
        if self.metric not in METRICS:
            raise InputError(f"metric {self.metric!r} is unknown: choose {', '.join(METRICS)}")
        _import_faiss()

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
        if block != (1, 1):
            raise InputError(f"faiss searches single neurons, not blocks of {block}: use 'exact'")
        faiss = _import_faiss()
        chunks = [(x.cpu(), dz.cpu()) for x, dz in pairs.chunks()]
        base = np.ascontiguousarray(torch.cat([x for x, _ in chunks]).T.float().numpy())
        query = np.ascontiguousarray(torch.cat([dz for _, dz in chunks]).T.float().numpy())
        index = faiss.IndexFlatL2 if self.metric == "l2" else faiss.IndexFlatIP
        index = index(base.shape[1])
        index.add(base)

        taken = active.cpu()
        k = min(pairs.n_in, math.ceil(pairs.n_in * self.k_similar))
        flops = 0
        while True:
            keys, scores = self._query(index, query, k, pairs.n_in)
            queries = 2 if self.metric == "abs-ip" else 1
            flops += 2 * queries * pairs.samples * pairs.n_in * pairs.n_out
            if taken.numel():
                at = torch.searchsorted(taken, keys).clamp_(max=taken.numel() - 1)
                inactive = taken[at] != keys
                keys, scores = keys[inactive], scores[inactive]
            if keys.numel() >= count or k == pairs.n_in:
                break
            k = min(pairs.n_in, 2 * k)
        if keys.numel() < count:
            raise InputError(
                f"only {keys.numel()} of {count} connections have a finite score: the recorded "
                "vectors are too large, lower the learning rate or the loss scale"
            )
        chosen = select_largest(scores, count)
        keys, scores = keys[chosen].to(pairs.device), scores[chosen].to(pairs.device)
        return Connections(keys // grid.n_cols, keys % grid.n_cols, scores, flops)

    def _query(self, index: Any, query: np.ndarray, k: int, n_in: int) -> tuple[Tensor, Tensor]:
        """Sorted unique keys and their scores among the k nearest of every query."""
        scores, cols = index.search(query, k)
        rows = np.repeat(np.arange(len(query)), k)
        if self.metric == "abs-ip":
            negative, negative_cols = index.search(-query, k)
            scores = np.concatenate([scores.ravel(), negative.ravel()])
            cols = np.concatenate([cols.ravel(), negative_cols.ravel()])
            rows = np.concatenate([rows, rows])
            scores = np.abs(scores)
        elif self.metric == "l2":
            scores = -scores
        # faiss answers -1 where an overflown product leaves it without a neighbour.
        found = cols.ravel() >= 0
        keys, first = np.unique((rows * n_in + cols.ravel())[found], return_index=True)
        return torch.from_numpy(keys), torch.from_numpy(scores.ravel()[found][first])


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingLibraryError("faiss", "cpu", "growth 'faiss'") from error
    return faiss
