"""In words, how the products of sparse layers are computed."""

from __future__ import annotations

from collections.abc import Iterator

from dst.layers import SparseLayer
from triton_kernels import constants, costs


def how_computed(layers: dict[str, SparseLayer]) -> Iterator[str]:
    """By whose figures ``auto`` chose; then a line a layer: ``sparse`` or ``dense``, its density,
    and the highest at which ``auto`` takes the sparse product for such an input."""
    automatic = [layer for layer in layers.values() if layer.chosen is not None]
    for device in sorted({layer.values.device.type for layer in automatic}):
        yield f"auto goes by {_origin(device)}"
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


def _origin(device: str) -> str:
    measuring = "python -m triton_kernels.calibrate"
    if device == "cpu":
        if constants.on_cpu().own:
            return "times that were measured on this machine"
        return f"the times of another machine: {measuring} measures this one"
    if constants.on_gpu().own:
        return "break-even densities that were measured on this GPU"
    return f"estimates, since this GPU was not measured: {measuring} --device {device} does"
