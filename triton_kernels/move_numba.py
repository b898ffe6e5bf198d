"""A vector of numbers from one place to another, for kernels that numba compiles: left to itself,
the compiler first asks whether the two overlap.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from triton_kernels.vectors import Loop


def _moved(typing: Any, source: Any, start: Any, target: Any, to: Any) -> Any:
    """``WIDTH`` numbers of the source from the start-th on -> the target from the to-th on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        loop = Loop(context, builder, signature, args)
        vector = loop.vectors(builder.gep(loop.data(0), [args[1]]), 1)
        loop.store(vector, builder.gep(loop.data(2), [args[3]]))
        return context.get_dummy_value()

    return types.void(source, start, target, to), generate


move: Any = intrinsic(_moved)
