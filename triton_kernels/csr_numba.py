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

# Numbers in a vector: one register of AVX-512, two of AVX2, four of NEON.
_WIDTH = 16
_INDEX = ir.IntType(64)
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


class _Loop:
    """Runs over nonzeros [first, last) while values are carried from one to the next."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        self.context, self.builder = context, builder
        self.signature, self.args = signature, args

    def data(self, at: int) -> Any:
        """Address of the first element of an array argument."""
        kind = self.signature.args[at]
        return self.context.make_array(kind)(self.context, self.builder, self.args[at]).data

    def run(
        self, first: Any, last: Any, carried: list[Any], body: Callable[..., Any], step: int = 1
    ) -> list[Any]:
        """body(k, values) -> values, every ``step``-th k. Returns the last ones."""
        builder = self.builder
        entry = builder.block
        loop, done = builder.append_basic_block(), builder.append_basic_block()
        builder.cbranch(builder.icmp_signed("<", first, last), loop, done)
        builder.position_at_end(loop)
        k = builder.phi(_INDEX)
        k.add_incoming(first, entry)
        values = [builder.phi(value.type) for value in carried]
        for phi, value in zip(values, carried, strict=True):
            phi.add_incoming(value, entry)
        new = body(k, values)
        following = builder.add(k, ir.Constant(_INDEX, step))
        k.add_incoming(following, loop)
        for phi, value in zip(values, new, strict=True):
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, last), loop, done)
        builder.position_at_end(done)
        results = [builder.phi(value.type) for value in carried]
        for phi, before, after in zip(results, carried, new, strict=True):
            phi.add_incoming(before, entry)
            phi.add_incoming(after, loop)
        return results

    def row(self, x: Any, index: Any, k: Any, length: int) -> Any:
        """Address of the row of x that nonzero k refers to."""
        builder = self.builder
        at = builder.load(builder.gep(index, [k]))
        if at.type != _INDEX:
            at = builder.sext(at, _INDEX)
        return builder.gep(x, [builder.mul(at, ir.Constant(_INDEX, length))])

    def vectors(self, address: Any, count: int) -> list[Any]:
        kind = ir.VectorType(address.type.pointee, _WIDTH)
        loaded = []
        for at in self.places(address, count):
            value = self.builder.load(self.builder.bitcast(at, kind.as_pointer()))
            value.align = 4
            loaded.append(value)
        return loaded

    def store(self, values: list[Any], address: Any) -> None:
        for value, at in zip(values, self.places(address, len(values)), strict=True):
            target = self.builder.bitcast(at, value.type.as_pointer())
            self.builder.store(value, target).align = 4

    def places(self, address: Any, count: int) -> list[Any]:
        return [self.builder.gep(address, [ir.Constant(_INDEX, _WIDTH * i)]) for i in range(count)]

    def fused(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c."""
        letter = "f32" if isinstance(a.type.element, ir.FloatType) else "f64"
        name, module = f"llvm.fma.v{_WIDTH}{letter}", self.builder.module
        declared = module.globals.get(name)
        if declared is None:
            declared = ir.Function(module, ir.FunctionType(a.type, [a.type] * 3), name=name)
        return self.builder.call(declared, [a, b, c])

    def totals(self, values: list[Any]) -> Any:
        """The sums of the numbers of each of some vectors, two to the power of something, as one
        vector of so many."""
        wanted = len(values)
        while len(values) > 1:
            values = [self._paired(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
        (sums,) = values
        while sums.type.count > wanted:
            sums = self._paired(sums, sums, sums.type.count // 2)
        return sums

    def _paired(self, a: Any, b: Any, count: int = _WIDTH) -> Any:
        """Sums of neighbours, first those of a, then those of b; the first ``count`` of them."""
        lanes = ir.VectorType(ir.IntType(32), count)
        even, odd = (
            self.builder.shuffle_vector(a, b, ir.Constant(lanes, [2 * i + j for i in range(count)]))
            for j in (0, 1)
        )
        return self.builder.fadd(even, odd)

    def spread(self, number: Any) -> Any:
        """A vector of one number."""
        kind = ir.VectorType(number.type, _WIDTH)
        nothing = ir.Constant(kind, ir.Undefined)
        lanes = ir.VectorType(ir.IntType(32), _WIDTH)
        one = self.builder.insert_element(nothing, number, ir.Constant(ir.IntType(32), 0))
        return self.builder.shuffle_vector(one, nothing, ir.Constant(lanes, [0] * _WIDTH))


def _zero(address: Any) -> Any:
    return ir.Constant(ir.VectorType(address.type.pointee, _WIDTH), [0.0] * _WIDTH)


def _row_sum(vectors: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def row_sum(
        typing: Any, x: Any, weights: Any, index: Any, first: Any, last: Any, y: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loop = _Loop(context, builder, signature, args)
            x_, weights_, index_, y_ = (loop.data(i) for i in (0, 1, 2, 5))

            def add(k: Any, sums: list[Any]) -> list[Any]:
                weight = loop.spread(builder.load(builder.gep(weights_, [k])))
                row = loop.vectors(loop.row(x_, index_, k, _WIDTH * vectors), vectors)
                return [loop.fused(weight, x, s) for x, s in zip(row, sums, strict=True)]

            loop.store(loop.run(args[3], args[4], [_zero(x_)] * vectors, add), y_)
            return context.get_dummy_value()

        return types.void(x, weights, index, first, last, y), generate

    return row_sum


def _row_dots(vectors: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def row_dots(typing: Any, x: Any, dy: Any, index: Any, first: Any, last: Any, grad: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loop = _Loop(context, builder, signature, args)
            x_, dy_, index_, grad_ = (loop.data(i) for i in (0, 1, 2, 5))
            own = loop.vectors(dy_, vectors)

            def dots(k: Any, count: int) -> list[Any]:
                sums = []
                for i in range(count):
                    at = builder.add(k, ir.Constant(_INDEX, i))
                    row = loop.vectors(loop.row(x_, index_, at, _WIDTH * vectors), vectors)
                    total = _zero(x_)
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
            most = builder.and_(builder.sub(last, first), ir.Constant(_INDEX, -_AT_ONCE))
            middle = builder.add(first, most)
            loop.run(first, middle, [], lambda k, _: dots(k, _AT_ONCE), _AT_ONCE)
            loop.run(middle, last, [], lambda k, _: dots(k, 1))
            return context.get_dummy_value()

        return types.void(x, dy, index, first, last, grad), generate

    return row_dots
