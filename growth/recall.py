"""Estimating, from some rows of G, which share of the best a search finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from growth.running_top import BINS, Floats, Keys, bin_edge, bins_of

# A row is drawn at least as if its vector had this share of the mean squared norm: the lightest
# rows would stand for too many others.
_FLOOR = 0.2
# Of the threshold of the best; twice as many candidates lie above it unless nothing is told apart.
_FAR_BELOW = 0.3


class Estimate(NamedTuple):
    """A recall, and its standard error."""

    recall: float
    error: float

    @property
    def at_least(self) -> float:
        """What the recall is with a probability of 97 %."""
        return self.recall - 2 * self.error


class RecallSample:
    """Some rows of scores, computed whole.

    Rows of long vectors, which hold the most of the best, are drawn the more often and stand for
    the fewer (Horvitz & Thompson 1952), and so are rows that an approximation misses; they are
    drawn systematically in the order of their norms, so that every kind of row is there in its
    share.

    norms: (n_rows,) of the rows' vectors. rows: how many are drawn. active: sorted keys. count: how
    many are searched. score: rows, ascending -> their scores (rows, n_cols), none negative.
    generator: of the draw; None: a seed of its own. missed: (n_rows,) norms of what an
    approximation leaves out of each row. threshold: what about ``count`` of all reach.
    """

    def __init__(
        self,
        norms: Floats,
        rows: int,
        active: Keys,
        count: int,
        score: Callable[[NDArray[np.int64]], Floats],
        generator: torch.Generator | None = None,
        missed: Floats | None = None,
    ) -> None:
        squares = _shares(norms)
        sizes = squares + _FLOOR * squares.mean()
        if missed is not None:
            # A few rows may hold most of it, in a direction that all others lack.
            sizes += _shares(missed)
        chances = _chances(sizes, min(rows, squares.size))
        start = float(torch.rand((), generator=generator or torch.Generator().manual_seed(0)))
        self.count = count
        self.rows = _draw(chances, np.argsort(-squares, kind="stable"), start)
        self.weights = 1 / chances[self.rows]
        scores = score(self.rows)
        self.n_cols = scores.shape[1]
        self._taken = self._positions(active)
        self.exact = self._flat(scores)
        self.threshold = self._threshold(self.exact, count, 0.0)
        self._best = np.flatnonzero(self.exact >= self.threshold)

    @property
    def evidence(self) -> int:
        """How many of the best are among the sampled."""
        return self._best.size

    def foreseen(self, approximate: Floats, wanted: int) -> Estimate:
        """The recall that can be reached with the ``wanted`` best by approximate scores as
        candidates. approximate: (rows, n_cols) those of the sampled rows."""
        missed = self._flat(approximate)[self._best] < self.least(approximate, wanted)
        return self._estimate(self._best[missed])

    def least(self, approximate: Floats, wanted: int) -> float:
        """What the ``wanted`` best reach by approximate scores."""
        # What lies far below the best need not be looked at.
        return self._threshold(self._flat(approximate), wanted, _FAR_BELOW * self.threshold)

    def reached(self, keys: Keys, scores: Floats) -> Estimate:
        """The recall of ``count`` pairs that were found: keys, ascending, and exact scores."""
        missed = self.exact > scores.min(initial=np.inf)
        missed[self._positions(keys)] = False
        at = np.flatnonzero(missed)
        at = at[np.argsort(-self.exact[at], kind="stable")]
        # Going down the scores, what was found and what was missed together reach ``count`` at the
        # threshold of the exact search: only what was missed above it counts.
        lost = self.weights[at // self.n_cols].cumsum()
        found = self.count - np.sort(scores).searchsorted(self.exact[at], "right")
        above = int((found + lost < self.count).sum())
        return self._estimate(at[: above + 1])

    def _estimate(self, missed: NDArray[np.int64]) -> Estimate:
        """missed: positions in the sample of what should have been found."""
        in_row = np.bincount(missed // self.n_cols, minlength=self.rows.size)
        lost = in_row * self.weights
        # The variance of rows drawn independently, which systematic sampling undercuts.
        error = float(np.sqrt((lost**2 * (1 - 1 / self.weights)).sum()))
        count = max(1, self.count)
        return Estimate(max(0.0, 1 - float(lost.sum()) / count), error / count)

    def _flat(self, scores: Floats) -> Floats:
        """A view, -1 where active."""
        scores = scores.reshape(-1)
        scores[self._taken] = -1
        return scores

    def _positions(self, keys: Keys) -> NDArray[np.int64]:
        """Where those of the keys, ascending, that lie in sampled rows stand in the sample."""
        first = keys.searchsorted(self.rows * self.n_cols)
        last = keys.searchsorted((self.rows + 1) * self.n_cols)
        parts = [
            keys[a:b] - (row - i) * self.n_cols
            for i, (row, a, b) in enumerate(zip(self.rows, first, last, strict=True))
        ]
        return np.concatenate(parts)

    def _threshold(self, scores: Floats, count: int, least: float) -> float:
        """What ``count`` pairs of all rows reach, or a few more, to a bin's width, where it is more
        than ``least``; else ``least``."""
        at = np.flatnonzero(scores >= least)
        weights = self.weights[at // self.n_cols]
        above = np.bincount(bins_of(scores[at]), weights, BINS)[::-1].cumsum()
        if above[-1] < count:
            return least
        return max(least, bin_edge(BINS - 1 - int(above.searchsorted(count)), scores.dtype))


def _shares(norms: Floats) -> Floats:
    """Squares, of a mean of 1; all alike where all are zero."""
    # Of scaled norms, so that no square leaves the range.
    largest = norms.max()
    squares = (norms / largest) ** 2 if largest else np.ones_like(norms)
    return squares / squares.mean()


def _chances(sizes: Floats, count: int) -> Floats:
    """Chances in proportion to sizes, at most 1, that add up to ``count``."""
    order = np.argsort(-sizes, kind="stable")
    left = sizes[order][::-1].cumsum()[::-1]
    # The largest are certain as long as their share of what is left exceeds 1.
    certain = int(((count - np.arange(sizes.size)) * sizes[order] >= left).cumprod().sum())
    chances = np.ones(sizes.size)
    if certain < sizes.size:
        rest = order[certain:]
        chances[rest] = np.minimum(1, (count - certain) * sizes[rest] / left[certain])
    return chances


def _draw(chances: Floats, order: NDArray[np.int64], start: float) -> NDArray[np.int64]:
    """A systematic sample: whoever's chance takes the sum past a whole number. start: in [0, 1)."""
    passed = np.floor(chances[order].cumsum() + start)
    return np.sort(order[np.diff(passed, prepend=0.0) >= 1])
