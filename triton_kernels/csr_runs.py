"""The order in which the CPU multiplies the nonzeros of a matrix, given by its compressed rows.

In that of the rows, every nonzero would wait for its row of the activations to come from a cache
that is not the nearest. So columns are cut into pieces, of which the activations fit there, rows
into groups, and in each group and piece, the nonzeros of a row are a run, or several if there are
too many. Runs are sorted by their length, so that no branch depends on it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from triton_kernels.waves import Index, memory

# Columns of a piece are a number of 16 bits.
WIDEST = 1 << 16
# Outputs on a line of the cache, of which two threads had better not write to the same one.
_LINE = 16
# Nonzeros of a thread's share, about. It holds a number for each, and larger pieces of memory than
# 32 MB come from the system anew each time, a page at a time: a fifth of a training step.
_SHARE = 3 << 20

Parts = list[tuple[int, int]]


class Runs(NamedTuple):
    """starts: (groups + 1,), the rows at which groups begin; width: columns of a piece.
    ends: (groups * pieces, 17), how many runs there are up to those of a length in a group and
    piece, all before them included; begins: (groups * pieces + 1,), the same of nonzeros.
    rows: (runs,), in their group; columns, in their piece, and slots: (nonzeros,).
    """

    starts: Index
    width: int
    ends: Index
    begins: Index
    rows: NDArray[Any]
    columns: NDArray[Any]
    slots: NDArray[Any]


class Matrix(NamedTuple):
    """The weight, or its transpose, that an order describes. shape: its own; sides: of a block, 1
    and 1 for single weights; steps: in memory, from a row of a block to the next, and from a column
    to the next."""

    shape: tuple[int, int]
    sides: tuple[int, int]
    steps: tuple[int, int]

    @property
    def T(self) -> Matrix:
        return Matrix(self.shape[::-1], self.sides[::-1], self.steps[::-1])


def runs_of(
    order: tuple[Tensor, Tensor, Tensor], matrix: Matrix, width: int, rows: int, threads: int
) -> tuple[Runs, list[Parts]]:
    """The runs of a matrix, and what groups each thread takes, one share after the other: worked
    out once for an order of a layout.

    order: offsets, index (ascending in each row) and slots of its compressed rows; width: columns
    of a piece, up to ``WIDEST``; rows: the most of a group, up to 2^16. Sums of a row do not depend
    on ``threads``.
    """
    key = ("runs", matrix, width, rows, threads)
    return memory.get(order, key, lambda: _runs(order, matrix, width, rows, threads))


def _runs(
    order: tuple[Tensor, Tensor, Tensor], matrix: Matrix, width: int, rows: int, threads: int
) -> tuple[Runs, list[Parts]]:
    # Not at the top: numba takes a second to import.
    from triton_kernels.csr_runs_numba import LONGEST, count, sort

    offsets, index, slots = (t.numpy() for t in order)
    offsets, index, slots = _singles(offsets, index, slots, matrix)
    n = matrix.shape[1]
    cuts = _cuts(offsets, threads)
    starts, parts = [0], []
    for first, last in pairwise(cuts):
        begin = len(starts) - 1
        starts += [min(row + rows, last) for row in range(first, last, rows)]
        parts.append((begin, len(starts) - 1))
    groups, pieces = np.array(starts, np.int64), -(-n // width)
    size = (len(starts) - 1) * pieces
    ends, begins = np.zeros((size, LONGEST + 1), np.int64), np.zeros(size + 1, np.int64)
    count(offsets, index, groups, width, pieces, ends, begins)
    rows_ = np.empty(int(ends[-1, -1]) if size else 0, np.uint16)
    columns = np.empty(index.size, np.uint16)
    # Unsigned, since the compiler would ask of every other one whether it is negative.
    slots_ = np.empty(slots.size, f"u{slots.itemsize}")
    found = rows_, columns, slots_
    sort(offsets, index, slots, groups, width, pieces, ends, begins, *found)
    shares = _shares(parts, begins[np.arange(groups.size) * pieces])
    return Runs(groups, width, ends, begins, rows_, columns, slots_), shares


def _singles(
    offsets: NDArray[Any], index: NDArray[Any], slots: NDArray[Any], matrix: Matrix
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Compressed rows of blocks as those of their single weights."""
    from triton_kernels.csr_runs_numba import spread

    size = math.prod(matrix.sides)
    if size == 1:
        return offsets, index, slots
    wide = (int(slots.max(initial=0)) + 1) * size > np.iinfo(slots.dtype).max
    offsets_ = np.zeros(matrix.shape[0] + 1, np.int64)
    index_ = np.empty(index.size * size, index.dtype)
    slots_ = np.empty(index_.size, np.int64 if wide else slots.dtype)
    alive = spread(offsets, index, slots, *matrix, offsets_, index_, slots_)
    return offsets_, index_[:alive], slots_[:alive]


def _shares(parts: Parts, before: Index) -> list[Parts]:
    """The first share of each part, then the second ones, and so on. before: (groups + 1,), the
    nonzeros before each group."""
    cut = []
    for first, last in parts:
        begin, end = before[first], before[last]
        count = max(1, -(-(end - begin) // _SHARE))
        wanted = begin + np.arange(1, count) * (end - begin) // count
        inner = first + np.searchsorted(before[first:last], wanted)
        cut.append([*pairwise(np.unique([first, *inner, last]).tolist())])
    return [[own[i] for own in cut if i < len(own)] for i in range(max(map(len, cut), default=0))]


def _cuts(offsets: NDArray[Any], threads: int) -> list[int]:
    """Where the rows of each thread begin, and end: with about as many nonzeros for each."""
    rows, nonzeros = len(offsets) - 1, int(offsets[-1])
    cuts = np.searchsorted(offsets, np.arange(1, threads) * nonzeros // threads)
    cuts = _LINE * np.round(cuts / _LINE).astype(int)
    return np.unique([0, *cuts[cuts < rows], rows]).tolist()  # type: ignore[no-any-return]
