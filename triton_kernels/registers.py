"""How much of a product this processor's vector registers hold."""

from __future__ import annotations

from functools import cache
from platform import machine

import llvmlite.binding as llvm

from triton_kernels.vectors import WIDTH


def product_tile(width: int, itemsize: int) -> tuple[int, int]:
    """(rows of the batch, vectors of outputs) of a tile, for blocks of ``width`` outputs."""
    room = _accumulators(itemsize)
    vectors = next(v for v in (4, 3, 2, 1) if width % (WIDTH * v) == 0 and 6 * v <= max(6, room))
    return min(8, room // vectors), vectors


def narrow(width: int, itemsize: int) -> bool:
    """Whether a tile is one vector wide though the registers hold 16: the numbers that it is
    multiplied by are then read as they are multiplied, and had better lie together."""
    return _accumulators(itemsize) >= 16 and product_tile(width, itemsize)[1] == 1


def gradient_tile(width: int, itemsize: int) -> tuple[int, int]:
    """(outputs, vectors of inputs) of a tile, for blocks of ``width`` inputs."""
    room = _accumulators(itemsize)
    _, vectors = product_tile(width, itemsize)
    return next(rows for rows in (16, 8, 4, 2, 1) if rows * vectors <= room), vectors


def kept_twice(itemsize: int) -> int:
    """Vectors that fit twice, with as much room for what is made of them: sums of a row of a
    matrix, and what its dot products are with. At most 256 bytes, a few lines of the cache."""
    return min(_accumulators(itemsize) // 3, 256 // (WIDTH * itemsize))


def dots_at_once(itemsize: int) -> int:
    """Dot products that are summed up together, with one vector each: a power of two up to 16."""
    return next(count for count in (16, 8, 4, 2) if count <= _accumulators(itemsize))


def _accumulators(itemsize: int) -> int:
    """Vectors of 16 that the registers hold, but for a quarter that is left to what is multiplied:
    32 registers of AVX-512, 16 of AVX2, 32 of NEON."""
    features = _features()
    if features.get("avx512f"):
        number, size = 32, 64
    else:
        number, size = (16, 32) if features.get("avx2") else (32, 16)
    return number * 3 // 4 * size // (WIDTH * itemsize)


def fused() -> bool:
    """Whether it multiplies and adds in one instruction, without which loops that ask for it are
    slower than anything else."""
    x86 = machine().lower() in ("x86_64", "amd64", "i386", "i686", "x86")
    return not x86 or bool(_features().get("fma"))


def expands() -> bool:
    """Whether it spreads the next numbers of a row over a vector by a mask, in one instruction, and
    numba compiles for that: it may have been told to take the processor for another one."""
    from numba.core.registry import cpu_target

    *_, features = cpu_target.target_context.codegen().magic_tuple()
    return "+avx512f" in features.split(",")


@cache
def _features() -> dict[str, bool]:
    try:
        return dict(llvm.get_host_cpu_features())
    except RuntimeError:  # LLVM does not know this processor
        return {}
