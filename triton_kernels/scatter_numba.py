"""Scattering values into a dense weight and gathering them back on the CPU, as numba compiles it.

values: (capacity, bh, bw); offsets, cols, slots: those of some rows of blocks, offsets from any
number on; dense, shape, steps: what these rows cover, as ``scatter_cpu.Dense`` says; first, last:
rows of blocks. Numbers are only moved: any integer of their size will do. Without the interpreter's
lock. Nothing is checked.

What is scattered is put together first, some rows at a time, where it stays in a cache: there,
scattered stores do not hold up the loads that follow them; and every block is as wide, those at the
edge of a tap as well. Indices are unsigned, because of one that may be negative numba looks at the
sign.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import njit

from triton_kernels.compiled_numba import compiled, jit_is_off
from triton_kernels.move_numba import move
from triton_kernels.vectors import WIDTH

# Rows that are put together of blocks, where they take no more bytes: the more, the longer what is
# read of each block at a time, and what is written where rows lie side by side.
_ROWS, _BYTES = 16, 256 << 10
# Intrinsics do not run in Python.
_VECTORS = not jit_is_off()


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
        _put(row, channels, 1, dense, r, shape, steps)


@compiled()
def gather_entries(values, offsets, cols, slots, dense, shape, steps, first, last):  # type: ignore[no-untyped-def]
    """The other way, at the alive entries alone."""
    alive, (_, taps, channels) = values.reshape(values.size), shape
    row = np.empty(taps * channels, dense.dtype)
    for r in range(first, last):
        _get(row, channels, 1, dense, r, shape, steps)
        for k in range(offsets[r] - offsets[0], offsets[r + 1] - offsets[0]):
            alive[np.uint64(slots[k])] = row[np.uint64(cols[k])]


@cache
def scatter_blocks(width: int) -> Callable[..., None]:
    """For blocks that are so wide."""

    @compiled(width)
    def scatter_blocks(values, offsets, cols, slots, dense, shape, steps, first, last):  # type: ignore[no-untyped-def]
        """All else of these rows becomes zero."""
        bh, (rows, taps, channels) = values.shape[1], shape
        wide = -(-channels // width) * width
        at_once = _at_once(taps * wide * dense.itemsize)
        some = np.empty((at_once, taps * wide), dense.dtype)
        flat = some.reshape(some.size)
        # Rows of blocks at a time, and rows of each.
        many, high = max(1, at_once // bh), min(bh, at_once)
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
                if count > 0:
                    _put(flat, wide, count, dense, row, shape, steps)

    return scatter_blocks  # type: ignore[no-any-return]


@cache
def gather_blocks(width: int) -> Callable[..., None]:
    @compiled(width)
    def gather_blocks(values, offsets, cols, slots, dense, shape, steps, first, last):  # type: ignore[no-untyped-def]
        """The other way, at the alive blocks alone; the padding of edge blocks becomes zero."""
        bh, (rows, _, channels) = values.shape[1], shape
        across, step = np.uint64((channels + width - 1) // width), np.uint64(steps[3])
        for r in range(first, last):
            high = min(bh, rows - r * bh)
            for k in range(offsets[r] - offsets[0], offsets[r + 1] - offsets[0]):
                slot, tap = np.uint64(slots[k]), np.uint64(cols[k]) // across
                left = (np.uint64(cols[k]) - tap * across) * np.uint64(width)
                start = np.uint64(r * bh * steps[0]) + tap * np.uint64(steps[1]) + left * step
                inside = min(width, channels - np.int64(left))
                for i in range(high):
                    at, own = start + np.uint64(i * steps[0]), values[slot, np.uint64(i)]
                    if inside < width:
                        for j in range(inside):
                            own[j] = dense[at + np.uint64(j) * step]
                        for j in range(inside, width):
                            own[j] = 0
                    elif step == 1:
                        for j in range(width):
                            own[j] = dense[at + np.uint64(j)]
                    else:
                        for j in range(width):
                            own[j] = dense[at + np.uint64(j) * step]
                for i in range(high, bh):
                    for j in range(width):
                        values[slot, np.uint64(i), j] = 0

    return gather_blocks  # type: ignore[no-any-return]


@cache
def gather_from_strips(width: int) -> Callable[..., None]:
    @compiled(width)
    def gather_from_strips(values, offsets, cols, slots, dense, shape, steps, first, last):  # type: ignore[no-untyped-def]
        """The same of a weight in strips, of which some rows are put together first: those of a
        block alone would be a few lines of the cache far from the next ones."""
        bh, rows = values.shape[1], shape[0]
        wide = -(-shape[2] // width) * width
        at_once = _at_once(wide * dense.itemsize)
        some = np.zeros((at_once, wide), dense.dtype)
        flat = some.reshape(some.size)
        many, high = max(1, at_once // bh), min(bh, at_once)
        for r in range(first, last, many):
            for top in range(0, bh, high):
                row = r * bh + top
                count = max(0, min(min(many, last - r) * min(high, bh - top), rows - row))
                _get(flat, wide, count, dense, row, shape, steps)
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

    return gather_from_strips  # type: ignore[no-any-return]


@njit(nogil=True)
def _at_once(row):  # type: ignore[no-untyped-def]
    """Rows of so many bytes that are put together."""
    rows = _ROWS
    while rows > 1 and rows * row > _BYTES:
        rows //= 2
    return rows


@njit(nogil=True)
def _column(c, steps):  # type: ignore[no-untyped-def]
    """From the first column of a row and tap to this one."""
    word = c // np.uint64(WIDTH)
    return word * np.uint64(steps[2]) + (c - word * np.uint64(WIDTH)) * np.uint64(steps[3])


@njit(nogil=True)
def _put(some, wide, count, dense, row, shape, steps):  # type: ignore[no-untyped-def]
    """So many rows, of which each tap takes ``wide`` numbers, one behind the other -> those of the
    weight from this row on."""
    (_, taps, channels), step = shape, np.uint64(steps[3])
    if steps[2] == WIDTH * steps[3]:
        for i in range(count):
            for tap in range(taps):
                own = some[(i * taps + tap) * wide :]
                to = np.uint64((row + i) * steps[0] + tap * steps[1])
                if step == 1:
                    for c in range(channels):
                        dense[to + np.uint64(c)] = own[c]
                else:
                    for c in range(channels):
                        dense[to + np.uint64(c) * step] = own[c]
        return
    # Strip by strip: rows lie side by side there. Strips have one tap.
    whole = channels // WIDTH * WIDTH if step == 1 and _VECTORS else 0
    for c in range(0, whole, WIDTH):
        for i in range(count):
            to = (row + i) * steps[0] + c // WIDTH * steps[2]
            move(some, i * wide + c, dense, to)
    for i in range(count):
        to = np.uint64((row + i) * steps[0])
        for c in range(whole, channels):
            dense[to + _column(np.uint64(c), steps)] = some[i * wide + c]


@njit(nogil=True)
def _get(some, wide, count, dense, row, shape, steps):  # type: ignore[no-untyped-def]
    """The other way."""
    (_, taps, channels), step = shape, np.uint64(steps[3])
    if steps[2] == WIDTH * steps[3]:
        for i in range(count):
            for tap in range(taps):
                own = some[(i * taps + tap) * wide :]
                start = np.uint64((row + i) * steps[0] + tap * steps[1])
                if step == 1:
                    for c in range(channels):
                        own[c] = dense[start + np.uint64(c)]
                else:
                    for c in range(channels):
                        own[c] = dense[start + np.uint64(c) * step]
        return
    whole = channels // WIDTH * WIDTH if step == 1 and _VECTORS else 0
    for c in range(0, whole, WIDTH):
        for i in range(count):
            start = (row + i) * steps[0] + c // WIDTH * steps[2]
            move(dense, start, some, i * wide + c)
    for i in range(count):
        start = np.uint64((row + i) * steps[0])
        for c in range(whole, channels):
            some[i * wide + c] = dense[start + _column(np.uint64(c), steps)]
