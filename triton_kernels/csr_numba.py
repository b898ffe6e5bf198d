"""The pass over the nonzeros of a matrix that makes unstructured products, as numba compiles it.

A tile of the batch is copied with features first. Of a piece of these, as large as the nearest
cache holds, a run of the nonzeros of one row of the matrix reads a row each (see ``csr_runs``);
what belongs to the row of the matrix stays in vector registers meanwhile. Left to itself, the
compiler keeps it in memory, which takes twice as long; so the inner loops are written in its
intermediate language: one for every length of a run, without a branch that depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from triton_kernels.compiled_numba import compiled
from triton_kernels.csr_runs_numba import LONGEST
from triton_kernels.transpose_numba import aligned, to_features, to_rows
from triton_kernels.vectors import INDEX, WIDTH, Loop


@cache
def walk(vectors: int, summed: bool, dotted: bool, together: int) -> Callable[..., None]:
    """walk(x, own, values, runs..., y, grad, first, last), over groups of rows [first, last), where
    ``runs`` are the fields of a ``csr_runs.Runs``:

    summed: y[b, r] = sum over the nonzeros k of row r of values[slots[k]] * x[b, column of k];
    dotted: grad[slots[k]] = sum over b of own[b, row of k] * x[b, column of k].
    x: (batch, n), own, y: (batch, rows), values, grad: (capacity,); not summed, values and y are
    not looked at, and not dotted, own and grad. ``16 * vectors`` numbers of the batch at a time.
    Both at once cost less than one after the other, since each reads x.
    together: how many dot products are summed up at once, a power of two up to 16.
    Without the interpreter's lock. Nothing is checked.
    """
    multiply = _runs_of_a_piece(vectors, summed, dotted, together)
    size = WIDTH * vectors

    @compiled(vectors, summed, dotted, together)
    def walk(  # type: ignore[no-untyped-def]
        x, own, values, starts, width, ends, begins, rows, index, slots, y, grad, first, last
    ):
        n = x.shape[1]
        pieces = -(-n // width)
        start, end = begins[first * pieces], begins[last * pieces]
        slots, index = slots[start:end], index[start:]
        # In the order of the runs: every tile reads them again.
        weights = np.empty(slots.size if summed else 0, x.dtype)
        for k in range(weights.size):
            weights[k] = values[slots[k]]
        dots = np.zeros(slots.size if dotted else 0, x.dtype)
        features, most = aligned(n, size, x.dtype), 0
        for g in range(first, last):
            most = max(most, starts[g + 1] - starts[g])
        mine = aligned(most if dotted else 0, size, x.dtype)
        sums = aligned(most if summed else 0, size, x.dtype)
        cleared = sums.reshape(-1)
        for b in range(0, x.shape[0], size):
            to_features(x, b, 0, features, n)
            for g in range(first, last):
                count = starts[g + 1] - starts[g]
                if dotted:
                    to_features(own, b, starts[g], mine, count)
                if summed:
                    for i in range(count * size):
                        cleared[i] = 0
                for c in range(pieces):
                    piece, at = features[c * width :], g * pieces + c
                    k = begins[at] - start
                    multiply(piece, mine, weights, index, rows, ends, at, k, sums, dots)
                if summed:
                    to_rows(sums, count, y, b, starts[g])
        for k in range(dots.size):
            grad[slots[k]] = dots[k]

    return walk


def _runs_of_a_piece(vectors: int, summed: bool, dotted: bool, together: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def multiply(
        typing: Any,
        x: Any,
        own: Any,
        weights: Any,
        index: Any,
        rows: Any,
        ends: Any,
        at: Any,
        first: Any,
        sums: Any,
        dots: Any,
    ) -> Any:
        """For the runs of group and piece ``at``, whose nonzeros begin with the first-th, each of a
        row r: to sums[r] are added their weights[k] * x[index[k]]; and <own[r], x[index[k]]> is
        added to each dots[k]."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loop = Loop(context, builder, signature, args)
            x_, own_, weights_, index_, rows_, ends_, sums_, dots_ = (
                loop.data(i) for i in (0, 1, 2, 3, 4, 5, 8, 9)
            )
            ends_ = builder.gep(ends_, [builder.mul(args[6], ir.Constant(INDEX, LONGEST + 1))])
            k, size = args[7], WIDTH * vectors

            def add_dots(totals: list[Any], k: Any) -> None:
                """To those of the nonzeros from k on."""
                added = loop.totals(totals)
                place = builder.bitcast(builder.gep(dots_, [k]), added.type.as_pointer())
                before = builder.load(place)
                before.align = 4
                builder.store(builder.fadd(before, added), place).align = 4

            def run_of(length: int, run: Any, carried: list[Any]) -> list[Any]:
                (k,) = carried
                row = builder.mul(loop.number(rows_, run), ir.Constant(INDEX, size))
                totals: list[Any] = []
                target = builder.gep(sums_, [row])
                kept = loop.vectors(target, vectors) if summed else []
                mine = loop.vectors(builder.gep(own_, [row]), vectors) if dotted else []
                for i in range(length):
                    here = builder.add(k, ir.Constant(INDEX, i))
                    line = loop.vectors(loop.row(x_, index_, here, size), vectors)
                    if summed:
                        weight = loop.spread(builder.load(builder.gep(weights_, [here])))
                        kept = [loop.fused(weight, a, s) for a, s in zip(line, kept, strict=True)]
                    if dotted:
                        total = builder.fmul(mine[0], line[0])
                        for a, b in zip(mine[1:], line[1:], strict=True):
                            total = loop.fused(a, b, total)
                        totals.append(total)
                    if totals and (len(totals) == together or i == length - 1):
                        first_of_them = ir.Constant(INDEX, i + 1 - len(totals))
                        add_dots(totals, builder.add(k, first_of_them))
                        totals = []
                if summed:
                    loop.store(kept, target)
                return [builder.add(k, ir.Constant(INDEX, length))]

            for length in range(1, LONGEST + 1):
                begin, end = (
                    builder.load(builder.gep(ends_, [ir.Constant(INDEX, i)]))
                    for i in (length - 1, length)
                )
                (k,) = loop.run(begin, end, [k], partial(run_of, length))
            return context.get_dummy_value()

        at_ = types.int64
        return types.void(x, own, weights, index, rows, ends, at_, at_, sums, dots), generate

    return multiply
