"""Which weights are the arg-max and the arg-min of a layer's outputs."""

from __future__ import annotations

from torch import Tensor

from dst.mam import SparseMAMLinear
from dst.pruning.weights import DenseWeights, SparseWeights, Weights
from triton_kernels.mam import sparse_winners, winners


def winners_of(weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """x: (rows, n_in) in the dtype of the layer's products -> (arg_max, arg_min), int32
    (rows, n_out): columns of a dense layer; of a sparse one, places among its alive weights, -1
    where an absent weight won.

    Of an ordinary layer, what max and min over its products would select.
    """
    layer = weights.layer
    if isinstance(weights, SparseWeights):
        absent = layer.absent if isinstance(layer, SparseMAMLinear) else "zero"
        found = sparse_winners(x, weights.weight.to(x.dtype), weights.layout, absent=absent)
    else:
        assert isinstance(weights, DenseWeights)
        found = winners(x, weights.weight.to(x.dtype))
    return found.arg_max, found.arg_min
