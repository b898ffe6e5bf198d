"""The inner loops of block-sparse products on the CPU, as numba compiles them.

Each keeps a tile of its result in vector registers while it runs through all that is added to it,
and stores it once. Left to itself, the compiler keeps it in memory; so these loops are written in
its intermediate language.
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
from triton_kernels.transpose_numba import turn
from triton_kernels.vectors import INDEX, WIDTH, Loop, zero

# Rows of the batch that are multiplied at a time, so that what they read stays in a core's cache:
# more would be slower for small blocks, fewer would read the weight more often.
ROWS, GRADIENT_ROWS = 128, 64


# Not as a checker sees it, with the argument that numba adds.
_turn: Any = turn


@cache
def product(rows: int, vectors: int) -> Callable[..., None]:
    """product(x, weights, transposed, offsets, index, slots, bias, out, rooms, cuts, shape, first,
    last): out = bias + x M, where M is given by its blocks of (depth, width). Those of its r-th
    ``width`` columns are ``weights[slots[k]]``, or their transposes, at its index[k]-th ``depth``
    rows, for k in [offsets[r], offsets[r + 1]).

    x: (batch, n), weights: (capacity, depth, width) or transposed, bias: whole blocks, out: (batch,
    n_out), all flat; offsets, index, slots, cuts: int64; shape: (batch, n, n_out, depth, width).
    The work lies in pieces, the u-th of them column u % columns at the (u // columns)-th ``ROWS``
    rows; those in [cuts[first], cuts[last]) are done. rooms: (shares, numbers), where each has room
    for a tile of (rows, 16 * vectors), and for all blocks of a column if they are transposed.
    Without the interpreter's lock. Nothing is checked.
    """
    sums, panel = _sums(rows, vectors), WIDTH * vectors

    @compiled(rows, vectors)
    def product(  # type: ignore[no-untyped-def]
        x, weights, transposed, offsets, index, slots, bias, out, rooms, cuts, shape, first, last
    ):
        batch, n, n_out, depth, width = shape
        columns, size = len(offsets) - 1, depth * width
        edge = rooms[first]
        room = edge[rows * panel :]
        blocks = room if transposed else weights
        for u in range(cuts[first], cuts[last]):
            part, r = u // columns, u % columns
            begin, end = part * ROWS, min(batch, (part + 1) * ROWS)
            start, stop = offsets[r], offsets[r + 1]
            if transposed:
                for k in range(start, stop):
                    for i in range(0, width, WIDTH):
                        for j in range(0, depth, WIDTH):
                            square = slots[k] * size + i * depth + j
                            to = (k - start) * size + j * width + i
                            _turn(weights, square, depth, room, to, width)
            for b in range(begin, end, rows):
                for p in range(0, min(width, n_out - r * width), panel):
                    column = r * width + p
                    inside = min(panel, n_out - column)
                    # What reaches beyond the last column goes elsewhere first.
                    target, stride, at, first_row = out, n_out, column, 0
                    if inside < panel:
                        target, stride, at, first_row = edge, panel, 0, b
                    ends = (start, stop, b, end - 1)
                    sums(
                        *(x, blocks, transposed, index, slots, bias, target),
                        (*ends, n, depth, width, p, column, first_row, stride, at),
                    )
                    if inside < panel:
                        for i in range(min(rows, end - b)):
                            for j in range(inside):
                                out[(b + i) * n_out + column + j] = edge[i * panel + j]

    return product  # type: ignore[no-any-return]


def _sums(rows: int, vectors: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def sums(
        typing: Any,
        x: Any,
        weights: Any,
        transposed: Any,
        index: Any,
        slots: Any,
        bias: Any,
        out: Any,
        where: Any,
    ) -> Any:
        """A tile of (rows, 16 * vectors) of ``product`` -> out."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loop = Loop(context, builder, signature, args)
            x_, weights_, index_, slots_, bias_, out_ = (loop.data(i) for i in (0, 1, 3, 4, 5, 6))
            first, last, b, end, n, depth, width, p, column, first_row, stride, at = (
                cgutils.unpack_tuple(builder, args[7])
            )
            size = builder.mul(depth, width)
            # Where the batch ends inside of the tile, its last row is computed several times.
            own = []
            for i in range(rows):
                row = builder.add(b, ir.Constant(INDEX, i))
                own.append(builder.select(builder.icmp_signed("<", row, end), row, end))
            lines = [builder.gep(x_, [builder.mul(row, n)]) for row in own]

            def prefetch(k: Any) -> None:
                """What is read after block k: in the same rows or, behind the last one, in the
                rows of the next tile."""
                following = builder.add(k, ir.Constant(INDEX, 1))
                more = builder.icmp_signed("<", following, last)
                strip = builder.load(builder.gep(index_, [builder.select(more, following, first)]))
                below = builder.select(
                    more, ir.Constant(INDEX, 0), builder.mul(n, ir.Constant(INDEX, rows))
                )
                start = builder.add(below, builder.mul(strip, depth))

                def line(i: Any, values: list[Any]) -> list[Any]:
                    for line in lines:
                        loop.prefetch(builder.gep(line, [builder.add(start, i)]))
                    return values

                loop.run(ir.Constant(INDEX, 0), depth, [], line, WIDTH)

            def block(k: Any, values: list[Any]) -> list[Any]:
                start = builder.mul(builder.load(builder.gep(index_, [k])), depth)
                left = builder.sub(n, start)
                inside = builder.select(builder.icmp_signed("<", left, depth), left, depth)
                slot = builder.load(builder.gep(slots_, [k]))
                slot = builder.select(args[2], builder.sub(k, first), slot)
                weight = builder.gep(weights_, [builder.add(builder.mul(slot, size), p)])
                strips = [builder.gep(line, [start]) for line in lines]
                prefetch(k)

                def add(i: Any, values: list[Any]) -> list[Any]:
                    row = loop.vectors(builder.gep(weight, [builder.mul(i, width)]), vectors)
                    numbers = [loop.spread(builder.load(builder.gep(s, [i]))) for s in strips]
                    return loop.outer(numbers, row, values)

                return loop.run(ir.Constant(INDEX, 0), inside, values, add)

            targets = []
            for row in own:
                to = builder.mul(builder.sub(row, first_row), stride)
                targets.append(builder.gep(out_, [builder.add(to, at)]))
            # A line that is written is fetched first, which takes as long as some blocks.
            for target in targets:
                for place in loop.places(target, vectors):
                    loop.prefetch(place, write=True)
            begin = loop.vectors(builder.gep(bias_, [column]), vectors)
            result = loop.run(first, last, begin * rows, block)
            for i, target in enumerate(targets):
                loop.store(result[i * vectors : (i + 1) * vectors], target)
            return context.get_dummy_value()

        result = types.void(x, weights, transposed, index, slots, bias, out, where)
        return result, generate

    return sums


@cache
def gradient(rows: int, vectors: int) -> Callable[..., None]:
    """gradient(x, dy, major, minor, slots, grad, rooms, cuts, shape, first, last): grad[slots[k]] =
    strip major[k] of dy, transposed, times strip minor[k] of x, for k in [cuts[first], cuts[last]).

    x: (batch, n_in), dy: (batch, n_out), grad: (capacity, bh, bw), all flat; major, minor, slots,
    cuts: int64; shape: (batch, n_in, n_out, bh, bw). Zero in what reaches beyond x and dy. Tiles of
    (rows, 16 * vectors). rooms: (shares, ``GRADIENT_ROWS`` * (bh + 16 * vectors)). Without the
    interpreter's lock. Nothing is checked.
    """
    outer, panel = _outer(rows, vectors), WIDTH * vectors

    @compiled(rows, vectors)
    def gradient(  # type: ignore[no-untyped-def]
        x, dy, major, minor, slots, grad, rooms, cuts, shape, first, last
    ):
        batch, n_in, n_out, bh, bw = shape
        # Not constants, for each of which numba would compile its own ``_pack``.
        left, width = np.int64(0), np.int64(panel)
        room, right = rooms[first], left + GRADIENT_ROWS * bh
        start, end = cuts[first], cuts[last]
        while start < end:
            r, stop = major[start], start
            while stop < end and major[stop] == r:
                stop += 1
            for b in range(0, batch, GRADIENT_ROWS):
                count = min(GRADIENT_ROWS, batch - b)
                _pack(dy, n_out, b, count, r * bh, bh, room, left)
                for k in range(start, stop):
                    for p in range(0, bw, panel):
                        _pack(x, n_in, b, count, minor[k] * bw + p, width, room, right)
                        # What is packed next, a vector of every row with each of the tiles.
                        if p + panel < bw:
                            following = b * n_in + minor[k] * bw + p + panel
                        else:
                            following = b * n_in + minor[min(k + 1, stop - 1)] * bw
                        for q in range(0, bh, rows):
                            strip = left + q // WIDTH * WIDTH * count + q % WIDTH
                            at = (slots[k] * bh + q) * bw + p
                            ahead = following + q // rows % vectors * WIDTH
                            outer(x, room, grad, (strip, right, at, count, bw, b, ahead, n_in))
            start = stop

    return gradient  # type: ignore[no-any-return]


def _moved(typing: Any, source: Any, start: Any, target: Any, to: Any) -> Any:
    """One vector."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        loop = Loop(context, builder, signature, args)
        vector = loop.vectors(builder.gep(loop.data(0), [args[1]]), 1)
        loop.store(vector, builder.gep(loop.data(2), [args[3]]))
        return context.get_dummy_value()

    return types.void(source, start, target, to), generate


_move: Any = intrinsic(_moved)


@njit(nogil=True)
def _pack(x, n, first, count, column, width, out, to):  # type: ignore[no-untyped-def]
    """x: (batch, n) at [first : first + count, column : column + width], zero beyond its columns
    -> (width / 16, count, 16) from out[to] on, all flat."""
    for i in range(count):
        at = (first + i) * n + column
        for j in range(0, width, WIDTH):
            place = to + j * count + WIDTH * i
            if column + j + WIDTH <= n:
                _move(x, at + j, out, place)
            else:
                for v in range(WIDTH):
                    out[place + v] = x[at + j + v] if column + j + v < n else 0


def _outer(rows: int, vectors: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def outer(typing: Any, x: Any, room: Any, grad: Any, where: Any) -> Any:
        """A tile of (rows, 16 * vectors) of ``gradient``: the sum over packed rows of the outer
        products of those of dy and x; added to what is there, unless they are the first."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loop = Loop(context, builder, signature, args)
            left, right, at, count, stride, after, ahead, n = cgutils.unpack_tuple(builder, args[3])
            left, right = (builder.gep(loop.data(1), [start]) for start in (left, right))
            first = builder.gep(loop.data(2), [at])
            next_ = builder.gep(loop.data(0), [ahead])
            steps = [builder.mul(stride, ir.Constant(INDEX, i)) for i in range(rows)]
            places = [builder.gep(first, [step]) for step in steps]
            sizes = [builder.mul(count, ir.Constant(INDEX, WIDTH * v)) for v in range(vectors)]
            panels = [builder.gep(right, [size]) for size in sizes]

            def add(k: Any, values: list[Any]) -> list[Any]:
                at = builder.mul(k, ir.Constant(INDEX, WIDTH))
                loop.prefetch(builder.gep(next_, [builder.mul(k, n)]))
                row = [loop.vectors(builder.gep(panel, [at]), 1)[0] for panel in panels]
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

        return types.void(x, room, grad, where), generate

    return outer
