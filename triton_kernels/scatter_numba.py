"""Scattering values into a dense weight and gathering them back on the CPU, as numba compiles it.

values: (capacity, bh, bw); offsets, cols, slots: those of some rows of blocks, offsets from any
number on; dense: (rows, taps, channels) in any memory order, what these rows cover; first, last:
rows of blocks. Numbers are only moved: any integer of their size will do. Without the interpreter's
lock. Nothing is checked.

Rows of the weight are put together in the nearest cache: there, scattered stores do not hold up the
loads that follow them; and every block is as wide, those at the edge of a tap as well. Indices are
unsigned, because of one that may be negative numba looks at the
sign.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import njit

from triton_kernels.compiled_numba import compiled

# Rows that are put together of blocks: the more, the longer what is read of each at a time.
_AT_ONCE = 8


@compiled()
def scatter_entries(values, offsets, cols, slots, dense, first, last):  # type: ignore[no-untyped-def]
    """Single weights. All else of these rows becomes zero."""
    alive = values.reshape(values.size)
    row = np.empty(dense.shape[1] * dense.shape[2], dense.dtype)
    for r in range(first, last):
        for c in range(row.size):
            row[c] = 0
        for k in range(offsets[r] - offsets[0], offsets[r + 1] - offsets[0]):
            row[np.uint64(cols[k])] = alive[np.uint64(slots[k])]
        _move(row.reshape(dense.shape[1:]), dense[r], dense.shape[2])


@compiled()
def gather_entries(values, offsets, cols, slots, dense, first, last):  # type: ignore[no-untyped-def]
    """The other way, at the alive entries alone."""
    alive = values.reshape(values.size)
    row = np.empty(dense.shape[1] * dense.shape[2], dense.dtype)
    for r in range(first, last):
        _move(dense[r], row.reshape(dense.shape[1:]), dense.shape[2])
        for k in range(offsets[r] - offsets[0], offsets[r + 1] - offsets[0]):
            alive[np.uint64(slots[k])] = row[np.uint64(cols[k])]


@cache
def scatter_blocks(width: int) -> Callable[..., None]:
    """For blocks that are so wide."""

    @compiled(width)
    def scatter_blocks(values, offsets, cols, slots, dense, first, last):  # type: ignore[no-untyped-def]
        """All else of these rows becomes zero."""
        bh, (rows, taps, channels) = values.shape[1], dense.shape
        some = np.empty((_AT_ONCE, taps, -(-channels // width) * width), dense.dtype)
        flat = some.reshape(_AT_ONCE, some[0].size)
        for r in range(first, last):
            for top in range(0, min(bh, rows - r * bh), _AT_ONCE):
                high = min(_AT_ONCE, bh - top, rows - r * bh - top)
                for i in range(high):
                    for c in range(flat.shape[1]):
                        flat[i, c] = 0
                for k in range(offsets[r] - offsets[0], offsets[r + 1] - offsets[0]):
                    slot, left = np.uint64(slots[k]), np.uint64(cols[k]) * np.uint64(width)
                    for i in range(high):
                        for j in range(width):
                            place = left + np.uint64(j)
                            flat[np.uint64(i), place] = values[slot, np.uint64(top + i), j]
                for i in range(high):
                    _move(some[i], dense[r * bh + top + i], channels)

    return scatter_blocks  # type: ignore[no-any-return]


@cache
def gather_blocks(width: int) -> Callable[..., None]:
    @compiled(width)
    def gather_blocks(values, offsets, cols, slots, dense, first, last):  # type: ignore[no-untyped-def]
        """The other way, at the alive blocks alone; the padding of edge blocks becomes zero."""
        bh, (rows, taps, channels) = values.shape[1], dense.shape
        some = np.zeros((_AT_ONCE, taps, -(-channels // width) * width), dense.dtype)
        flat = some.reshape(_AT_ONCE, some[0].size)
        for r in range(first, last):
            for top in range(0, bh, _AT_ONCE):
                high = max(0, min(_AT_ONCE, bh - top, rows - r * bh - top))
                for i in range(high):
                    _move(dense[r * bh + top + i], some[i], channels)
                for k in range(offsets[r] - offsets[0], offsets[r + 1] - offsets[0]):
                    slot, left = np.uint64(slots[k]), np.uint64(cols[k]) * np.uint64(width)
                    for i in range(high):
                        for j in range(width):
                            number = flat[np.uint64(i), left + np.uint64(j)]
                            values[slot, np.uint64(top + i), j] = number
                    for i in range(high, min(_AT_ONCE, bh - top)):
                        for j in range(width):
                            values[slot, np.uint64(top + i), j] = 0

    return gather_blocks  # type: ignore[no-any-return]


@njit(nogil=True)
def _move(source, target, channels):  # type: ignore[no-untyped-def]
    """(taps, channels) -> (taps, channels): what either has beyond so many channels stays."""
    for tap in range(len(source)):
        some, there = source[tap], target[tap]
        for c in range(channels):
            there[c] = some[c]
