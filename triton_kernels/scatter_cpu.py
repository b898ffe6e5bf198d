"""Scattering values into a dense weight and gathering them back, on the CPU with numba: all of it,
or some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triton_kernels import threads, waiting
from triton_kernels.waiting import Index
from triton_kernels.waves import memory

# A smaller weight is scattered before a compiler has been imported.
LEAST_ENTRIES = 1 << 16
# Fewer entries than this are not worth a second thread.
_SHARED = 1 << 18
# Share of single weights from which bits say where they are rather than column numbers.
_CROWDED = 1 / 32
# Of a dense weight in strips (``strips_cpu``): their columns, and the rows of a block of them.
WIDTH, HEIGHT = 16, 64

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def available(values: Tensor, entries: int) -> bool:
    """Whether it serves a weight of so many entries, zeros included."""
    return values.device.type == "cpu" and entries >= LEAST_ENTRIES and _numba()


@cache
def _numba() -> bool:
    return find_spec("numba") is not None


def scatter(
    values: Tensor, row_offsets: Tensor, cols: Tensor, slots: Tensor, dense: Tensor
) -> None:
    """``layout.scatter`` into ``dense``: (n_out, taps, channels), in any memory order."""
    put(values, Piece.whole((row_offsets, cols, slots), len(dense)), Dense.of(dense))


def gather(
    dense: Tensor, values: Tensor, row_offsets: Tensor, cols: Tensor, slots: Tensor
) -> Tensor:
    """``layout.gather`` of the gradient of these values from that of the dense weight."""
    out = room_for_gradient(values, cols)
    get(out, Piece.whole((row_offsets, cols, slots), len(dense)), Dense.of(dense))
    return out


class Dense(NamedTuple):
    """How a dense weight lies in memory.

    shape: (rows, taps, channels). steps: from one row to the next, from one tap to the next, from
    16 channels to the next 16, and from one of these to the next.
    """

    memory: Tensor
    shape: tuple[int, int, int]
    steps: tuple[int, int, int, int]

    @classmethod
    def of(cls, dense: Tensor) -> Dense:
        """(rows, taps, channels), in any memory order."""
        rows, taps, channels = dense.shape
        row, tap, one = dense.stride()
        return cls(dense, (rows, taps, channels), (row, tap, WIDTH * one, one))

    def numbers(self) -> NDArray[Any]:
        """All that there are, flat, as integers of their size."""
        first = self.memory.detach()
        extent = 1 + sum(
            (side - 1) * step for side, step in zip(first.shape, first.stride(), strict=True)
        )
        flat = first.as_strided((extent,), (1,))
        return flat.view(_BITS[first.element_size()]).numpy()  # type: ignore[no-any-return]


def put(values: Tensor, piece: Piece, dense: Dense) -> None:
    """Those of a piece, zero elsewhere -> ``dense``, its rows. Of single weights that are found by
    bits, columns must lie side by side."""
    # Not at the top: numba takes a second to import.
    from triton_kernels.expand_numba import expand
    from triton_kernels.scatter_numba import scatter_blocks, scatter_entries

    kernel = scatter_entries if values.shape[1:] == (1, 1) else scatter_blocks(values.shape[2])
    _share((kernel, expand), values.contiguous(), piece, dense)


def get(values: Tensor, piece: Piece, dense: Dense) -> None:
    """The other way, at the alive entries alone."""
    from triton_kernels import scatter_numba
    from triton_kernels.expand_numba import compress

    kernel = scatter_numba.gather_entries
    if values.shape[1:] != (1, 1):
        strips = dense.steps[2] != WIDTH * dense.steps[3]
        make = scatter_numba.gather_from_strips if strips else scatter_numba.gather_blocks
        kernel = make(values.shape[2])
    _share((kernel, compress), values, piece, dense)


def room_for_gradient(values: Tensor, cols: Tensor) -> Tensor:
    """For that of these values. Every alive block is written whole; only free slots need
    zeros."""
    make = values.new_empty if len(values) == cols.numel() else values.new_zeros
    return make(values.shape)


class _Bits(NamedTuple):
    """Where single weights are alive, as ``expand_numba`` takes it; and whether they lie in the
    order of the rows."""

    words: Tensor
    ordered: bool

    @classmethod
    def of(cls, values: Tensor, index: Index, n_out: int, n_in: int) -> _Bits | None:
        """None where that way is not for them."""
        single = values.shape[1:] == (1, 1) and values.element_size() == 4
        if not single or index[1].numel() < _CROWDED * n_out * n_in:
            return None

        from triton_kernels.compiled_numba import jit_is_off
        from triton_kernels.expand_numba import mark
        from triton_kernels.registers import expands

        if jit_is_off() or not expands():
            return None
        row_offsets, cols, slots = index
        words = cols.new_zeros(n_out, -(-n_in // WIDTH), dtype=torch.uint16)
        mark(row_offsets.numpy(), cols.numpy(), words.numpy(), 0, n_out)
        return cls(words, in_order(slots))


class Piece(NamedTuple):
    """``outputs`` rows of a weight, and the row offsets, columns and slots of their blocks."""

    rows: slice
    outputs: int
    places: Index
    bits: _Bits | None = None

    @classmethod
    def whole(cls, index: Index, n_out: int) -> Piece:
        return cls(slice(0, n_out), n_out, index)


def pieces(values: Tensor, index: Index, n_out: int, n_in: int) -> list[Piece]:
    """Whole rows of blocks, the most in the first piece."""
    bh, size = values.shape[1], values.element_size()
    row_offsets, cols, slots = index
    bits = memory.get(
        index, ("bits", n_out, n_in, size), lambda: _Bits.of(values, index, n_out, n_in)
    )
    rows, n_rows = rows_at_once(n_out, n_in, bh, size), row_offsets.numel() - 1
    if rows == n_out:
        return [Piece.whole(index, n_out)._replace(bits=bits)]
    cuts = [*range(0, n_rows, rows // bh), n_rows]
    ends = row_offsets[cuts].tolist()
    return [
        Piece(
            slice(a * bh, min(b * bh, n_out)),
            min(b * bh, n_out) - a * bh,
            (row_offsets[a : b + 1], cols[first:last], slots[first:last]),
            None if bits is None else bits._replace(words=bits.words[a:b]),
        )
        for (a, b), (first, last) in zip(pairwise(cuts), pairwise(ends), strict=True)
    ]


def rows_at_once(n_out: int, n_in: int, bh: int, itemsize: int) -> int:
    """Rows of a piece: all of them, if they fit, in strips too; or whole blocks that fit and, where
    that leaves some, whole blocks of strips as well."""
    most = waiting.PIECE_BYTES // (-(-n_in // WIDTH) * WIDTH * itemsize)
    # Sums of half precision are not to be rounded after every piece.
    if itemsize <= 2 or -(-n_out // HEIGHT) * HEIGHT <= most:
        return n_out
    unit = math.lcm(bh, HEIGHT)
    if most < unit:
        unit = bh
    count = -(-n_out // max(unit, most // unit * unit))
    return -(-n_out // (count * unit)) * unit


def in_order(slots: Tensor) -> bool:
    """Whether the values lie in the order of the rows, as they do until a topology has changed."""
    own = slots.numpy()
    return np.array_equal(own, np.arange(own.size, dtype=own.dtype))


def _share(
    kernels: tuple[Callable[..., None], Callable[..., None]],
    values: Tensor,
    piece: Piece,
    dense: Dense,
) -> None:
    """Run a kernel, the second one where there are bits, on as many threads as PyTorch has, each
    with as many rows of blocks."""
    plain, by_bits = kernels
    alive = values.detach().view(_BITS[values.element_size()])
    row_offsets, cols, slots = (tensor.numpy() for tensor in piece.places)
    n_rows = len(row_offsets) - 1
    count = min(torch.get_num_threads(), n_rows) if math.prod(dense.shape) >= _SHARED else 1
    parts = list(pairwise(n_rows * i // count for i in range(count + 1)))
    there = dense.numbers(), dense.shape, dense.steps
    if piece.bits is None:
        threads.run(plain, (alive.numpy(), row_offsets, cols, slots, *there), parts)
        return
    # The kernel checks nothing.
    if dense.shape[1] != 1 or dense.steps[3] != 1:
        raise ValueError(
            f"columns of {dense.shape} by steps of {dense.steps} do not lie side by side"
        )
    words, ordered = piece.bits
    arrays = (alive.view(-1).numpy(), words.numpy(), row_offsets, slots, ordered)
    threads.run(by_bits, (*arrays, *there), parts)
