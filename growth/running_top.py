"""A running top-K: the best of a stream of scored keys, with a threshold that only rises."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from growth.errors import InputError

Floats = NDArray[Any]
Keys = NDArray[np.int64]

# A bin holds the float32 that share sign, exponent and the upper seven bits of their mantissa: it
# is 0.8 % wide.
_SHIFT = 16
BINS = 1 << (32 - _SHIFT)
# Entries held beyond twice the count, so that few of them are not partitioned over and over.
SLACK = 64 << 10


class RunningTop:
    """The best ``count`` of a stream of (key, score), by score and, among equals, by lowest key.

    The order in which they come does not matter. ``threshold`` is at every moment a lower bound of
    the final one, so that what lies strictly below it need not be offered. It follows a histogram
    of the scores by their leading bits, which costs far less than partitioning whenever it might
    rise; only where more scores than there is room for share a bin (ties) is the buffer
    partitioned. Memory: 2 count + ``slack`` entries of 12 bytes (16 in float64), half a megabyte.

    Scores hold no NaN; -inf is never chosen.
    """

    def __init__(self, count: int, dtype: Any = np.float32, slack: int | None = None) -> None:
        self.count = count
        self.threshold: float = -np.inf if count else np.inf
        self._room = 2 * count + (SLACK if slack is None else slack) if count else 0
        self._keys = np.empty(self._room, np.int64)
        self._scores = np.empty(self._room, dtype)
        self._held = 0
        self._histogram = np.zeros(BINS, np.int64)
        # Among scores that equal the threshold, keys from here on come too late.
        self._too_late = np.iinfo(np.int64).max

    def offer(self, keys: Keys, scores: Floats) -> None:
        """keys: int64 (n,), none offered before; scores: (n,)."""
        # As much is free after all but the best were forgotten.
        step = max(1, self._room - self.count)
        for start in range(0, keys.size if self.count else 0, step):
            self._offer(keys[start : start + step], scores[start : start + step])

    def _offer(self, keys: Keys, scores: Floats) -> None:
        keys, scores = self._promising(keys, scores)
        if self._held + keys.size > self._room:
            self._compact(keys.size)
            keys, scores = self._promising(keys, scores)
        new = slice(self._held, self._held + keys.size)
        self._keys[new], self._scores[new] = keys, scores
        self._held = new.stop
        self._histogram += np.bincount(bins_of(scores), minlength=BINS)
        self._raise()

    def _promising(self, keys: Keys, scores: Floats) -> tuple[Keys, Floats]:
        if scores.min(initial=np.inf) > self.threshold:
            return keys, scores
        better = scores > self.threshold
        if self.threshold > -np.inf:
            better |= (scores == self.threshold) & (keys < self._too_late)
        return keys[better], scores[better]

    def _raise(self) -> None:
        """Lift the threshold to the lower edge of the bin that the count-th best lies in."""
        if self._held < self.count:
            return
        lowest = int(bins_of(np.array([self.threshold]))[0])
        above = self._histogram[: lowest - 1 if lowest else None : -1].cumsum()
        edge = bin_edge(BINS - 1 - int(np.searchsorted(above, self.count)), self._scores.dtype)
        if edge > self.threshold:
            self.threshold, self._too_late = edge, np.iinfo(np.int64).max

    def _compact(self, wanted: int) -> None:
        """Make room for ``wanted``: forget what lies below the threshold, and where that is too
        little, all but the best."""
        self._keep(np.flatnonzero(self._scores[: self._held] >= self.threshold))
        if self._held + wanted > self._room:
            keys, scores = self._keys[: self._held], self._scores[: self._held]
            best = select_best(keys, scores, self.count)
            self.threshold = float(scores[best].min())
            self._too_late = int(keys[best[scores[best] == self.threshold]].max())
            self._keep(best)
            self._histogram = np.bincount(bins_of(self._scores[: self._held]), minlength=BINS)

    def _keep(self, at: NDArray[np.int64]) -> None:
        self._keys[: at.size] = self._keys[at]
        self._scores[: at.size] = self._scores[at]
        self._held = at.size

    @property
    def held(self) -> int:
        """How many there are, of which more than ``count`` are there only for the time being."""
        return self._held

    def result(self) -> tuple[Keys, Floats]:
        """Keys, ascending, and their scores. Raises InputError when fewer than ``count`` scores
        were better than -inf: the vectors were too large for their products."""
        keys, scores = self.so_far()
        if keys.size < self.count:
            raise InputError(
                f"only {keys.size} of {self.count} connections have a finite score: the recorded "
                "vectors are too large, lower the learning rate or the loss scale"
            )
        return keys, scores

    def so_far(self) -> tuple[Keys, Floats]:
        """The same, of as many as there are up to ``count``."""
        keys, scores = self._keys[: self._held], self._scores[: self._held]
        best = select_best(keys, scores, self.count)
        ascending, order = sort_keys(keys[best])
        return ascending, scores[best[order]]


def select_best(keys: Keys, scores: Floats, count: int) -> NDArray[np.int64]:
    """Positions, ascending, of the ``count`` best scores; among equals the lowest keys win."""
    if count >= scores.size:
        return np.arange(scores.size)
    if count == 0:
        return np.empty(0, np.int64)
    where = scores.size - count
    threshold = np.partition(scores, where)[where]
    above = np.flatnonzero(scores > threshold)
    ties = np.flatnonzero(scores == threshold)
    missing = count - above.size
    if missing < ties.size:
        ties = ties[np.argpartition(keys[ties], missing - 1)[:missing]]
    return np.sort(np.concatenate([above, ties]))


def sort_keys(keys: Keys) -> tuple[Keys, NDArray[np.int64]]:
    """Keys >= 0 in ascending order, and where each comes from; none twice."""
    shift = keys.size.bit_length()
    if keys.size == 0 or int(keys.max()).bit_length() + shift > 63:
        order = np.argsort(keys)
        return keys[order], order
    # Numbers of 64 bits are sorted several times as fast as positions by them.
    packed = keys << shift
    packed |= np.arange(keys.size)
    packed.sort()
    return packed >> shift, packed & ((1 << shift) - 1)


def bins_of(scores: Floats) -> NDArray[np.int32]:
    """The bin of each score; ascending with the scores."""
    with np.errstate(over="ignore"):  # a double beyond float32 is infinite there
        bits = scores.astype(np.float32, copy=False).view(np.int32)
    if (bits < 0).any():
        # Negative floats order backwards as integers.
        bits = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)
    return (bits >> _SHIFT) + np.int32(BINS >> 1)


def bin_edge(at: int, dtype: Any) -> float:
    """The least score in a bin, or a little less."""
    bits = np.int32((at - (BINS >> 1)) << _SHIFT)
    if bits < 0:
        bits = bits ^ np.int32(0x7FFFFFFF)
    edge = np.array(bits, np.int32).view(np.float32)[()]
    if np.isnan(edge):
        return -np.inf
    if dtype.itemsize <= 4:
        return float(edge)
    # A double that rounds to this float may lie below it.
    with np.errstate(over="ignore"):
        return float(np.nextafter(edge, np.float32(-np.inf)))
