"""Which connections are active: asked of a bitmap, of their sorted keys, or row by row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from growth.running_top import sort_keys
from triton_kernels.costs import active_bitmap_pays

Keys = NDArray[np.int64]

# Keys whose bits are set at a time, a byte each.
_CHUNK = 1 << 22


class ActiveKeys:
    """Membership in a sorted set of keys.

    A bitmap takes size / 8 bytes and answers in one look; the sorted keys take no memory beside
    themselves, and a search. Which of them it is depends on the number of keys, of connections and
    of questions to come.

    keys: int64, sorted and unique, in [0, size). questions: how many are expected.
    """

    def __init__(self, keys: Keys, size: int, questions: int) -> None:
        self._keys = keys
        pays = active_bitmap_pays(keys.size, size, questions)
        self._bits = _bitmap(keys, size) if pays else None

    def absent(self, keys: Keys) -> NDArray[np.int64] | None:
        """Positions of the ``keys`` that are not active, in any order; None: all of them."""
        if self._keys.size == 0 or keys.size == 0:
            return None
        if self._bits is not None:
            return np.flatnonzero((self._bits[keys >> 3] >> (keys & 7).astype(np.uint8)) & 1 == 0)
        # Searches that follow each other touch the same memory: several times as fast.
        wanted, order = sort_keys(keys)
        at = self._keys.searchsorted(wanted)
        at[at == self._keys.size] = 0
        return order[self._keys[at] != wanted]

    def in_rows(self, rows: Keys, n_cols: int) -> tuple[Keys, Keys]:
        """The active connections of some rows of n_cols: positions in ``rows``, and columns."""
        first = self._keys.searchsorted(rows * n_cols)
        last = self._keys.searchsorted((rows + 1) * n_cols)
        parts = [self._keys[a:b] for a, b in zip(first.tolist(), last.tolist(), strict=True)]
        at = np.repeat(np.arange(rows.size), last - first)
        return at, np.concatenate([np.empty(0, np.int64), *parts]) - rows[at] * n_cols


def _bitmap(keys: Keys, size: int) -> NDArray[np.uint8]:
    bits = np.empty(-(-size // 8), np.uint8)
    starts = range(0, size, _CHUNK)
    ends = keys.searchsorted([start + _CHUNK for start in starts])
    chunk = np.zeros(_CHUNK, bool)
    first = 0
    for start, end in zip(starts, ends.tolist(), strict=True):
        own = keys[first:end] - start
        chunk[own] = True
        stop = min(size, start + _CHUNK)
        bits[start // 8 : -(-stop // 8)] = np.packbits(chunk[: stop - start], bitorder="little")
        chunk[own] = False
        first = end
    return bits
