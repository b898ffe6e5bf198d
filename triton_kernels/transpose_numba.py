"""Between rows of a batch and features first, as numba compiles it: in squares of 16 by 16 numbers
that are turned in vector registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from triton_kernels.vectors import INDEX, WIDTH, Loop


def _turn(
    typing: Any, source: Any, first: Any, row: Any, target: Any, first_: Any, row_: Any
) -> Any:
    """Copies the square of 16 by 16 numbers that begins with the first-th of the source, with
    ``row`` of them from one line to the next, transposed to the target, where first_ and row_ say
    the same."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        loop = Loop(context, builder, signature, args)

        def lines(array: int) -> list[Any]:
            start, step = builder.gep(loop.data(array), [args[array + 1]]), args[array + 2]
            steps = [builder.mul(step, ir.Constant(INDEX, i)) for i in range(WIDTH)]
            return [builder.gep(start, [step]) for step in steps]

        square = [loop.vectors(line, 1)[0] for line in lines(0)]
        # Interleaving the two halves as often as 16 can be halved transposes a square.
        for _ in range(WIDTH.bit_length() - 1):
            pairs = zip(square[: WIDTH // 2], square[WIDTH // 2 :], strict=True)
            square = [half for a, b in pairs for half in loop.interleaved(a, b)]
        for vector, line in zip(square, lines(3), strict=True):
            loop.store([vector], line)
        return context.get_dummy_value()

    at = types.int64
    return types.void(source, at, at, target, at, at), generate


# Called from what is compiled alone, with all arguments but the first.
turn: Any = intrinsic(_turn)


@njit(nogil=True)
def to_features(x, row, col, tile, count):  # type: ignore[no-untyped-def]
    """x: (batch, n), the features [col, col + count) of the batch from row on -> tile[:count]:
    (features, rows of the batch, a multiple of 16), zero where the batch has ended. Without the
    interpreter's lock. Nothing is checked."""
    n, width = x.shape[1], tile.shape[1]
    for b in range(0, width, WIDTH):
        end, i = min(x.shape[0] - row - b, WIDTH), 0
        if end == WIDTH:
            while i + WIDTH <= count:
                turn(x, (row + b) * n + col + i, n, tile, i * width + b, width)
                i += WIDTH
        while i < count:
            for j in range(WIDTH):
                tile[i, b + j] = x[row + b + j, col + i] if j < end else 0
            i += 1


@njit(nogil=True)
def to_rows(tile, count, y, row, col):  # type: ignore[no-untyped-def]
    """The way back, into y: (batch, n), without what is behind the end of the batch."""
    n, width = y.shape[1], tile.shape[1]
    for b in range(0, width, WIDTH):
        end, i = min(y.shape[0] - row - b, WIDTH), 0
        if end == WIDTH:
            while i + WIDTH <= count:
                turn(tile, i * width + b, width, y, (row + b) * n + col + i, n)
                i += WIDTH
        while i < count:
            for j in range(end):
                y[row + b + j, col + i] = tile[i, b + j]
            i += 1


@njit(nogil=True)
def aligned(count, width, dtype):  # type: ignore[no-untyped-def]
    """An empty array (count, width) that begins with a line of the cache: numba's begin anywhere,
    and vectors that lie on two lines take twice as long to read."""
    line = 64
    memory = np.empty(count * width + line, dtype)
    skip = -memory.ctypes.data % line // memory.itemsize
    return memory[skip : skip + count * width].reshape(count, width)
