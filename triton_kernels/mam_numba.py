"""The inner loops of multiply-and-max/min on the CPU, as numba compiles them.

Forward: a tile of the batch stays in vector registers while a tile of columns runs past; kept are
the largest and the smallest product of every sample, and in which tile of columns each was first
seen. Only the products of that tile are computed again, to find the column. An index carried along
in the registers would take more than twice as many instructions.

Comparisons in registers pass over NaN. Where a sample or a row of weights is not finite, its first
NaN is looked for afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from triton_kernels.compiled_numba import compiled
from triton_kernels.vectors import INDEX, WIDTH, Loop

# Columns of which one is remembered to hold the winner, until it is looked for.
_TILE = 32
# Outputs whose winners are kept before they are written: in a core's cache with their weights.
_ROWS = 32


@cache
def forward(vectors: int) -> Callable[..., None]:
    """kernel(tiled, x, weight, counts, values, arg_max, arg_min, base, first, last) for batch tiles
    of 16 * vectors numbers.

    tiled: (tiles, n_in, 16 * vectors), x: (batch, n_in), the same numbers; weight: (rows, n_in),
    of which row r is output base + r of values, arg_max and arg_min: (batch, n_out). counts: int32
    (n_out, n_in), += 1 for every winner, or empty. For rows [first, last). Without the
    interpreter's lock. Nothing is checked.
    """
    sweep, hit = _sweep(vectors), _hit()

    @compiled(vectors)
    def kernel(  # type: ignore[no-untyped-def]
        tiled, x, weight, counts, values, arg_max, arg_min, base, first, last
    ):
        lanes, (batch, n_in) = tiled.shape[2], x.shape
        finite = _finite_rows(x)
        best = np.empty((_ROWS, 2 * lanes), x.dtype)
        tiles = np.empty((_ROWS, 2 * lanes), np.int32)
        usual = np.empty(_ROWS, np.bool_)
        won = np.empty(2, np.int64)
        for start in range(first, last, _ROWS):
            rows = min(_ROWS, last - start)
            for i in range(rows):
                usual[i] = _finite(weight[start + i])
            for t in range(tiled.shape[0]):
                for i in range(rows):
                    for k in range(lanes):
                        best[i, k], best[i, lanes + k] = -np.inf, np.inf
                        tiles[i, k] = tiles[i, lanes + k] = 0
                for left in range(0, n_in, _TILE):
                    right = min(left + _TILE, n_in)
                    for i in range(0, rows, 2):
                        # The last of an odd number of rows is its own neighbour.
                        j = min(i + 1, rows - 1)
                        one, two = (start + i) * n_in, (start + j) * n_in
                        x_at, number = t * n_in * lanes, np.int32(left // _TILE)
                        sweep(tiled, x_at, weight, one, two, left, right, best, tiles, i, j, number)
                for lane in range(min(lanes, batch - t * lanes)):
                    b = t * lanes + lane
                    for i in range(rows):
                        r, o = start + i, base + start + i
                        value = best[i, lane] + best[i, lanes + lane]
                        nan = -1
                        if not (finite[b] and usual[i]):
                            nan = _first_nan(x[b], weight[r])
                        if nan >= 0:
                            value = x[b, nan] * weight[r, nan]
                            won[0] = won[1] = nan
                        else:
                            for side in range(2):
                                product = best[i, side * lanes + lane]
                                j = np.int64(tiles[i, side * lanes + lane]) * _TILE
                                if j + _TILE <= n_in:
                                    j += hit(x, b * n_in + j, weight, r * n_in + j, product)
                                else:
                                    while j < n_in and x[b, j] * weight[r, j] != product:
                                        j += 1
                                # Whoever writes to the operands meanwhile gets a wrong column,
                                # but one of theirs.
                                won[side] = min(j, n_in - 1)
                        values[b, o], arg_max[b, o], arg_min[b, o] = value, won[0], won[1]
                        if counts.size:
                            counts[o, won[0]] += 1
                            counts[o, won[1]] += 1

    return kernel


@cache
def sparse_forward(vectors: int) -> Callable[..., None]:
    """kernel(tiled, x, weights, offsets, cols, slots, absent, counts, values, arg_max, arg_min,
    first, last): the same over compressed rows.

    weights, cols, slots: (alive,). absent: (rows,), the column of the weight of zero that competes
    in each row; n_in where none does. The winners are positions in ``cols``, -1 where an absent
    weight won. counts: int32 (capacity,), by slot, or empty.
    """
    compete = _compete(vectors)

    @njit(nogil=True)
    def first_nan(x, weights, cols, first, last):  # type: ignore[no-untyped-def]
        for k in range(first, last):
            if np.isnan(x[cols[k]] * weights[k]):
                return k
        return -1

    @compiled(vectors)
    def kernel(  # type: ignore[no-untyped-def]
        tiled,
        x,
        weights,
        offsets,
        cols,
        slots,
        absent,
        counts,
        values,
        arg_max,
        arg_min,
        first,
        last,
    ):
        lanes, (batch, n_in) = tiled.shape[2], x.shape
        best = np.empty((_ROWS, 2 * lanes), x.dtype)
        where = np.empty((_ROWS, 2 * lanes), np.int32)
        usual, finite = np.empty(_ROWS, np.bool_), _finite_rows(x)
        for start in range(first, last, _ROWS):
            rows = min(_ROWS, last - start)
            for i in range(rows):
                usual[i] = _finite(weights[offsets[start + i] : offsets[start + i + 1]])
            for t in range(tiled.shape[0]):
                for i in range(rows):
                    begin, end = np.int64(offsets[start + i]), np.int64(offsets[start + i + 1])
                    x_at = t * n_in * lanes
                    compete(tiled, x_at, weights, cols, begin, end, best, where, i)
                for lane in range(min(lanes, batch - t * lanes)):
                    b = t * lanes + lane
                    for i in range(rows):
                        r = start + i
                        begin, end = offsets[r], offsets[r + 1]
                        high, low = best[i, lane], best[i, lanes + lane]
                        a, c = int(where[i, lane]), int(where[i, lanes + lane])
                        nan = -1
                        if not (finite[b] and usual[i]):
                            nan = first_nan(x[b], weights, cols, begin, end)
                        if nan >= 0:
                            a = c = nan
                            high = low = x[b, cols[nan]] * weights[nan]
                        elif begin == end:
                            a = c = -1
                            high = low = x.dtype.type(0)
                        elif absent[r] < n_in:
                            if high < 0 or (high == 0 and cols[a] > absent[r]):
                                high, a = x.dtype.type(0), -1
                            if low > 0 or (low == 0 and cols[c] > absent[r]):
                                low, c = x.dtype.type(0), -1
                        values[b, r], arg_max[b, r], arg_min[b, r] = high + low, a, c
                        if counts.size:
                            if a >= 0:
                                counts[slots[a]] += 1
                            if c >= 0:
                                counts[slots[c]] += 1

    return kernel


@compiled()
def input_gradient(dy, weight, arg_max, arg_min, dx, base, first, last):  # type: ignore[no-untyped-def]
    """dx[b] += what samples [first, last) owe to rows base ... of the outputs, whose weights are
    ``weight``; always in the order of the outputs."""
    for start in range(0, len(weight), _ROWS):
        for b in range(first, last):
            for r in range(start, min(start + _ROWS, len(weight))):
                slope = dy[b, base + r]
                a, c = arg_max[b, base + r], arg_min[b, base + r]
                dx[b, a] += slope * weight[r, a]
                dx[b, c] += slope * weight[r, c]


@compiled()
def weight_gradient(dy, x, arg_max, arg_min, dweight, base, first, last):  # type: ignore[no-untyped-def]
    """dweight[r] += the gradient of output base + r, for rows [first, last); always in the order of
    the samples."""
    for start in range(first, last, _ROWS):
        for b in range(len(x)):
            for r in range(start, min(start + _ROWS, last)):
                slope = dy[b, base + r]
                a, c = arg_max[b, base + r], arg_min[b, base + r]
                dweight[r, a] += slope * x[b, a]
                dweight[r, c] += slope * x[b, c]


@compiled()
def sparse_input_gradient(dy, weights, cols, arg_max, arg_min, dx, first, last):  # type: ignore[no-untyped-def]
    """dx[b] += the gradient of samples [first, last); weights, cols: (alive,)."""
    for start in range(0, dy.shape[1], _ROWS):
        for b in range(first, last):
            for r in range(start, min(start + _ROWS, dy.shape[1])):
                for k in (arg_max[b, r], arg_min[b, r]):
                    if k >= 0:
                        dx[b, cols[k]] += dy[b, r] * weights[k]


@compiled()
def sparse_weight_gradient(dy, x, cols, slots, arg_max, arg_min, grad, first, last):  # type: ignore[no-untyped-def]
    """grad[slot] += the gradient of the weights of rows [first, last)."""
    for start in range(first, last, _ROWS):
        for b in range(len(x)):
            for r in range(start, min(start + _ROWS, last)):
                for k in (arg_max[b, r], arg_min[b, r]):
                    if k >= 0:
                        grad[slots[k]] += dy[b, r] * x[b, cols[k]]


@njit(nogil=True)
def _finite(row):  # type: ignore[no-untyped-def]
    yes = True
    for number in row:
        yes &= abs(number) < np.inf
    return yes


@njit(nogil=True)
def _finite_rows(x):  # type: ignore[no-untyped-def]
    yes = np.empty(len(x), np.bool_)
    for b in range(len(x)):
        yes[b] = _finite(x[b])
    return yes


@njit(nogil=True)
def _first_nan(x, weight):  # type: ignore[no-untyped-def]
    for j in range(x.size):
        if np.isnan(x[j] * weight[j]):
            return j
    return -1


def _sweep(vectors: int) -> Any:
    """Columns [first, last) of two rows of weights, for a tile of samples.

    Into rows i and j of ``best`` (the largest products, then the smallest) and of ``tiles`` (the
    number of the tile of columns that had it first). x_at, one, two: where the samples and the rows
    of weights begin in their arrays. Arrays are passed whole: each view would be counted.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def sweep(
        typing: Any,
        x: Any,
        x_at: Any,
        weight: Any,
        one: Any,
        two: Any,
        first: Any,
        last: Any,
        best: Any,
        tiles: Any,
        i: Any,
        j: Any,
        number: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loop = Loop(context, builder, signature, args)
            lanes = ir.Constant(INDEX, WIDTH * vectors)
            x_ = builder.gep(loop.data(0), [args[1]])
            rows = [builder.gep(loop.data(2), [at]) for at in args[3:5]]
            wide = ir.Constant(INDEX, 2 * WIDTH * vectors)
            best_, tiles_ = (
                [builder.gep(loop.data(k), [builder.mul(at, wide)]) for at in args[9:11]]
                for k in (7, 8)
            )

            def compare(k: Any, known: list[Any]) -> list[Any]:
                at = builder.gep(x_, [builder.mul(k, lanes)])
                columns = loop.vectors(at, vectors)
                new = []
                for n, row in enumerate(rows):
                    factor = loop.spread(builder.load(builder.gep(row, [k])))
                    products = [builder.fmul(factor, column) for column in columns]
                    own = known[2 * vectors * n :]
                    for sign, side in ((">", own[:vectors]), ("<", own[vectors : 2 * vectors])):
                        for product, other in zip(products, side, strict=True):
                            better = builder.fcmp_ordered(sign, product, other)
                            new.append(builder.select(better, product, other))
                return new

            before = [v for address in best_ for v in loop.vectors(address, 2 * vectors)]
            after = loop.run(args[5], args[6], before, compare)
            this = loop.spread(args[11])
            for n, (kept, known_at) in enumerate(zip(best_, tiles_, strict=True)):
                part = slice(2 * vectors * n, 2 * vectors * (n + 1))
                known = loop.vectors(known_at, 2 * vectors)
                for k, (new, old) in enumerate(zip(after[part], before[part], strict=True)):
                    beaten = builder.fcmp_ordered("!=", new, old)
                    known[k] = builder.select(beaten, this, known[k])
                loop.store(after[part], kept)
                loop.store(known, known_at)
            return context.get_dummy_value()

        whole = types.int64
        ends = (whole,) * 4
        return types.void(x, whole, weight, *ends, best, tiles, whole, whole, number), generate

    return sweep


def _hit() -> Any:
    """Where in a tile of columns a product is first met; 64, more than it has, where it is not.
    x_at, weight_at: where the tile begins in the arrays."""

    @intrinsic  # type: ignore[untyped-decorator]
    def hit(typing: Any, x: Any, x_at: Any, weight: Any, weight_at: Any, product: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loop = Loop(context, builder, signature, args)
            wanted, many = loop.spread(args[4]), _TILE // WIDTH
            sides = (builder.gep(loop.data(k), [args[k + 1]]) for k in (0, 2))
            pairs = zip(*(loop.vectors(side, many) for side in sides), strict=True)
            mask = ir.Constant(INDEX, 0)
            for i, (x_, weight_) in enumerate(pairs):
                equal = builder.fcmp_ordered("==", builder.fmul(x_, weight_), wanted)
                bits = builder.zext(builder.bitcast(equal, ir.IntType(WIDTH)), INDEX)
                mask = builder.or_(mask, builder.shl(bits, ir.Constant(INDEX, WIDTH * i)))
            return builder.cttz(mask, ir.Constant(ir.IntType(1), 0))

        return types.int64(x, types.int64, weight, types.int64, product), generate

    return hit


def _compete(vectors: int) -> Any:
    """Nonzeros [first, last), for the tile of samples that begins at x_at: into row i of ``best``
    the largest products, then the smallest, and into that of ``where`` their positions."""

    @intrinsic  # type: ignore[untyped-decorator]
    def compete(
        typing: Any,
        x: Any,
        x_at: Any,
        weights: Any,
        index: Any,
        first: Any,
        last: Any,
        best: Any,
        where: Any,
        i: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loop = Loop(context, builder, signature, args)
            x_, weights_, index_ = (loop.data(k) for k in (0, 2, 3))
            x_ = builder.gep(x_, [args[1]])
            row = builder.mul(args[8], ir.Constant(INDEX, 2 * WIDTH * vectors))
            best_, where_ = (builder.gep(loop.data(k), [row]) for k in (6, 7))
            position = where_.type.pointee
            kind = ir.VectorType(x_.type.pointee, WIDTH)

            def compare(k: Any, known: list[Any]) -> list[Any]:
                weight = loop.spread(builder.load(builder.gep(weights_, [k])))
                columns = loop.vectors(loop.row(x_, index_, k, WIDTH * vectors), vectors)
                products = [builder.fmul(weight, column) for column in columns]
                this, best, at = loop.spread(builder.trunc(k, position)), [], []
                for i in range(2 * vectors):
                    product, sign = products[i % vectors], ">" if i < vectors else "<"
                    better = builder.fcmp_ordered(sign, product, known[i])
                    best.append(builder.select(better, product, known[i]))
                    at.append(builder.select(better, this, known[2 * vectors + i]))
                return best + at

            start = [
                ir.Constant(kind, [sign * float("inf")] * WIDTH)
                for sign in (-1, 1)
                for _ in range(vectors)
            ]
            # An infinite product beats nothing: the first nonzero wins then.
            start += [loop.spread(builder.trunc(args[4], position))] * (2 * vectors)
            found = loop.run(args[4], args[5], start, compare)
            loop.store(found[: 2 * vectors], best_)
            loop.store(found[2 * vectors :], where_)
            return context.get_dummy_value()

        whole = types.int64
        taken = (x, whole, weights, index, whole, whole, best, where, whole)
        return types.void(*taken), generate

    return compete
