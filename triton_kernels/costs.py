"""The one cost model: which way to compute a product is the cheapest."""

from __future__ import annotations

# Density below which a full training step of a sparse linear layer (forward and both gradients)
# is faster through the sparse path than through a scattered dense weight; measured by
# benchmarks/linear_paths.py.
CPU_BREAK_EVEN = 0.1
# Without kernels of our own a GPU's dense product wins at every density that trains well.
CUDA_BREAK_EVEN = 0.005
# A dense weight above this is never scattered: the memory is the point of being sparse.
LARGEST_SCATTER_BYTES = 1 << 30

COMPUTE = ("auto", "dense", "sparse")


def choose_linear(density: float, dense_bytes: int, device_type: str) -> str:
    """ "sparse" or "dense" for a linear layer of this density.

    dense_bytes: size that the weight would have if it were dense.
    """
    if dense_bytes > LARGEST_SCATTER_BYTES:
        return "sparse"
    break_even = CPU_BREAK_EVEN if device_type == "cpu" else CUDA_BREAK_EVEN
    return "sparse" if density < break_even else "dense"
