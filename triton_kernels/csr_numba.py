"""The pass over the nonzeros of a matrix that makes unstructured products, as numba compiles it.

A tile of the batch is copied with features first, small enough to stay in a core's cache, of which
each nonzero reads one row; what belongs to the row of the nonzero stays in vector registers. Left
to itself, the compiler keeps it in memory, which takes twice as long; so the inner loop is written
in its intermediate language.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from triton_kernels.compiled_numba import compiled
from triton_kernels.transpose_numba import aligned, to_features, to_rows
from triton_kernels.vectors import INDEX, WIDTH, Loop, zero

# Nonzeros whose dot products are summed together.
_AT_ONCE = 8
# Rows whose numbers are copied together: batches lie far apart, so that a line of the cache alone
# would cost the same as some of them in a row.
_GROUP = 64


@cache
def walk(vectors: int) -> Callable[..., None]:
    """walk(x, own, values, offsets, index, slots, y, grad, summed, dotted, first, last), over rows
    [first, last):

    summed: y[b, r] = sum over the nonzeros k of row r of values[slots[k]] * x[b, index[k]];
    dotted: grad[slots[k]] = sum over b of own[b, r] * x[b, index[k]].
    x: (batch, n), own, y: (batch, rows), values, grad: (capacity,); not summed, values and y are
    not looked at, and not dotted, own and grad. ``16 * vectors`` numbers of the batch at a time.
    Both at once cost little more than one, since most of the time goes to reading x.
    Without the interpreter's lock. Nothing is checked.
    """
    sum_row = _run_row(vectors, summed=True, dotted=False)
    dot_row = _run_row(vectors, summed=False, dotted=True)
    do_both = _run_row(vectors, summed=True, dotted=True)
    size = WIDTH * vectors

    @compiled(vectors)
    def walk(  # type: ignore[no-untyped-def]
        x, own, values, offsets, index, slots, y, grad, summed, dotted, first, last
    ):
        start = np.int64(offsets[first])
        slots, index = slots[start : offsets[last]], index[start:]
        # In the order of the nonzeros: every tile reads them again.
        weights = np.empty(slots.size if summed else 0, x.dtype)
        for k in range(weights.size):
            weights[k] = values[slots[k]]
        dots = np.zeros(slots.size if dotted else 0, x.dtype)
        features = aligned(x.shape[1], size, x.dtype)
        mine, sums = aligned(_GROUP, size, x.dtype), aligned(_GROUP, size, x.dtype)
        for b in range(0, x.shape[0], size):
            to_features(x, b, 0, features, x.shape[1])
            for r in range(first, last, _GROUP):
                count = min(_GROUP, last - r)
                if dotted:
                    to_features(own, b, r, mine, count)
                for i in range(count):
                    begin, end = offsets[r + i] - start, offsets[r + i + 1] - start
                    if not dotted:
                        sum_row(features, mine, weights, index, begin, end, sums, dots, i)
                    elif not summed:
                        dot_row(features, mine, weights, index, begin, end, sums, dots, i)
                    else:
                        do_both(features, mine, weights, index, begin, end, sums, dots, i)
                if summed:
                    to_rows(sums, count, y, b, r)
        for k in range(dots.size):
            grad[slots[k]] = dots[k]

    return walk


def _run_row(vectors: int, summed: bool, dotted: bool) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def run_row(
        typing: Any,
        x: Any,
        own: Any,
        weights: Any,
        index: Any,
        first: Any,
        last: Any,
        sums: Any,
        dots: Any,
        i: Any,
    ) -> Any:
        """sums[i]: of weights[k] * x[index[k]] over nonzeros k in [first, last); and <own[i],
        x[index[k]]> is added to dots[k]."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loop = Loop(context, builder, signature, args)
            x_, weights_, index_, dots_ = (loop.data(i) for i in (0, 2, 3, 7))
            line = builder.mul(args[8], ir.Constant(INDEX, WIDTH * vectors))
            own_, sums_ = (builder.gep(loop.data(i), [line]) for i in (1, 6))
            mine = loop.vectors(own_, vectors) if dotted else []

            def run(k: Any, sums: list[Any], count: int) -> list[Any]:
                totals = []
                for i in range(count):
                    at = builder.add(k, ir.Constant(INDEX, i))
                    row = loop.vectors(loop.row(x_, index_, at, WIDTH * vectors), vectors)
                    if summed:
                        weight = loop.spread(builder.load(builder.gep(weights_, [at])))
                        sums = [loop.fused(weight, a, s) for a, s in zip(row, sums, strict=True)]
                    if dotted:
                        total = zero(x_)
                        for a, b in zip(mine, row, strict=True):
                            total = loop.fused(a, b, total)
                        totals.append(total)
                if dotted:
                    kind = ir.VectorType(x_.type.pointee, count)
                    place = builder.bitcast(builder.gep(dots_, [k]), kind.as_pointer())
                    before = builder.load(place)
                    before.align = 4
                    builder.store(builder.fadd(before, loop.totals(totals)), place).align = 4
                return sums

            middle, last = args[4], args[5]
            carried = [zero(x_)] * vectors if summed else []
            if dotted:  # Several at a time share the additions across a vector.
                most = builder.and_(builder.sub(last, middle), ir.Constant(INDEX, -_AT_ONCE))
                first, middle = middle, builder.add(middle, most)
                carried = loop.run(
                    first, middle, carried, lambda k, s: run(k, s, _AT_ONCE), _AT_ONCE
                )
            carried = loop.run(middle, last, carried, lambda k, s: run(k, s, 1))
            if summed:
                loop.store(carried, sums_)
            return context.get_dummy_value()

        at = types.int64
        return types.void(x, own, weights, index, at, at, sums, dots, at), generate

    return run_row
