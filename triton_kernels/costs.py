"""The one cost model: which way to compute a product is the cheapest."""

from __future__ import annotations

# Highest density at which a full training step of a sparse linear layer (forward, both gradients)
# is faster through the sparse path than through a scattered dense weight, by the smaller side of a
# block: CSR for single weights, gathered blocks otherwise. From benchmarks/linear_paths.py.
CPU_BREAK_EVEN = {1: 0.1, 2: 0.07, 32: 0.15}
# Without kernels of our own a GPU's dense product wins at every density that trains well.
CUDA_BREAK_EVEN = 0.005
# A dense weight above this is never scattered: the memory is the point of being sparse.
LARGEST_SCATTER_BYTES = 1 << 30

COMPUTE = ("auto", "dense", "sparse")


def choose_linear(
    density: float, block: tuple[int, int], dense_bytes: int, device_type: str
) -> str:
    """``sparse`` or ``dense`` for a linear layer of this density and block.

    dense_bytes: size that the weight would have if it were dense.
    """
    if dense_bytes > LARGEST_SCATTER_BYTES:
        return "sparse"
    if device_type == "cpu":
        side = max(size for size in CPU_BREAK_EVEN if size <= min(block))
        break_even = CPU_BREAK_EVEN[side]
    else:
        break_even = CUDA_BREAK_EVEN
    return "sparse" if density <= break_even else "dense"
