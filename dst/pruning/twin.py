"""The sparse layer that a pruning leaves behind."""

from __future__ import annotations

import copy
from typing import cast

from torch import Tensor, nn

from dst.convert import sparse_twin
from dst.layers import SparseLayer, SparseLinear
from dst.mam import MAMLinear, mam_twin
from dst.pruning.weights import Weights
from dst.topology import Topology


def pruned(
    weights: Weights, keys: Tensor, absent: str = "zero", compute: str = "auto"
) -> SparseLayer:
    """A layer with these weights alone, and the bias, beta and hooks of the old one, which stays
    what it was. keys: sorted int64, of weights that there are. absent: of a layer that becomes a
    :class:`SparseMAMLinear`. compute: of one that becomes sparse."""
    layer = weights.layer
    if isinstance(layer, SparseLayer):
        return _fewer(layer, keys)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    twin = sparse_twin(layer, keys, (1, 1), 1, compute, "keep")
    if not isinstance(layer, MAMLinear):
        return twin
    return cast(SparseLayer, mam_twin(weights.name, cast(SparseLinear, twin), layer.beta, absent))


def _fewer(layer: SparseLayer, keys: Tensor) -> SparseLayer:
    topology = layer.topology
    slots = topology.slots[topology.find(keys)].long()
    values = nn.Parameter(layer.values.detach()[slots], layer.values.requires_grad)
    # A copy with these in their places, and hooks that are still the user's to remove.
    memo = {id(layer.topology): Topology(topology.grid, keys), id(layer.values): values}
    kept = [layer.bias, *(own for name, own in vars(layer).items() if "_hooks" in name)]
    memo |= {id(own): own for own in kept}
    twin = copy.deepcopy(layer, memo)
    twin.chosen = None
    return twin
