"""The inner loop of the gradient of a block-sparse weight on the CPU, as numba compiles it: see
``blocks_numba``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from triton_kernels.compiled_numba import compiled
from triton_kernels.move_numba import move
from triton_kernels.vectors import INDEX, WIDTH, Loop, zero

# Rows of the batch that are multiplied at a time, so that they stay in the nearest cache.
ROWS = 64


@cache
def gradient(rows: int, vectors: int, strips: bool = False) -> Callable[..., None]:
    """gradient(x, dy, major, minor, slots, grad, rooms, cuts, shape, first, last): grad[slots[k]] =
    strip major[k] of dy, transposed, times strip minor[k] of x, for k in [cuts[first], cuts[last]).

    x: (batch, n_in), dy: (batch, n_out), grad: (capacity, bh, bw), all flat; major, minor, slots,
    cuts: int64; shape: (batch, n_in, n_out, bh, bw, before), where as many rows came before these:
    if any did, what there is in grad is added to. Zero in what reaches beyond x and dy. Tiles of
    (rows, 16 * vectors). rooms: (shares, ``ROWS`` * (bh + 16 * vectors)). x may be given in
    ``strips`` of 16 columns, (whole blocks of n_in / 16, batch, 16), and is then not copied for
    every block. Without the interpreter's lock. Nothing is checked.
    """
    outer, panel = _outer(rows, vectors), WIDTH * vectors

    @compiled(rows, vectors, strips)
    def gradient(  # type: ignore[no-untyped-def]
        x, dy, major, minor, slots, grad, rooms, cuts, shape, first, last
    ):
        batch, n_in, n_out, bh, bw, before = shape
        # Not constants, for each of which numba would compile its own ``_pack``.
        left, width = np.int64(0), np.int64(panel)
        room, packed = rooms[first], left + ROWS * bh
        source = x if strips else room
        start, end = cuts[first], cuts[last]
        while start < end:
            r, stop = major[start], start
            while stop < end and major[stop] == r:
                stop += 1
            for b in range(0, batch, ROWS):
                count = min(ROWS, batch - b)
                _pack(dy, n_out, b, count, r * bh, bh, room, left)
                for k in range(start, stop):
                    for p in range(0, bw, panel):
                        # What is read next, a vector of every row with each of the tiles.
                        if p + panel < bw:
                            column = minor[k] * bw + p + panel
                        else:
                            column = minor[min(k + 1, stop - 1)] * bw
                        if strips:
                            right = (minor[k] * bw + p) * batch + b * WIDTH
                            ahead, next_row, high = column * batch + b * WIDTH, WIDTH, batch
                        else:
                            _pack(x, n_in, b, count, minor[k] * bw + p, width, room, packed)
                            right = packed
                            ahead, next_row, high = b * n_in + column, n_in, count
                        for q in range(0, bh, rows):
                            strip = left + q // WIDTH * WIDTH * count + q % WIDTH
                            at = (slots[k] * bh + q) * bw + p
                            following = ahead + q // rows % vectors * WIDTH
                            sizes = (count, high, bw, before + b, following, next_row)
                            outer(room, source, grad, x, (strip, right, at, *sizes))
            start = stop

    return gradient  # type: ignore[no-any-return]


@njit(nogil=True)
def _pack(x, n, first, count, column, width, out, to):  # type: ignore[no-untyped-def]
    """x: (batch, n) at [first : first + count, column : column + width], zero beyond its columns
    -> (width / 16, count, 16) from out[to] on, all flat."""
    for i in range(count):
        at = (first + i) * n + column
        for j in range(0, width, WIDTH):
            place = to + j * count + WIDTH * i
            if column + j + WIDTH <= n:
                move(x, at + j, out, place)
            else:
                for v in range(WIDTH):
                    out[place + v] = x[at + j + v] if column + j + v < n else 0


def _outer(rows: int, vectors: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def outer(typing: Any, dy: Any, x: Any, grad: Any, next_x: Any, where: Any) -> Any:
        """A tile of (rows, 16 * vectors) of ``gradient``: the sum over packed rows of the outer
        products of those of dy and x; added to what is there, unless they are the first."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loop = Loop(context, builder, signature, args)
            left, right, at, count, high, stride, after, ahead, n = cgutils.unpack_tuple(
                builder, args[4]
            )
            left, right, first, next_ = (
                builder.gep(loop.data(i), [start])
                for i, start in enumerate((left, right, at, ahead))
            )
            steps = [builder.mul(stride, ir.Constant(INDEX, i)) for i in range(rows)]
            places = [builder.gep(first, [step]) for step in steps]
            sizes = [builder.mul(high, ir.Constant(INDEX, WIDTH * v)) for v in range(vectors)]
            panels = [builder.gep(right, [size]) for size in sizes]

            # Two addresses that the compiler sees to go on side by side become one and a distance
            # between them, and to multiply from the sum of two takes another instruction.
            width = ir.Constant(INDEX, WIDTH)
            step = loop.opaque(width) if vectors == 1 else width

            def add(k: Any, values: list[Any]) -> list[Any]:
                at = builder.mul(k, width)
                loop.prefetch(builder.gep(next_, [builder.mul(k, n)]))
                there = builder.mul(k, step)
                row = [loop.vectors(builder.gep(panel, [there]), 1)[0] for panel in panels]
                own = [builder.add(at, ir.Constant(INDEX, i)) for i in range(rows)]
                numbers = [loop.spread(builder.load(builder.gep(left, [i]))) for i in own]
                return loop.outer(numbers, row, values)

            there = [vector for place in places for vector in loop.vectors(place, vectors)]
            add_to = builder.icmp_signed("!=", after, ir.Constant(INDEX, 0))
            begin = [builder.select(add_to, vector, zero(first)) for vector in there]
            result = loop.run(ir.Constant(INDEX, 0), count, begin, add)
            for i, place in enumerate(places):
                loop.store(result[i * vectors : (i + 1) * vectors], place)
            return context.get_dummy_value()

        return types.void(dy, x, grad, next_x, where), generate

    return outer
