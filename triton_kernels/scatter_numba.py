"""Scattering values into a dense weight and gathering them back on the CPU, as numba compiles it.

values: (capacity, bh, bw); offsets, cols, slots: those of some rows of blocks, offsets from any
number on; dense, shape, steps: what these rows cover, as ``scatter_cpu.Dense`` says; first, last:
rows of blocks. Numbers are only moved: any integer of their size will do. Without the interpreter's
lock. Nothing is checked.

Rows of the weight are put together in the nearest cache: there, scattered stores do not hold up the
loads that follow them; and every block is as wide, those at the edge of a tap as well. Indices are
unsigned, because of one that may be negative numba looks at the sign.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import njit

from triton_kernels.compiled_numba import compiled
from triton_kernels.move_numba import move
from triton_kernels.vectors import WIDTH

# Rows that are put together of blocks: the more, the longer what is read of each at a time, and
# what is written where rows of the same tap lie side by side.
_AT_ONCE = 16


@compiled()
def scatter_entries(values, offsets, cols, slots, dense, shape, steps, first, last):  # type: ignore[no-untyped-def]
    """Single weights. All else of these rows becomes zero."""
    alive, (_, taps, channels) = values.reshape(values.size), shape
    row = np.empty(taps * channels, dense.dtype)
    for r in range(first, last):
        for c in range(row.size):
            row[c] = 0
        for k in range(offsets[r] - offsets[0], offsets[r + 1] - offsets[0]):
            row[np.uint64(cols[k])] = alive[np.uint64(slots[k])]
        for tap in range(taps):
            _put(row, tap * channels, dense, r * steps[0] + tap * steps[1], steps, channels)


@compiled()
def gather_entries(values, offsets, cols, slots, dense, shape, steps, first, last):  # type: ignore[no-untyped-def]
    """The other way, at the alive entries alone."""
    alive, (_, taps, channels) = values.reshape(values.size), shape
    row = np.empty(taps * channels, dense.dtype)
    for r in range(first, last):
        for tap in range(taps):
            _get(row, tap * channels, dense, r * steps[0] + tap * steps[1], steps, channels)
        for k in range(offsets[r] - offsets[0], offsets[r + 1] - offsets[0]):
            alive[np.uint64(slots[k])] = row[np.uint64(cols[k])]


@cache
def scatter_blocks(width: int) -> Callable[..., None]:
    """For blocks that are so wide."""

    @compiled(width)
    def scatter_blocks(values, offsets, cols, slots, dense, shape, steps, first, last):  # type: ignore[no-untyped-def]
        """All else of these rows becomes zero."""
        bh, (rows, taps, channels) = values.shape[1], shape
        some = np.empty((_AT_ONCE, taps * -(-channels // width) * width), dense.dtype)
        flat, wide = some.reshape(some.size), some.shape[1] // taps
        many, high = _together(bh)
        for r in range(first, last, many):
            for top in range(0, bh, high):
                row = r * bh + top
                count = min(min(many, last - r) * min(high, bh - top), rows - row)
                for i in range(count):
                    for c in range(some.shape[1]):
                        some[i, c] = 0
                for m in range(min(many, last - r)):
                    at, inside = m * high, min(high, bh - top, count - m * high)
                    for k in range(offsets[r + m] - offsets[0], offsets[r + m + 1] - offsets[0]):
                        slot, left = np.uint64(slots[k]), np.uint64(cols[k]) * np.uint64(width)
                        for i in range(inside):
                            for j in range(width):
                                number = values[slot, np.uint64(top + i), j]
                                some[np.uint64(at + i), left + np.uint64(j)] = number
                for tap in range(taps):
                    for i in range(count):
                        to = (row + i) * steps[0] + tap * steps[1]
                        at = i * some.shape[1] + tap * wide
                        _put(flat, at, dense, to, steps, channels)

    return scatter_blocks  # type: ignore[no-any-return]


@cache
def gather_blocks(width: int) -> Callable[..., None]:
    @compiled(width)
    def gather_blocks(values, offsets, cols, slots, dense, shape, steps, first, last):  # type: ignore[no-untyped-def]
        """The other way, at the alive blocks alone; the padding of edge blocks becomes zero."""
        bh, (rows, taps, channels) = values.shape[1], shape
        some = np.zeros((_AT_ONCE, taps * -(-channels // width) * width), dense.dtype)
        flat, wide = some.reshape(some.size), some.shape[1] // taps
        many, high = _together(bh)
        for r in range(first, last, many):
            for top in range(0, bh, high):
                row = r * bh + top
                count = max(0, min(min(many, last - r) * min(high, bh - top), rows - row))
                for tap in range(taps):
                    for i in range(count):
                        start = (row + i) * steps[0] + tap * steps[1]
                        at = i * some.shape[1] + tap * wide
                        _get(flat, at, dense, start, steps, channels)
                for m in range(min(many, last - r)):
                    at, inside = m * high, max(0, min(high, bh - top, count - m * high))
                    for k in range(offsets[r + m] - offsets[0], offsets[r + m + 1] - offsets[0]):
                        slot, left = np.uint64(slots[k]), np.uint64(cols[k]) * np.uint64(width)
                        for i in range(inside):
                            for j in range(width):
                                number = some[np.uint64(at + i), left + np.uint64(j)]
                                values[slot, np.uint64(top + i), j] = number
                        for i in range(inside, min(high, bh - top)):
                            for j in range(width):
                                values[slot, np.uint64(top + i), j] = 0

    return gather_blocks  # type: ignore[no-any-return]


@njit(nogil=True)
def _together(bh):  # type: ignore[no-untyped-def]
    """How many rows of blocks are put together, and how many rows of each."""
    return max(1, _AT_ONCE // bh), min(bh, _AT_ONCE)


@njit(nogil=True)
def _put(row, at, dense, to, steps, count):  # type: ignore[no-untyped-def]
    """row[at : at + count] -> as many columns of a row and tap, of which the first is dense[to]."""
    _, _, next_, step = steps
    begin = count // WIDTH * WIDTH if step == 1 else 0
    for c in range(0, begin, WIDTH):
        move(row, at + c, dense, to + c // WIDTH * next_)
    for c in range(begin, count):
        dense[to + c // WIDTH * next_ + c % WIDTH * step] = row[at + c]


@njit(nogil=True)
def _get(row, at, dense, start, steps, count):  # type: ignore[no-untyped-def]
    """The other way."""
    _, _, next_, step = steps
    begin = count // WIDTH * WIDTH if step == 1 else 0
    for c in range(0, begin, WIDTH):
        move(dense, start + c // WIDTH * next_, row, at + c)
    for c in range(begin, count):
        row[at + c] = dense[start + c // WIDTH * next_ + c % WIDTH * step]
