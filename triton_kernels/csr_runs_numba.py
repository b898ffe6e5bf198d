"""The order in which the nonzeros of a matrix are multiplied, as numba compiles what finds it."""

from __future__ import annotations

import numpy as np
from numba import njit

from triton_kernels.compiled_numba import compiled

# Nonzeros of a run.
LONGEST = 16


@compiled()
def spread(offsets, index, slots, shape, sides, steps, offsets_, index_, slots_):  # type: ignore[no-untyped-def]
    """The rows of blocks as rows of single numbers; returns how many there are. shape: of the
    matrix, which blocks at its edges reach beyond; sides: of a block; steps: from one of its rows,
    and from one of its columns, to the next. offsets_: of all rows, index_ and slots_: of as many
    numbers as the blocks have."""
    at, size = np.int64(0), sides[0] * sides[1]
    for r in range(offsets.size - 1):
        for i in range(min(sides[0], shape[0] - r * sides[0])):
            for k in range(offsets[r], offsets[r + 1]):
                column = np.int64(index[k]) * sides[1]
                slot = np.int64(slots[k]) * size + i * steps[0]
                for j in range(min(sides[1], shape[1] - column)):
                    index_[at] = column + j
                    slots_[at] = slot + j * steps[1]
                    at += 1
            offsets_[r * sides[0] + i + 1] = at
    return at


@compiled()
def count(offsets, index, starts, width, pieces, ends, begins):  # type: ignore[no-untyped-def]
    """Into ``ends`` and ``begins``, which are zero: see ``csr_runs.Runs``. offsets, index:
    compressed rows, in each of them ascending; pieces: of each group. Without the interpreter's
    lock. Nothing is checked."""
    for g in range(starts.size - 1):
        for r in range(starts[g], starts[g + 1]):
            k, end = offsets[r], offsets[r + 1]
            while k < end:
                length, piece = _length(index, k, end, width)
                at = g * pieces + piece
                begins[at + 1] += length
                ends[at, LONGEST] += length // LONGEST
                ends[at, length % LONGEST] += length % LONGEST > 0
                k += length
    runs = 0
    for at in range(begins.size - 1):
        begins[at + 1] += begins[at]
        for length in range(LONGEST + 1):
            runs += ends[at, length]
            ends[at, length] = runs


@compiled()
def sort(  # type: ignore[no-untyped-def]
    offsets, index, slots, starts, width, pieces, ends, begins, rows, columns, slots_
):
    """The same matrix into ``rows``, ``columns`` and ``slots_``, of the sizes that
    ``count`` has found."""
    # Of the next run of each length, and of its nonzeros.
    run, place = ends[:, :LONGEST].copy(), ends[:, :LONGEST].copy()
    for at in range(begins.size - 1):
        k = begins[at]
        for length in range(1, LONGEST + 1):
            place[at, length - 1] = k
            k += (ends[at, length] - ends[at, length - 1]) * length
    for g in range(starts.size - 1):
        for r in range(starts[g], starts[g + 1]):
            k, end = offsets[r], offsets[r + 1]
            while k < end:
                left, piece = _length(index, k, end, width)
                at = g * pieces + piece
                while left > 0:
                    length = min(left, LONGEST)
                    rows[run[at, length - 1]] = r - starts[g]
                    run[at, length - 1] += 1
                    to = place[at, length - 1]
                    for i in range(length):
                        columns[to + i] = index[k + i] - piece * width
                        slots_[to + i] = slots[k + i]
                    place[at, length - 1] += length
                    k += length
                    left -= length


@njit(nogil=True)
def _length(index, k, end, width):  # type: ignore[no-untyped-def]
    """How many of a row's nonzeros [k, end) lie in the same piece as the first, and in which."""
    piece = index[k] // width
    last, i = (piece + 1) * width, k + 1
    while i < end and index[i] < last:
        i += 1
    return i - k, piece
