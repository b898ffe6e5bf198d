"""In words, how the products of sparse layers are computed."""

from __future__ import annotations

from collections.abc import Iterator

from dst.layers import SparseLayer
from triton_kernels import costs


def how_computed(layers: dict[str, SparseLayer]) -> Iterator[str]:
    """A line a layer: ``sparse`` or ``dense``, its density, and the highest at which ``auto`` takes
    the sparse product for such an input."""
    for name, layer in layers.items():
        choice = layer.chosen
        if choice is None:
            yield f"{name}: {layer.compute} products, as asked for"
            continue
        cost = layer.cost(choice.rows, choice.padded)
        yield (
            f"{name}: {choice.way} products at density {layer.density:.3g} "
            f"(break-even {costs.break_even(cost):.3g} for {choice.rows} rows)"
        )
