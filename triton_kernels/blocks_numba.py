"""The inner loops of block-sparse products on the CPU, as numba compiles them.

Each keeps a tile of its result in vector registers while it runs through all that is added to it,
and stores it once. Left to itself, the compiler keeps it in memory; so these loops are written in
its intermediate language.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from triton_kernels.compiled_numba import compiled
from triton_kernels.transpose_numba import to_features, turn
from triton_kernels.vectors import INDEX, WIDTH, Loop

# Rows of the batch that are multiplied at a time, so that what they read stays in a core's cache:
# more would be slower for small blocks, fewer would read the weight more often.
ROWS = 128


# Not as a checker sees it, with the argument that numba adds.
_turn: Any = turn


@cache
def product(rows: int, vectors: int, packed: bool = False) -> Callable[..., None]:
    """product(x, weights, transposed, offsets, index, slots, bias, out, rooms, cuts, shape, first,
    last): out = bias + x M, where M is given by its blocks of (depth, width). Those of its r-th
    ``width`` columns are ``weights[slots[k]]``, or their transposes, at its index[k]-th ``depth``
    rows, for k in [offsets[r], offsets[r + 1]).

    x: (batch, n), weights: (capacity, depth, width) or transposed, bias: whole blocks, out: (batch,
    n_out), all flat; offsets, index, slots, cuts: int64; shape: (batch, n, n_out, depth, width).
    The work lies in pieces, the u-th of them column u % columns at the (u // columns)-th ``ROWS``
    rows; those in [cuts[first], cuts[last]) are done. rooms: (shares, numbers), where each has room
    for a tile of (rows, 16 * vectors); for ``ROWS`` rows of x if these are ``packed`` first, which
    takes tiles of 16 rows; and for all blocks of a column if they are transposed. Without the
    interpreter's lock. Nothing is checked.
    """
    sums, panel = _sums(rows, vectors, packed), WIDTH * vectors

    @compiled(rows, vectors, packed)
    def product(  # type: ignore[no-untyped-def]
        x, weights, transposed, offsets, index, slots, bias, out, rooms, cuts, shape, first, last
    ):
        batch, n, n_out, depth, width = shape
        columns, size = len(offsets) - 1, depth * width
        edge = rooms[first]
        tiles = edge[rows * panel :]
        room = tiles[ROWS * n :] if packed else tiles
        source, there = tiles if packed else x, -1
        blocks = room if transposed else weights
        for u in range(cuts[first], cuts[last]):
            part, r = u // columns, u % columns
            begin, end = part * ROWS, min(batch, (part + 1) * ROWS)
            start, stop = offsets[r], offsets[r + 1]
            if packed and part != there:
                for b in range(begin, end, WIDTH):
                    tile = tiles[(b - begin) * n : (b - begin + WIDTH) * n]
                    to_features(x.reshape(batch, n), b, 0, tile.reshape(n, WIDTH), n)
                there = part
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
                    inside, high = min(panel, n_out - column), min(rows, end - b)
                    # What reaches beyond the last column goes elsewhere first; of packed rows,
                    # what reaches beyond the last row as well.
                    target, stride, at, first_row = out, n_out, column, 0
                    elsewhere = inside < panel or (packed and high < rows)
                    if elsewhere:
                        target, stride, at, first_row = edge, panel, 0, b
                    last_row = b + rows - 1 if packed else end - 1
                    tile_at = (b - begin) * n if packed else 0
                    where = (column, first_row, stride, at, tile_at)
                    sums(
                        *(source, blocks, transposed, index, slots, bias, target),
                        (start, stop, b, last_row, n, depth, width, p, *where),
                    )
                    if elsewhere:
                        for i in range(high):
                            for j in range(inside):
                                out[(b + i) * n_out + column + j] = edge[i * panel + j]

    return product  # type: ignore[no-any-return]


class _Rows:
    """The numbers of some rows of x: (batch, n), where they lie."""

    def __init__(self, loop: Loop, x: Any, own: list[Any], n: Any) -> None:
        self.loop, self.n = loop, n
        self.lines = [loop.builder.gep(x, [loop.builder.mul(row, n)]) for row in own]

    def prefetch(self, start: Any, depth: Any, below: Any) -> None:
        """Columns [start, start + depth) of these rows or, if ``below``, of as many behind them."""
        builder = self.loop.builder
        next_ = builder.mul(self.n, ir.Constant(INDEX, len(self.lines)))
        start = builder.add(builder.select(below, next_, ir.Constant(INDEX, 0)), start)

        def line(i: Any, values: list[Any]) -> list[Any]:
            for line in self.lines:
                self.loop.prefetch(builder.gep(line, [builder.add(start, i)]))
            return values

        self.loop.run(ir.Constant(INDEX, 0), depth, [], line, WIDTH)

    def run(self, start: Any, count: Any, carried: list[Any], body: Callable[..., Any]) -> Any:
        """body(i, the numbers of column start + i, values) -> values, for i below count."""
        builder = self.loop.builder
        rows = [builder.gep(line, [start]) for line in self.lines]

        def column(i: Any, values: list[Any]) -> Any:
            return body(i, [builder.load(builder.gep(row, [i])) for row in rows], values)

        return self.loop.run(ir.Constant(INDEX, 0), count, carried, column)


class _Tile:
    """The same of a tile that was packed, (n, rows): a single address says where they all are,
    from which a processor multiplies without another instruction."""

    def __init__(self, loop: Loop, x: Any, n: Any, rows: int) -> None:
        self.loop, self.x, self.n, self.rows = loop, x, n, rows

    def _column(self, at: Any) -> Any:
        builder = self.loop.builder
        return builder.gep(self.x, [builder.mul(at, ir.Constant(INDEX, self.rows))])

    def prefetch(self, start: Any, depth: Any, below: Any) -> None:
        builder, size = self.loop.builder, ir.Constant(INDEX, self.rows)
        start = builder.add(builder.select(below, self.n, ir.Constant(INDEX, 0)), start)
        first = self._column(start)

        def line(i: Any, values: list[Any]) -> list[Any]:
            self.loop.prefetch(builder.gep(first, [i]))
            return values

        self.loop.run(ir.Constant(INDEX, 0), builder.mul(depth, size), [], line, WIDTH)

    def run(self, start: Any, count: Any, carried: list[Any], body: Callable[..., Any]) -> Any:
        builder = self.loop.builder
        first = self._column(start)

        def column(i: Any, values: list[Any]) -> Any:
            at = builder.gep(first, [builder.mul(i, ir.Constant(INDEX, self.rows))])
            own = [builder.gep(at, [ir.Constant(INDEX, j)]) for j in range(self.rows)]
            return body(i, [builder.load(number) for number in own], values)

        return self.loop.run(ir.Constant(INDEX, 0), count, carried, column)


def _sums(rows: int, vectors: int, packed: bool) -> Any:
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
            (first, last, b, end, n, depth, width, p, column, first_row, stride, at, tile) = (
                cgutils.unpack_tuple(builder, args[7])
            )
            size = builder.mul(depth, width)
            # Where the batch ends inside of the tile, its last row is computed several times.
            own = []
            for i in range(rows):
                row = builder.add(b, ir.Constant(INDEX, i))
                own.append(builder.select(builder.icmp_signed("<", row, end), row, end))
            numbers = (
                _Tile(loop, builder.gep(x_, [tile]), n, rows) if packed else _Rows(loop, x_, own, n)
            )

            def prefetch(k: Any) -> None:
                """What is read after block k: in the same rows or, behind the last one, in the
                rows of the next tile."""
                following = builder.add(k, ir.Constant(INDEX, 1))
                behind = builder.icmp_signed(">=", following, last)
                next_ = builder.load(
                    builder.gep(index_, [builder.select(behind, first, following)])
                )
                numbers.prefetch(builder.mul(next_, depth), depth, behind)

            def block(k: Any, values: list[Any]) -> list[Any]:
                start = builder.mul(builder.load(builder.gep(index_, [k])), depth)
                left = builder.sub(n, start)
                inside = builder.select(builder.icmp_signed("<", left, depth), left, depth)
                slot = builder.load(builder.gep(slots_, [k]))
                slot = builder.select(args[2], builder.sub(k, first), slot)
                weight = builder.gep(weights_, [builder.add(builder.mul(slot, size), p)])
                prefetch(k)

                def add(i: Any, column: list[Any], values: list[Any]) -> list[Any]:
                    row = loop.vectors(builder.gep(weight, [builder.mul(i, width)]), vectors)
                    return loop.outer([loop.spread(number) for number in column], row, values)

                return numbers.run(start, inside, values, add)

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
