"""The two inner loops of unstructured products on the CPU, as numba compiles them.

Both keep a tile of the batch in vector registers while they run through the nonzeros of a row.
Left to itself, the compiler keeps it in memory, which takes twice as long; so the loops are written
in its intermediate language.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from triton_kernels.vectors import INDEX, WIDTH, Loop, zero

# Nonzeros whose dot products are summed together.
_AT_ONCE = 4


@cache
def kernels(vectors: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """(product, sampled) for batch tiles of 16 * vectors numbers.

    product(x, weights, offsets, index, y, first, last): y[t, r] = sum over the nonzeros k of row r
    of weights[k] * x[t, index[k]], for rows [first, last).
    sampled(x, dy, offsets, index, grad, first, last): grad[k] = sum over t of <dy[t, r], x[t,
    index[k]]>. x: (tiles, n, 16 * vectors), y and dy: (tiles, rows, 16 * vectors).
    Without the interpreter's lock. Nothing is checked.
    """
    row_sum, row_dots = _row_sum(vectors), _row_dots(vectors)

    @njit(nogil=True)
    def product(x, weights, offsets, index, y, first, last):  # type: ignore[no-untyped-def]
        for t in range(x.shape[0]):
            for r in range(first, last):
                row_sum(
                    x[t], weights, index, np.int64(offsets[r]), np.int64(offsets[r + 1]), y[t, r]
                )

    @njit(nogil=True)
    def sampled(x, dy, offsets, index, grad, first, last):  # type: ignore[no-untyped-def]
        for k in range(offsets[first], offsets[last]):
            grad[k] = 0
        for t in range(x.shape[0]):
            for r in range(first, last):
                row_dots(
                    x[t], dy[t, r], index, np.int64(offsets[r]), np.int64(offsets[r + 1]), grad
                )

    return product, sampled


def _row_sum(vectors: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def row_sum(
        typing: Any, x: Any, weights: Any, index: Any, first: Any, last: Any, y: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loop = Loop(context, builder, signature, args)
            x_, weights_, index_, y_ = (loop.data(i) for i in (0, 1, 2, 5))

            def add(k: Any, sums: list[Any]) -> list[Any]:
                weight = loop.spread(builder.load(builder.gep(weights_, [k])))
                row = loop.vectors(loop.row(x_, index_, k, WIDTH * vectors), vectors)
                return [loop.fused(weight, x, s) for x, s in zip(row, sums, strict=True)]

            loop.store(loop.run(args[3], args[4], [zero(x_)] * vectors, add), y_)
            return context.get_dummy_value()

        return types.void(x, weights, index, first, last, y), generate

    return row_sum


def _row_dots(vectors: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def row_dots(typing: Any, x: Any, dy: Any, index: Any, first: Any, last: Any, grad: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loop = Loop(context, builder, signature, args)
            x_, dy_, index_, grad_ = (loop.data(i) for i in (0, 1, 2, 5))
            own = loop.vectors(dy_, vectors)

            def dots(k: Any, count: int) -> list[Any]:
                sums = []
                for i in range(count):
                    at = builder.add(k, ir.Constant(INDEX, i))
                    row = loop.vectors(loop.row(x_, index_, at, WIDTH * vectors), vectors)
                    total = zero(x_)
                    for a, b in zip(own, row, strict=True):
                        total = loop.fused(a, b, total)
                    sums.append(total)
                kind = ir.VectorType(x_.type.pointee, count)
                place = builder.bitcast(builder.gep(grad_, [k]), kind.as_pointer())
                before = builder.load(place)
                before.align = 4
                builder.store(builder.fadd(before, loop.totals(sums)), place).align = 4
                return []

            # Four at a time share the additions across a vector.
            first, last = args[3], args[4]
            most = builder.and_(builder.sub(last, first), ir.Constant(INDEX, -_AT_ONCE))
            middle = builder.add(first, most)
            loop.run(first, middle, [], lambda k, _: dots(k, _AT_ONCE), _AT_ONCE)
            loop.run(middle, last, [], lambda k, _: dots(k, 1))
            return context.get_dummy_value()

        return types.void(x, dy, index, first, last, grad), generate

    return row_dots
