"""Growth by nearest-neighbour queries with faiss, as the master thesis by Palaj (2023) does it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from growth.connections import Block, Connections, Grid, check_query
from growth.errors import InputError, MissingLibraryError
from growth.neighbours import (
    Candidates,
    Floats,
    Index,
    Keys,
    check_graph,
    check_options,
    completed,
    grow_from_neighbours,
    no_connections,
    refuse_blocks,
    whole_vectors,
)
from growth.pairs import LinearPairs, Pairs, as_pairs

T = TypeVar("T")

KINDS = ("flat", "ivf", "hnsw", "lsh", "range")

# faiss selects no more neighbours than this a query on a GPU.
GPU_NEIGHBOURS = 2048
# Scratch memory on a GPU; faiss takes 1.5 GB of a large one unless told.
GPU_SCRATCH_BYTES = 256 << 20
# Pairs that one range query may answer with: 12 bytes each.
RANGE_PAIRS = 1 << 22
# Longer vectors are folded to this before they are hashed: faiss rotates them by a matrix of
# bits x length, and finds it in time cubic in the larger of them.
LSH_LENGTH = 512
# Share of neighbours above which a whole product is faster than single entries of it.
GATHER_SHARE = 0.03
# Queries that are compared with all vectors on one thread, at most.
SHARE = 128
SEED = 1234


@dataclass(frozen=True)
class Faiss:
    """An index of the activation vectors, queried with the gradient vectors.

    Every one of the n_out queries returns its k = ceil(n_in * k_similar) nearest of the n_in
    activation vectors; all answers are flattened, those already active left out, and the ``count``
    best kept. For ``abs-ip`` each gradient vector is queried with both signs. Where too few are
    left, the query is repeated with twice the k until there are enough; where an approximate index
    has no more to give, the exact search makes up the rest. k_similar = 1 on a flat index is exact;
    a smaller one misses pairs of heavy rows (see the thesis' figure 3.1).

    index:
    ``flat``   all vectors are compared. On a GPU that faiss can use, it is searched there.
    ``ivf``    ceil(sqrt(n_in)) lists by k-means, ``nprobe`` of them (a share) visited.
    ``hnsw``   a graph with ``links`` links a vector.
    ``lsh``    ``bits`` * length signs of a random rotation, compared by Hamming distance, which is
               a distance of angles; the answers are rescored exactly, and ranked by that. Vectors
               of more than 512 values are first folded to 512 by random signs.
    ``range``  every pair above the running threshold: exact for all metrics, k_similar not used.

    faiss wants whole vectors: memory (n_in + n_out) * samples * 4 bytes, as much again in most
    indexes. Vectors longer than n_in + n_out, as a convolution's are, are rotated into so many
    dimensions, by the inner products of all with each other. This is slower than the exact search
    at every width that was measured; it is here because the thesis' results were made with it.

    flops counts products: all of them for ``flat`` and ``range``; k-means, coarse and fine
    distances for ``ivf``; the distances of the search alone, not of the construction, for
    ``hnsw``; hashing and rescoring for ``lsh``, whose comparisons are no floating point.

    metric: ``abs-ip``, ``ip``, ``l2``. k_similar: share of the activation vectors in (0, 1].
    bits: length of an LSH code as a multiple of the vectors' length. nprobe: share of the lists in
    (0, 1]. links: links of a vector in a graph (M). ef_construction, ef_search: candidates that
    building and searching a graph keep; a search at least k.
    """

    k_similar: float = 0.15
    metric: str = "abs-ip"
    index: str = "flat"
    bits: float = 2.0
    nprobe: float = 0.25
    links: int = 16
    ef_construction: int = 40
    ef_search: int = 16
    needs_pairs: ClassVar[bool] = True
    observes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options("faiss", self.k_similar, self.metric, self.index, KINDS)
        check_graph(self.links, self.ef_construction, self.ef_search)
        if not 0 < self.bits < math.inf:
            raise InputError(f"bits {self.bits} must be a positive multiple, such as 2")
        if not 0 < self.nprobe <= 1:
            raise InputError(f"nprobe {self.nprobe} must be a share of the lists in (0, 1]")
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
        refuse_blocks("faiss", block)
        if count == 0:
            return no_connections(pairs.device)
        base, query = whole_vectors(pairs)
        if self.index == "range":
            return self._grow_in_range(pairs, grid, count, active, base, query)
        index = self._build(base, pairs.device)
        return grow_from_neighbours(
            pairs,
            grid,
            count,
            active,
            query,
            index,
            k_similar=self.k_similar,
            metric=self.metric,
            name=f"faiss {self.index}",
        )

    def _build(self, base: Floats, device: torch.device) -> Index:
        if self.index == "flat":
            return _Flat(base, self.metric, *exhaustive_search(_import_faiss(), device))
        if self.index == "ivf":
            return _InvertedLists(base, self.metric, self.nprobe)
        if self.index == "hnsw":
            return _Graph(base, self.metric, self.links, self.ef_construction, self.ef_search)
        return _Hashes(base, self.metric, self.bits)

    def _grow_in_range(
        self,
        pairs: Pairs,
        grid: Grid,
        count: int,
        active: Tensor,
        base: Floats,
        query: Floats,
    ) -> Connections:
        """Queries in batches, those with the best prospects first; the radius is the count-th best
        score so far, never above the final one, so that nothing is missed or asked twice."""
        faiss = _import_faiss()
        kind = faiss.IndexFlatL2 if self.metric == "l2" else faiss.IndexFlatIP
        index = kind(base.shape[1])
        index.add(base)
        del base
        taken = active.cpu().numpy()
        found = Candidates(count, taken, grid.size)
        norms = np.einsum("ij,ij->i", query, query)
        order = np.argsort(norms if self.metric == "l2" else -norms, kind="stable")
        signs = (1, -1) if self.metric == "abs-ip" else (1,)
        most = max(1, RANGE_PAIRS // grid.n_cols)
        # As many as it takes to have a threshold, and from there on twice as many at a time.
        start, step = 0, max(64, -(-2 * count // grid.n_cols))
        while start < len(order):
            step = min(most, step)
            rows = order[start : start + step]
            for sign in signs:
                of, cols, scores = self._in_range(index, sign * query[rows], found.threshold)
                if sign < 0:
                    # A product of zero is in the range of both.
                    of, cols, scores = of[scores > 0], cols[scores > 0], scores[scores > 0]
                found.offer(rows[of] * grid.n_cols + cols, scores)
            start, step = start + step, 2 * step
        flops = 2 * len(signs) * pairs.samples * pairs.n_in * pairs.n_out
        report = {
            "search": "faiss range",
            "radius": found.threshold,
            "queries repeated": 0,
        }
        return completed(pairs, grid, count, taken, found, self.metric, flops, report)

    def _in_range(self, index: Any, query: Floats, threshold: float) -> tuple[Keys, Keys, Floats]:
        """(queries, columns, scores) of what is not below the threshold. faiss answers with what
        is strictly inside of its radius, hence the next float."""
        lowest = np.float32(threshold)
        if self.metric == "l2":
            radius = np.nextafter(-lowest, np.float32(np.inf))
        else:
            if self.metric == "abs-ip":
                # The other sign's query answers with the products below zero.
                lowest = max(lowest, np.float32(0))
            radius = np.nextafter(lowest, np.float32(-np.inf))
        found = _in_shares(lambda part: index.range_search(part, float(radius)), query)
        counts, distances, cols = (
            np.concatenate(parts)
            for parts in zip(
                *((np.diff(e.astype(np.int64)), d, c) for e, d, c in found), strict=True
            )
        )
        of = np.repeat(np.arange(len(query)), counts)
        return of, cols, -distances if self.metric == "l2" else distances


def exhaustive_search(faiss: Any, device: torch.device) -> tuple[Callable[..., Any], int | None]:
    """(faiss' k-nearest-neighbour function for a device, the most neighbours it gives)."""
    if device.type != "cuda" or not hasattr(faiss, "StandardGpuResources"):
        return _knn, None
    if faiss.get_num_gpus() == 0:
        return _knn, None
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(GPU_SCRATCH_BYTES)
    return partial(faiss.knn_gpu, resources, device=device.index or 0), GPU_NEIGHBOURS


def _knn(query: Floats, base: Floats, k: int, metric: int) -> tuple[Floats, Keys]:
    def search(part: Floats) -> tuple[Floats, Keys]:
        return _import_faiss().knn(part, base, k, metric=metric)  # type: ignore[no-any-return]

    distances, cols = zip(*_in_shares(search, query), strict=True)
    return np.concatenate(distances), np.concatenate(cols)


class _Flat:
    """All vectors are compared. Where ``knn`` gives at most ``most`` neighbours and more are
    wanted, it searches tiles of ``most`` vectors, whose answers are merged."""

    def __init__(
        self, base: Floats, metric: str, knn: Callable[..., Any], most: int | None
    ) -> None:
        self.flops = 0
        self._base, self._knn = base, knn
        self._most = most or len(base)
        self._l2 = metric == "l2"

    def search(self, query: Floats, k: int) -> tuple[Floats, Keys]:
        self.flops += 2 * query.size * len(self._base)
        tile = len(self._base) if k <= self._most else self._most
        scores, cols = self._search_tile(query, 0, tile, k)
        for start in range(tile, len(self._base), tile):
            more = self._search_tile(query, start, start + tile, k)
            scores = np.concatenate([scores, more[0]], axis=1)
            cols = np.concatenate([cols, more[1]], axis=1)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            scores = np.take_along_axis(scores, best, axis=1)
            cols = np.take_along_axis(cols, best, axis=1)
        return scores, cols

    def _search_tile(self, query: Floats, start: int, stop: int, k: int) -> tuple[Floats, Keys]:
        faiss = _import_faiss()
        tile = self._base[start:stop]
        metric = faiss.METRIC_L2 if self._l2 else faiss.METRIC_INNER_PRODUCT
        distances, cols = self._knn(query, tile, min(k, len(tile)), metric=metric)
        # An answer that is missing (-1) must not become a column.
        return -distances if self._l2 else distances, np.where(cols < 0, cols, cols + start)


class _InvertedLists:
    """Vectors in ceil(sqrt(n_in)) lists by k-means; the lists nearest to a query are visited."""

    def __init__(self, base: Floats, metric: str, nprobe: float) -> None:
        faiss = _import_faiss()
        if not np.isfinite(4 * np.einsum("ij,ij->i", base, base).max()):
            # k-means would abort the process.
            raise InputError(
                "squared norms of the activations overflow float32, and faiss cannot cluster "
                "them: lower the learning rate, or use the index 'flat'"
            )
        n_in, samples = base.shape
        lists = math.ceil(math.sqrt(n_in))
        kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        self._quantizer = faiss.IndexFlat(samples, kind)
        self._index = faiss.IndexIVFFlat(self._quantizer, samples, lists, kind)
        clustering = self._index.cp
        clustering.seed, clustering.spherical = SEED, metric != "l2"
        # There are sqrt(n_in) vectors a list, which faiss would call too few.
        clustering.min_points_per_centroid = 1
        with _one_thread(faiss):
            self._index.train(base)
            self._index.add(base)
        self._index.nprobe = math.ceil(nprobe * lists)
        self._l2, self._to_lists = metric == "l2", 2 * samples * lists
        self.flops = (clustering.niter + 1) * n_in * self._to_lists

    def search(self, query: Floats, k: int) -> tuple[Floats, Keys]:
        statistics = _import_faiss().cvar.indexIVF_stats
        before = statistics.ndis
        distances, cols = self._index.search(query, k)
        compared = statistics.ndis - before
        self.flops += len(query) * self._to_lists + 2 * query.shape[1] * compared
        return -distances if self._l2 else distances, cols


class _Graph:
    """Hierarchical navigable small worlds (Malkov and Yashunin, 2016)."""

    def __init__(
        self, base: Floats, metric: str, links: int, ef_construction: int, ef_search: int
    ) -> None:
        faiss = _import_faiss()
        kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        self._index = faiss.IndexHNSWFlat(base.shape[1], links, kind)
        self._index.hnsw.efConstruction = ef_construction
        # Threads would link the vectors in the order in which they happen to come.
        with _one_thread(faiss):
            self._index.add(base)
        self._l2, self._ef_search, self.flops = metric == "l2", ef_search, 0

    def search(self, query: Floats, k: int) -> tuple[Floats, Keys]:
        # faiss gives k answers of fewer candidates too, and far worse ones.
        self._index.hnsw.efSearch = max(self._ef_search, k)
        statistics = _import_faiss().cvar.hnsw_stats
        before = statistics.ndis
        distances, cols = self._index.search(query, k)
        self.flops += 2 * query.shape[1] * (statistics.ndis - before)
        return -distances if self._l2 else distances, cols


class _Hashes:
    """Locality-sensitive hashing by signs (Charikar, 2002), with exact rescoring."""

    def __init__(self, base: Floats, metric: str, bits: float) -> None:
        faiss = _import_faiss()
        self._base, self._l2 = base, metric == "l2"
        folded = _fold(base)
        length = folded.shape[1]
        bits_in_all = max(1, math.ceil(bits * length))
        self._index = faiss.clone_index(_empty_hashes(length, bits_in_all))
        self._index.add(folded)
        self._hashing = 2 * length * bits_in_all
        self.flops = len(base) * self._hashing

    def search(self, query: Floats, k: int) -> tuple[Floats, Keys]:
        _, cols = self._index.search(_fold(query), k)
        cols.sort(axis=1)
        near = LinearPairs(torch.from_numpy(self._base).T, torch.from_numpy(query).T)
        self.flops += len(query) * self._hashing
        if k > GATHER_SHARE * len(self._base):
            self.flops += 2 * query.size * len(self._base)
            scores = near.products(0, len(query)).gather(1, torch.from_numpy(cols))
        else:
            self.flops += 2 * query.size * k
            rows = torch.arange(len(query)).repeat_interleave(k)
            scores = near.products_at(rows, torch.from_numpy(cols).flatten()).view(-1, k)
        if self._l2:
            of_base, of_query = near.squared_norms()
            scores = 2 * scores - of_base[torch.from_numpy(cols)] - of_query[:, None]
        return scores.numpy(), cols


@lru_cache(maxsize=32)
def _empty_hashes(length: int, bits: int) -> Any:
    """An index without vectors, to clone: its rotation takes long to find, and is always the
    same."""
    return _import_faiss().IndexLSH(length, bits)


def _fold(vectors: Floats) -> Floats:
    """Vectors of at most ``LSH_LENGTH`` values: of longer ones, every ``LSH_LENGTH``-th is added
    up under random signs, which keeps inner products in the mean (Charikar et al., 2002)."""
    samples = vectors.shape[1]
    if samples <= LSH_LENGTH:
        return vectors
    signs = np.random.default_rng(SEED).choice(np.array([-1, 1], np.float32), samples)
    folded = np.zeros((len(vectors), LSH_LENGTH), np.float32)
    for start in range(0, samples, LSH_LENGTH):
        part = slice(start, min(start + LSH_LENGTH, samples))
        folded[:, : part.stop - start] += vectors[:, part] * signs[part]
    return folded


@contextmanager
def _one_thread(faiss: Any) -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _in_shares(search: Callable[[Floats], T], query: Floats) -> list[T]:
    """The answers to at most ``SHARE`` queries at a time, each share on one thread: the BLAS of
    faiss may round differently on another number of threads."""
    faiss = _import_faiss()
    shares = np.array_split(query, max(1, -(-len(query) // SHARE)))
    count = min(faiss.omp_get_max_threads(), len(shares))
    if count == 1:
        with _matrix_products(faiss), _one_thread(faiss):
            return [search(share) for share in shares]
    # OpenMP keeps this number for each thread.
    with (
        _matrix_products(faiss),
        ThreadPoolExecutor(count, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool,
    ):
        return list(pool.map(search, shares))


@contextmanager
def _matrix_products(faiss: Any) -> Iterator[None]:
    """faiss compares batches that it finds small vector by vector, from 1.15 on up to a thousand
    queries, which takes two to four times as long."""
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = min(before, 20)
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingLibraryError("faiss", "cpu", "growth 'faiss'") from error
    return faiss
