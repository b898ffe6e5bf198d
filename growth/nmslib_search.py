"""Growth by nearest-neighbour queries with nmslib, the other library of the thesis by Palaj."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from growth.connections import Block, Connections, check_query
from growth.errors import MissingLibraryError
from growth.neighbours import (
    Floats,
    Keys,
    check_graph,
    check_options,
    grow_from_neighbours,
    no_connections,
    refuse_blocks,
    whole_vectors,
)
from growth.pairs import Pairs, as_pairs

Answer = tuple[NDArray[np.int32], Floats]

KINDS = ("hnsw", "brute-force")

# nmslib's wheels are built without AVX, and say so at every import, in these lines.
_KNOWN_NOTICE = (
    b"Your CPU supports instructions that this binary was not compiled to use",
    b"For maximum performance, you can install NMSLIB from sources",
    b"pip install --no-binary :all: nmslib",
)


@dataclass(frozen=True)
class Nmslib:
    """An nmslib index of the activation vectors, queried with the gradient vectors.

    The search is that of :class:`growth.Faiss`: the k = ceil(n_in * k_similar) nearest of each
    query (``abs-ip``: of both signs), flattened; twice the k where too few are left, and the exact
    search for what a graph does not reach.

    index: ``hnsw``, a graph (Malkov and Yashunin, 2016) over the negative dot product or, for
    ``l2``, the distance; ``brute-force``, all vectors compared, exact with k_similar = 1.

    nmslib wants whole vectors: memory twice (n_in + n_out) * samples * 4 bytes, a convolution's
    input unfolded whole. The graph is built by one thread, for threads would build a new one every
    time. Slower than the exact search; here because the thesis considers it.

    flops: of ``brute-force`` all products; of ``hnsw``, which does not count them, those of the
    neighbours it answered with, a lower bound.

    metric: ``abs-ip``, ``ip``, ``l2``. k_similar: share of the activation vectors in (0, 1].
    links: links of a vector in a graph (M). ef_construction, ef_search: candidates that building
    and searching a graph keep; a search at least k.
    """

    k_similar: float = 0.15
    metric: str = "abs-ip"
    index: str = "hnsw"
    links: int = 16
    ef_construction: int = 40
    ef_search: int = 16
    needs_pairs: ClassVar[bool] = True
    observes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options("nmslib", self.k_similar, self.metric, self.index, KINDS)
        check_graph(self.links, self.ef_construction, self.ef_search)
        _import_nmslib()

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
        refuse_blocks("nmslib", block)
        if count == 0:
            return no_connections(pairs.device)
        base, query = whole_vectors(pairs)
        return grow_from_neighbours(
            pairs,
            grid,
            count,
            active,
            query,
            _Index(base, self),
            k_similar=self.k_similar,
            metric=self.metric,
            name=f"nmslib {self.index}",
        )


class _Index:
    def __init__(self, base: Floats, options: Nmslib) -> None:
        nmslib = _import_nmslib()
        self._n_in = len(base)
        self._is_graph = options.index == "hnsw"
        self._l2 = options.metric == "l2"
        self._ef_search = options.ef_search
        self.flops = 0
        self._index = nmslib.init(
            space="l2" if self._l2 else "negdotprod",
            method="hnsw" if self._is_graph else "brute_force",
            data_type=nmslib.DataType.DENSE_VECTOR,
            dtype=nmslib.DistType.FLOAT,
        )
        self._index.addDataPointBatch(base)
        parameters = {
            "M": options.links,
            "efConstruction": options.ef_construction,
            "indexThreadQty": 1,
            "post": 0,
        }
        # Levels in the graph are drawn from a generator of the thread, that begins with the thread
        # and that nobody can seed: only in a thread of its own is every graph the same.
        with ThreadPoolExecutor(1) as thread:
            building = thread.submit(
                self._index.createIndex,
                parameters if self._is_graph else {},
                print_progress=False,
            )
            building.result()

    def search(self, query: Floats, k: int) -> tuple[Floats, Keys]:
        if self._is_graph:
            self._index.setQueryTimeParams({"efSearch": max(self._ef_search, k)})
            answers = self._ask(query, k)
        else:
            answers = self._ask_for_lowest(query, k)
        scores = np.full((len(query), k), -np.inf, np.float32)
        cols = np.full((len(query), k), -1, np.int64)
        for row, (found, distances) in enumerate(answers):
            cols[row, : len(found)] = found
            scores[row, : len(found)] = -distances
        if self._l2 and not self._is_graph:
            # Only its graphs, which nmslib optimises, leave out the square root.
            scores = -np.square(scores)
        compared = int((cols >= 0).sum()) if self._is_graph else len(query) * self._n_in
        self.flops += 2 * query.shape[1] * compared
        return scores, cols

    def _ask(self, query: Floats, k: int) -> list[Answer]:
        answers: list[Answer] = self._index.knnQueryBatch(
            query, k=k, num_threads=torch.get_num_threads()
        )
        return answers

    def _ask_for_lowest(self, query: Floats, k: int) -> list[Answer]:
        """Among equal distances at the k-th, the lowest columns: nmslib itself keeps those whose
        addresses in memory are lowest, which are others in every run."""
        answers = self._ask(query, min(k + 1, self._n_in))
        for row, (cols, distances) in enumerate(answers):
            if k < len(distances) and distances[k - 1] == distances[k]:
                cols, distances = self._ask(query[row : row + 1], self._n_in)[0]
                order = np.lexsort((cols, distances))
                cols, distances = cols[order], distances[order]
            answers[row] = cols[:k], distances[:k]
        return answers


def _import_nmslib() -> Any:
    try:
        with nullcontext() if "nmslib" in sys.modules else _without_notice():
            import nmslib
    except ImportError as error:
        raise MissingLibraryError("nmslib", "cpu", "growth 'nmslib'") from error
    return nmslib


@contextmanager
def _without_notice() -> Iterator[None]:
    """Leaves out nmslib's notice, which it writes to the file descriptor of stderr, and passes on
    everything else that is written there meanwhile."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            caught.seek(0)
            for line in caught:
                if not line.startswith(_KNOWN_NOTICE):
                    os.write(2, line)
