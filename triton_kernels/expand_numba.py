"""Scattering single weights into a dense one and gathering them back, sixteen columns at a time:
the processor spreads the next few numbers over those that a bit says are alive (AVX-512).

Half as much is read as by the columns' numbers, which ``scatter_numba`` follows, and both take
hardly more time than the memory does. Numbers are spread and put together in registers, with masks
for what is loaded and stored: processors of AMD take five times as long to do both in one.

values: (capacity,); bits: uint16 (rows, columns / 16 rounded up), the i-th bit of a word for the
i-th column; offsets: of some rows, from any number on; slots: of their weights, not looked at where
``ordered``: slot k then holds the k-th of all weights, and ``offsets`` count all of them; dense,
shape, steps: as ``scatter_cpu.Dense`` says, of one tap, whose columns lie side by side; first,
last: rows. 4 bytes a number. Without the interpreter's lock. Nothing is checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from triton_kernels.compiled_numba import compiled
from triton_kernels.vectors import INDEX, WIDTH, Loop


def _expand(typing: Any, source: Any, at: Any, bits: Any, target: Any, to: Any) -> Any:
    """The numbers of the source from the at-th on -> the 16 of the target from the to-th on: the
    next one where a bit is set, zero elsewhere. Returns how many were taken."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        loop = Loop(context, builder, signature, args)
        start, count = builder.gep(loop.data(0), [args[1]]), builder.ctpop(args[2])
        kind = ir.VectorType(start.type.pointee, WIDTH)
        start, zeros = builder.bitcast(start, kind.as_pointer()), ir.Constant(kind, None)
        values = [start, _FOUR, _first(builder, count), zeros]
        numbers = loop.call(f"llvm.masked.load.v{WIDTH}i32.p0", kind, values)
        values = [numbers, zeros, _mask(builder, args[2])]
        numbers = loop.call(f"llvm.x86.avx512.mask.expand.v{WIDTH}i32", kind, values)
        loop.store([numbers], builder.gep(loop.data(3), [args[4]]))
        return builder.zext(count, INDEX)

    return types.int64(source, types.int64, types.uint16, target, types.int64), generate


def _compress(typing: Any, source: Any, at: Any, bits: Any, target: Any, to: Any) -> Any:
    """The other way: those of 16 numbers of the source where a bit is set."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        loop = Loop(context, builder, signature, args)
        (numbers,) = loop.vectors(builder.gep(loop.data(0), [args[1]]), 1)
        kind, count = numbers.type, builder.ctpop(args[2])
        place = builder.bitcast(builder.gep(loop.data(3), [args[4]]), kind.as_pointer())
        values = [numbers, ir.Constant(kind, None), _mask(builder, args[2])]
        numbers = loop.call(f"llvm.x86.avx512.mask.compress.v{WIDTH}i32", kind, values)
        values = [numbers, place, _FOUR, _first(builder, count)]
        loop.call(f"llvm.masked.store.v{WIDTH}i32.p0", ir.VoidType(), values)
        return builder.zext(count, INDEX)

    return types.int64(source, types.int64, types.uint16, target, types.int64), generate


# Alignment of what is loaded and stored, in bytes.
_FOUR = ir.Constant(ir.IntType(32), 4)


def _mask(builder: Any, bits: Any) -> Any:
    return builder.bitcast(bits, ir.VectorType(ir.IntType(1), WIDTH))


def _first(builder: Any, count: Any) -> Any:
    """The mask of so many of the first numbers."""
    wide, one = ir.IntType(2 * WIDTH), ir.Constant(ir.IntType(2 * WIDTH), 1)
    ones = builder.sub(builder.shl(one, builder.zext(count, wide)), one)
    return _mask(builder, builder.trunc(ones, ir.IntType(WIDTH)))


_expand_next: Any = intrinsic(_expand)
_compress_next: Any = intrinsic(_compress)


# Rows that are moved together where what they have in one word lies side by side.
_AT_ONCE = 16


@compiled()
def expand(values, bits, offsets, slots, ordered, dense, shape, steps, first, last):  # type: ignore[no-untyped-def]
    """All else of these rows becomes zero."""
    columns, step, following = shape[2], steps[0], steps[2]
    high = 1 if step >= columns else _AT_ONCE
    rows, k = np.empty(high * columns, values.dtype), np.empty(high, np.int64)
    source = values if ordered else rows
    for r in range(first, last, high):
        count = min(high, last - r)
        for i in range(count):
            begin, end = offsets[r + i] - offsets[0], offsets[r + i + 1] - offsets[0]
            k[i] = offsets[r + i] if ordered else i * columns
            if not ordered:
                for j in range(end - begin):
                    rows[k[i] + j] = values[np.uint64(slots[begin + j])]
        for word in range(columns // WIDTH):
            for i in range(count):
                to = (r + i) * step + word * following
                k[i] += _expand_next(source, k[i], bits[r + i, word], dense, to)
        for c in range(columns // WIDTH * WIDTH, columns):
            for i in range(count):
                alive = bits[r + i, c // WIDTH] >> (c % WIDTH) & 1
                dense[(r + i) * step + c // WIDTH * following + c % WIDTH] = (
                    source[k[i]] if alive else 0
                )
                k[i] += alive


@compiled()
def compress(values, bits, offsets, slots, ordered, dense, shape, steps, first, last):  # type: ignore[no-untyped-def]
    """The other way, at the alive entries alone."""
    columns, step, following = shape[2], steps[0], steps[2]
    high = 1 if step >= columns else _AT_ONCE
    rows, k = np.empty(high * columns, values.dtype), np.empty(high, np.int64)
    target = values if ordered else rows
    for r in range(first, last, high):
        count = min(high, last - r)
        for i in range(count):
            k[i] = offsets[r + i] if ordered else i * columns
        for word in range(columns // WIDTH):
            for i in range(count):
                at = (r + i) * step + word * following
                k[i] += _compress_next(dense, at, bits[r + i, word], target, k[i])
        for c in range(columns // WIDTH * WIDTH, columns):
            for i in range(count):
                if bits[r + i, c // WIDTH] >> (c % WIDTH) & 1:
                    at = (r + i) * step + c // WIDTH * following + c % WIDTH
                    target[k[i]] = dense[at]
                    k[i] += 1
        if not ordered:
            for i in range(count):
                begin, end = offsets[r + i] - offsets[0], offsets[r + i + 1] - offsets[0]
                for j in range(end - begin):
                    values[np.uint64(slots[begin + j])] = rows[i * columns + j]


@compiled()
def mark(offsets, cols, bits, first, last):  # type: ignore[no-untyped-def]
    """Sets the bits, all zero before, of rows [first, last); offsets: of all rows."""
    for r in range(first, last):
        for k in range(offsets[r], offsets[r + 1]):
            col = np.uint64(cols[k])
            bits[r, col // np.uint64(WIDTH)] |= np.uint16(1) << np.uint16(col % np.uint64(WIDTH))
