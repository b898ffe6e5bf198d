"""Scattering values into a dense weight and gathering them back on the CPU, as numba compiles it.

values: (capacity, bh, bw); offsets, cols, slots: those of some rows of blocks, offsets from any
number on; dense: (rows, taps, channels) in any memory order, what these rows cover; first, last:
rows of blocks. Numbers are only moved: any integer of their size will do. Without the interpreter's
lock. Nothing is checked.

Rows of the weight are put together in the nearest cache: there, scattered stores do not hold up the
loads that follow them. Indices are unsigned, because of one that may be negative numba looks at the
sign.
"""

from __future__ import annotations

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
        _put(row, dense[r])


@compiled()
def gather_entries(values, offsets, cols, slots, dense, first, last):  # type: ignore[no-untyped-def]
    """The other way, at the alive entries alone."""
    alive = values.reshape(values.size)
    row = np.empty(dense.shape[1] * dense.shape[2], dense.dtype)
    for r in range(first, last):
        _get(row, dense[r])
        for k in range(offsets[r] - offsets[0], offsets[r + 1] - offsets[0]):
            alive[np.uint64(slots[k])] = row[np.uint64(cols[k])]


@compiled()
def scatter_blocks(values, offsets, cols, slots, dense, first, last):  # type: ignore[no-untyped-def]
    """Blocks. All else of these rows becomes zero."""
    bh, bw = values.shape[1:]
    rows, taps, channels = dense.shape
    some = np.empty((_AT_ONCE, taps * channels), dense.dtype)
    for r in range(first, last):
        for top in range(0, min(bh, rows - r * bh), _AT_ONCE):
            high = min(_AT_ONCE, bh - top, rows - r * bh - top)
            for i in range(high):
                for c in range(taps * channels):
                    some[i, c] = 0
            tap = 0
            for k in range(offsets[r] - offsets[0], offsets[r + 1] - offsets[0]):
                tap, left, wide = _place(cols[k], tap, bw, channels)
                slot, left = np.uint64(slots[k]), left + tap * channels
                for i in range(high):
                    for j in range(wide):
                        some[i, np.uint64(left + j)] = values[slot, np.uint64(top + i), j]
            for i in range(high):
                _put(some[i], dense[r * bh + top + i])


@compiled()
def gather_blocks(values, offsets, cols, slots, dense, first, last):  # type: ignore[no-untyped-def]
    """The other way, at the alive blocks alone; the padding of edge blocks becomes zero."""
    bh, bw = values.shape[1:]
    rows, _, channels = dense.shape
    for r in range(first, last):
        high, tap = min(bh, rows - r * bh), 0
        for k in range(offsets[r] - offsets[0], offsets[r + 1] - offsets[0]):
            tap, left, wide = _place(cols[k], tap, bw, channels)
            slot = np.uint64(slots[k])
            for i in range(high):
                at = np.uint64(r * bh + i)
                for j in range(wide):
                    values[slot, i, j] = dense[at, np.uint64(tap), np.uint64(left + j)]
                for j in range(wide, bw):
                    values[slot, i, j] = 0
            for i in range(high, bh):
                for j in range(bw):
                    values[slot, i, j] = 0


@njit(nogil=True)
def _place(col, tap, bw, channels):  # type: ignore[no-untyped-def]
    """(tap, first channel at it, width) of a block in this column of blocks; its tap is not below
    the one given."""
    across = (channels + bw - 1) // bw
    while col >= (tap + 1) * across:
        tap += 1
    left = (np.int64(col) - tap * across) * bw
    return tap, left, min(bw, channels - left)


@njit(nogil=True)
def _put(row, dense):  # type: ignore[no-untyped-def]
    """row: (taps * channels,) -> dense: (taps, channels)."""
    taps, channels = dense.shape
    for tap in range(taps):
        source, target = row[tap * channels : (tap + 1) * channels], dense[tap]
        for c in range(channels):
            target[c] = source[c]


@njit(nogil=True)
def _get(row, dense):  # type: ignore[no-untyped-def]
    taps, channels = dense.shape
    for tap in range(taps):
        source, target = dense[tap], row[tap * channels : (tap + 1) * channels]
        for c in range(channels):
            target[c] = source[c]
