"""The norm-ordered scan: the most similar of all pairs of two sets of vectors, exactly, most pairs
never looked at.

By the inequality of Cauchy and Schwarz no inner product exceeds the product of the norms. So both
sets are sorted by norm, the table of their pairs is cut into tiles, and the tiles are visited in
the order of their bounds; one whose bound lies below the running threshold ends the search. This
is the idea of LEMP (Teflioudi, Gemulla & Mykytiuk 2015) for joins of inner products, with one
threshold for all rows together.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from growth.active import ActiveKeys
from growth.running_top import Floats, Keys, RunningTop

SCREENS = ("auto", "float32", "bfloat16")

# A tile, with its mask, stays in a core's second-level cache.
TILE_ROWS, TILE_COLS = 256, 1024
# Trimmed tiles end at multiples of this, which products are fastest at.
_ALIGN = 16
# Tiles that share one threshold, so that the result does not depend on which thread is faster.
_LARGEST_WAVE = 16
# Tiles that are handed to a thread at a time.
_HANDED = 4


# Of a product in bfloat16, relative to the norms: both factors and the result are rounded to eight
# bits, each by up to 2^-8 of itself.
_HALF_ERROR = 3.1 * 2.0**-8
# Where that is small, for what bfloat16 cannot hold at all: its smallest normal number.
_HALF_SMALLEST = 2.0**-126
# Share of a tile's entries above which the active ones are marked in it.
_MARKED_SHARE = 1 / 16
# What a single product costs, as a multiple of one in a tile.
_SINGLE_COST = 32

# Keys and scores that reach the threshold, and how many pairs were computed.
_Found = tuple[Keys, Floats, int]


@dataclass(frozen=True)
class Scanned:
    """What a scan cost. flops: of the products. share: of all pairs whose product was computed."""

    flops: int
    share: float


def scan(
    x: Tensor,
    dz: Tensor,
    top: RunningTop,
    active: ActiveKeys,
    metric: str = "abs-ip",
    screen: str = "auto",
) -> Scanned:
    """Offer ``top`` every pair that is not active and may be among the best.

    x: (d, n_in), dz: (d, n_out), on the CPU, of one dtype. Keys are row * n_in + col, row being a
    column of dz. metric: ``abs-ip``, ``ip`` or ``l2``. Memory: a sorted copy of both, and a tile a
    thread. Runs on as many threads as PyTorch, with the same result for any number.
    """
    half = metric != "l2" and x.dtype == torch.float32 and _looks_in_half(screen)
    return _Scan(x, dz, top, active, _METRICS[metric], half).run()


def _looks_in_half(screen: str) -> bool:
    """Whether products are to be looked at in bfloat16 first."""
    if screen != "auto":
        return screen == "bfloat16"
    # Without units for it, a product in bfloat16 is slower than one in float32.
    able = (
        getattr(torch.cpu, f"_is_{unit}_supported", None) for unit in ("avx512_bf16", "amx_tile")
    )
    return any(ask is not None and ask() for ask in able)


class _Products:
    """Scores g, or |g|."""

    def __init__(self, absolute: bool) -> None:
        self.absolute = absolute

    def bounds(
        self, low: Floats, high: Floats, lows: Floats, highs: Floats, slack: float
    ) -> Floats:
        """Above every score of a norm in [low, high] with one in [lows, highs]. slack: rounding
        error of a product, relative to the product of the norms."""
        return high * highs * (1 + slack)

    def reach(
        self, low: float, high: float, largest: float, threshold: float, slack: float
    ) -> tuple[float, float]:
        """Between which norms, up to ``largest``, a partner of one in [low, high] must lie to
        reach the threshold."""
        if threshold <= 0 or high == 0:
            return 0.0, np.inf
        return threshold / (high * (1 + slack)), np.inf

    def score(self, tile: Floats, rows: Floats, cols: Floats) -> None:
        """Products of rows with cols -> their scores, in place."""
        if self.absolute:
            np.abs(tile, out=tile)


class _Distances:
    """Scores -||x - z||^2, which are at most -(||x|| - ||z||)^2."""

    def bounds(
        self, low: Floats, high: Floats, lows: Floats, highs: Floats, slack: float
    ) -> Floats:
        apart = np.maximum(0, np.maximum(lows - high, low - highs))
        return slack * (high**2 + highs**2) - apart**2

    def reach(
        self, low: float, high: float, largest: float, threshold: float, slack: float
    ) -> tuple[float, float]:
        apart = np.sqrt(max(0.0, slack * (high**2 + largest**2) - threshold))
        return low - apart, high + apart

    def score(self, tile: Floats, rows: Floats, cols: Floats) -> None:
        tile *= 2
        tile -= np.einsum("ij,ij->i", cols, cols)
        tile -= np.einsum("ij,ij->i", rows, rows)[:, None]


_METRICS: dict[str, _Products | _Distances] = {
    "abs-ip": _Products(absolute=True),
    "ip": _Products(absolute=False),
    "l2": _Distances(),
}


class _Scan:
    def __init__(
        self,
        x: Tensor,
        dz: Tensor,
        top: RunningTop,
        active: ActiveKeys,
        metric: _Products | _Distances,
        half: bool,
    ) -> None:
        self.top, self.active, self.metric = top, active, metric
        self.n_cols = x.shape[1]
        self.depth = x.shape[0]
        self.dtype = x.numpy().dtype
        # Of a product's rounding errors, relative to the norms.
        self.slack = 1e-6 + 2 * x.shape[0] * torch.finfo(x.dtype).eps
        self.cols, self.col_norms, self.x = _sorted_by_norm(x, TILE_COLS)
        self.rows, self.row_norms, self.dz = _sorted_by_norm(dz, TILE_ROWS)
        # Where each column stands in their order.
        self.place = np.empty_like(self.cols)
        self.place[self.cols] = np.arange(self.cols.size)
        self.halves: tuple[list[Tensor], list[Tensor]] | None = None
        if half:
            # Single vectors are read again, each of which has to lie in one piece.
            self.dz, self.x = (tuple(t.contiguous() for t in side) for side in (self.dz, self.x))
            self.halves = [t.bfloat16() for t in self.dz], [t.bfloat16() for t in self.x]
        self.local = threading.local()

    def run(self) -> Scanned:
        bounds = self._tile_bounds()
        visit = np.argsort(-bounds, axis=None, kind="stable")
        bounds = bounds.ravel()[visit]
        computed, at, wave = 0, 0, 1
        with _threads() as submit:
            # One wave is merged while the next is computed, with the threshold from before it.
            running: deque[list[Future[_Found]]] = deque()
            while True:
                going_on = at < visit.size and not bounds[at] < self.top.threshold
                if going_on:
                    threshold, tiles = self.top.threshold, visit[at : at + wave].tolist()
                    parts = [tiles[k : k + _HANDED] for k in range(0, len(tiles), _HANDED)]
                    running.append([submit(self._tiles, part, threshold) for part in parts])
                    at += wave
                elif not running:
                    break
                # The first tiles raise the threshold the most, and are waited for.
                if len(running) == 2 or wave < _LARGEST_WAVE or not going_on:
                    computed += self._merge(running.popleft())
                    # Without a threshold, all of a tile is kept.
                    if self.top.threshold > -np.inf:
                        wave = min(2 * wave, _LARGEST_WAVE)
        return Scanned(2 * self.depth * computed, computed / (self.rows.size * self.cols.size))

    def _merge(self, wave: list[Future[_Found]]) -> int:
        """Offer what a wave found; the number of pairs that were computed."""
        keys, scores, computed = _joined([future.result() for future in wave])
        self.top.offer(keys, scores)
        return computed

    def _tile_bounds(self) -> Floats:
        """(tiles of rows, tiles of columns): what no score in it exceeds."""
        highs, lows = _ends(self.col_norms, TILE_COLS)
        high, low = _ends(self.row_norms, TILE_ROWS)
        with np.errstate(invalid="ignore", over="ignore"):
            bounds = self.metric.bounds(low[:, None], high[:, None], lows, highs, self.slack)
        # Norms beyond the range of numbers tell nothing.
        return np.where(np.isnan(bounds), np.inf, bounds)

    def _tiles(self, numbers: list[int], threshold: float) -> _Found:
        return _joined([self._tile(number, threshold) for number in numbers])

    def _tile(self, number: int, threshold: float) -> _Found:
        i, j = divmod(number, len(self.x))
        dz, x = self.dz[i], self.x[j]
        row_norms = self.row_norms[i * TILE_ROWS :][: len(dz)]
        col_norms = self.col_norms[j * TILE_COLS :][: len(x)]
        cols = self._reach(col_norms, row_norms, threshold)
        rows = self._reach(row_norms, col_norms[cols], threshold)
        row_norms, col_norms = row_norms[rows], col_norms[cols]
        m, n = row_norms.size, col_norms.size
        if m * n == 0:
            return np.empty(0, np.int64), np.empty(0, self.dtype), 0
        dz, x = dz[rows], x[cols]
        passed = None
        if self.halves is not None and threshold > -np.inf:
            halves = self.halves[0][i][rows], self.halves[1][j][cols]
            passed = self._passing(*halves, row_norms, col_norms[0], threshold)
        if passed is None:
            row, col, found = self._reaching(dz, x, threshold)
        else:
            row, col = np.divmod(passed, n)
            scores = (dz[torch.from_numpy(row)] * x[torch.from_numpy(col)]).sum(1).numpy()
            self.metric.score(scores, dz.numpy(), x.numpy())
            enough = scores >= threshold
            row, col, found = row[enough], col[enough], scores[enough]
        keys = self.rows[i * TILE_ROWS + rows.start :][row] * self.n_cols
        keys += self.cols[j * TILE_COLS + cols.start :][col]
        if keys.size > _MARKED_SHARE * m * n:
            free = self._unmarked(i, j, rows, cols, row, col)
        else:
            free = self.active.absent(keys)
        return (keys, found, m * n) if free is None else (keys[free], found[free], m * n)

    def _unmarked(
        self, i: int, j: int, rows: slice, cols: slice, row: Keys, col: Keys
    ) -> NDArray[np.int64] | None:
        """Positions of the entries of a tile that are not active; None: all of them. Where they
        are many, the active ones are marked in the tile, rather than asked for one by one."""
        at, active = self.active.in_rows(self.rows[i * TILE_ROWS :][rows], self.n_cols)
        if not active.size:
            return None
        m, n = rows.stop - rows.start, cols.stop - cols.start
        place = self.place[active] - (j * TILE_COLS + cols.start)
        inside = (place >= 0) & (place < n)
        _, mask = self._buffers(m, n)
        mask[:] = False
        mask[at[inside], place[inside]] = True
        return np.flatnonzero(~mask[row, col])

    def _reaching(
        self, dz: Tensor, x: Tensor, threshold: float
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
        """Rows and columns of a tile whose scores reach the threshold, and these scores."""
        tile, mask = self._buffers(len(dz), len(x))
        torch.mm(dz, x.T, out=tile)
        scores = tile.numpy()
        self.metric.score(scores, dz.numpy(), x.numpy())
        np.greater_equal(scores, threshold, out=mask)
        at = np.flatnonzero(mask)
        row = at // len(x)
        return row, at - row * len(x), scores.ravel()[at]

    def _passing(
        self, dz: Tensor, x: Tensor, row_norms: Floats, col_norm: float, threshold: float
    ) -> NDArray[np.int64] | None:
        """Positions in a tile whose products in bfloat16 may reach the threshold in float32; None
        where they are so many that the whole tile is the cheaper. row_norms: of dz; col_norm: the
        largest of x."""
        scores, mask = self._buffers(len(dz), len(x))
        scores.copy_(torch.mm(dz, x.T))
        if isinstance(self.metric, _Products) and self.metric.absolute:
            scores.abs_()
        error = (_HALF_ERROR + self.slack) * row_norms * col_norm
        error += _HALF_SMALLEST * self.depth * (row_norms + col_norm + 1)
        least = torch.from_numpy(threshold - error).float()
        # What leaves the range of bfloat16 may be no number there.
        torch.lt(scores, least[:, None], out=torch.from_numpy(mask)).logical_not_()
        at = np.flatnonzero(mask)
        return at if at.size * _SINGLE_COST < scores.numel() else None

    def _reach(self, norms: Floats, partners: Floats, threshold: float) -> slice:
        """The part of a tile's side that can reach the threshold with any of these partners. Both
        norms descend."""
        whole = slice(0, norms.size)
        if not partners.size or not np.isfinite([threshold, partners[0], norms[0]]).all():
            return whole
        least, most = self.metric.reach(partners[-1], partners[0], norms[0], threshold, self.slack)
        start = int(np.searchsorted(-norms, -most, "left")) // _ALIGN * _ALIGN
        stop = -(-int(np.searchsorted(-norms, -least, "right")) // _ALIGN) * _ALIGN
        return slice(start, max(start, min(norms.size, stop)))

    def _buffers(self, m: int, n: int) -> tuple[Tensor, NDArray[np.bool_]]:
        """A thread's own, which it overwrites with every tile."""
        if not hasattr(self.local, "tile"):
            self.local.tile = torch.empty(TILE_ROWS * TILE_COLS, dtype=self.x[0].dtype)
            self.local.mask = np.empty(TILE_ROWS * TILE_COLS, bool)
        return self.local.tile[: m * n].view(m, n), self.local.mask[: m * n].reshape(m, n)


def _joined(found: list[_Found]) -> _Found:
    keys, scores, computed = zip(*found, strict=True)
    return np.concatenate(keys), np.concatenate(scores), sum(computed)


def _ends(norms: Floats, step: int) -> tuple[Floats, Floats]:
    """The largest and the smallest norm of each tile; norms descend."""
    starts = np.arange(0, norms.size, step)
    return norms[starts], norms[np.minimum(starts + step, norms.size) - 1]


def _sorted_by_norm(
    vectors: Tensor, step: int
) -> tuple[NDArray[np.int64], Floats, tuple[Tensor, ...]]:
    """vectors: (d, n) -> where its columns come from, their norms in float64, descending, and the
    columns in that order as rows, ``step`` of them a tensor."""
    norms = column_norms(vectors)
    order = np.argsort(-norms, kind="stable")
    # Rows of a transposed view: products read either order as fast, and a copy takes three times
    # as long as gathering along the rows of ``vectors``.
    rows = vectors.index_select(1, torch.from_numpy(order)).T
    return order, norms[order], rows.split(step)


def column_norms(vectors: Tensor) -> Floats:
    """Euclidean norms of the columns, float64 (n,)."""
    values = vectors.numpy()
    with np.errstate(over="ignore", under="ignore"):
        norms = np.sqrt(np.einsum("ij,ij->j", values, values)).astype(np.float64)
    # Squares leave a float's range long before its values do.
    limit = np.sqrt(np.finfo(values.dtype).tiny) * 1e6
    unsafe = ~((norms > limit) & (norms < 1 / limit))
    if unsafe.any():
        wide = values[:, unsafe].astype(np.float64)
        largest = np.abs(wide).max(0)
        largest[largest == 0] = 1
        norms[unsafe] = largest * np.sqrt(((wide / largest) ** 2).sum(0))
    return norms


@contextmanager
def _threads() -> Iterator[Callable[..., Future[_Found]]]:
    """Yields ``submit`` of as many threads as PyTorch has, each of which runs one of PyTorch's."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.submit
    finally:
        # The number is a thread's own, and also the one that threads to come begin with.
        torch.set_num_threads(threads)
