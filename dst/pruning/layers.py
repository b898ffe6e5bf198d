"""Which layers a pruning may take."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dst.layers import SparseConv2d, SparseLayer, SparseLinear
from dst.mam import MAMLinear, SparseMAMLinear, hidden_layers, mam_layers
from dst.pruning.score import Score
from dst.pruning.weights import Weights, weights_of
from dst.swap import matching
from growth import InputError

# Subclasses may use their weights in ways of their own.
_KINDS = (nn.Linear, nn.Conv2d, MAMLinear, SparseLinear, SparseMAMLinear, SparseConv2d)


def chosen_weights(
    model: nn.Module, layers: Sequence[str] | None, kind: type[Score]
) -> list[Weights]:
    """The weights of the layers to prune, in the order of the modules.

    layers: names and patterns; by default the MAM layers, or where there are none the hidden linear
    layers. Raises InputError for a layer that cannot be pruned, or not by this score.
    """
    able = {name: module for name, module in model.named_modules() if type(module) in _KINDS}
    if layers is None:
        layers = list(mam_layers(model)) or hidden_layers(model)
    if isinstance(layers, Sequence) and not layers and (linear := hidden_layers(model)):
        raise InputError(f"layers is empty: name some of {', '.join(linear)}, or give None")
    if not able or not layers:
        what = "convolutions, which must be named" if able else "no layer with weights"
        raise InputError(
            f"{type(model).__name__} has nothing to prune: it has {what} in layers, where MAM or "
            "linear layers are looked for"
        )
    names = matching(list(able), (layers,) if isinstance(layers, str) else layers, "layer to prune")
    found = {name: weights_of(name, layer) for name, layer in able.items() if name in names}
    for weights in found.values():
        _check(model, weights, kind)
    return list(found.values())


def _check(model: nn.Module, weights: Weights, kind: type[Score]) -> None:
    name, layer = weights.name, weights.layer
    where = f"layer {name!r}"
    if weights.is_convolution and kind.needs != "nothing":
        raise InputError(
            f"{where} is a convolution, whose weights only the scores random and magnitude take: "
            "choose one of them, or leave it out of layers"
        )
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        raise InputError(
            f"{where} has {layer.groups} groups and pads with {layer.padding_mode!r}, but a sparse "
            "convolution knows one group and zeros alone: leave it out of layers"
        )
    if isinstance(layer, SparseLayer):
        if layer.topology.grid.block != (1, 1):
            raise InputError(
                f"{where} has blocks of {layer.topology.grid.block}, but single weights are "
                "pruned, block 1: leave it out of layers"
            )
        if weights.size == 0:
            raise InputError(f"{where} has no weight alive: leave it out of layers")
    elif "weight" not in layer._parameters:
        raise InputError(
            f"{where} computes its weight from other parameters (weight_norm, spectral_norm, "
            "prune): remove that, or leave it out of layers"
        )
    own = id(layer.values if isinstance(layer, SparseLayer) else layer.weight)
    others = [
        other
        for other, module in model.named_modules()
        if module is not layer and own in map(id, module._parameters.values())
    ]
    if others:
        raise InputError(
            f"{where} shares its weight with {', '.join(others)}: leave it out of layers"
        )
    for rows in weights.tiles():
        if not bool(weights.values(rows).isfinite().all()):
            raise InputError(
                f"{where} has weights that are NaN or infinite: go back to a checkpoint from before"
            )
