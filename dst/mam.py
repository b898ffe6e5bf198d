"""Multiply-and-max/min: layers whose outputs sum only the largest and the smallest product.

z_i = max_j w_ij x_j + min_j w_ij x_j + b_i, and on the way there, by vanishing contributions,
z_i = beta sum_j w_ij x_j + (1 - beta) (max_j w_ij x_j + min_j w_ij x_j) + b_i.

L. Nikiforos, "The Multiply-And-Max/min Neural Paradigm as a Pruning and Training Accelerator",
Politecnico di Torino 2024, chapter 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dst.layers import SparseLinear
from dst.swap import carry_over, matching, swap
from growth import InputError
from triton_kernels.mam import ABSENT, mam, sparse_mam


class _Vanishing(nn.Module):
    """What MAM layers share: ``beta``, the share of the ordinary product that is left.

    1: exactly an ordinary layer. 0: exactly maximum plus minimum. It is kept in the state dict.
    """

    mix: Tensor
    # Which of the two products take part. Not read off the number itself, so that a GPU is not
    # waited for, and a compiled forward is compiled at most three times.
    _parts: str
    _beta: float

    def _start(self, beta: float, device: Any) -> None:
        self.register_buffer("mix", torch.ones((), dtype=torch.float64, device=device))
        self.beta = beta

    @property
    def beta(self) -> float:
        return self._beta

    @beta.setter
    def beta(self, beta: float) -> None:
        if not 0 <= beta <= 1:
            raise InputError(f"beta {beta} must lie in [0, 1]: 1 is an ordinary layer, 0 pure MAM")
        self._beta = float(beta)
        self.mix.fill_(beta)
        self._parts = {0.0: "mam", 1.0: "mac"}.get(beta, "both")

    def _apply(self, *args: Any, **options: Any) -> Any:
        """Other dtypes are for weights: the share stays exact."""
        super()._apply(*args, **options)
        self.mix = torch.full((), self._beta, dtype=torch.float64, device=self.mix.device)
        return self

    def _mixed(self, mac: Tensor, own: Tensor) -> Tensor:
        return self.mix * mac + (1 - self.mix) * own

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.mix.is_meta:
            self.beta = float(self.mix)


class MAMLinear(_Vanishing, nn.Linear):
    """``nn.Linear`` with maximum plus minimum in place of the sum. x: (..., in_features) -> (...,
    out_features).

    Among equal products the lowest input wins; a NaN product makes the output NaN. The gradient
    goes to the two winners alone, scaled by 1 - beta, plus the ordinary one scaled by beta.

    packed, deterministic: attributes for a GPU, see :func:`triton_kernels.mam.mam`; exact products
    and gradients summed in one order by default.
    """

    packed = False
    deterministic = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        beta: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if in_features < 1:
            raise InputError(f"in_features {in_features}: nothing has no maximum, give at least 1")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._start(beta, self.weight.device)

    def forward(self, input: Tensor) -> Tensor:
        if self._parts == "mac":
            return F.linear(input, self.weight, self.bias)
        own = mam(input, self.weight, packed=self.packed, deterministic=self.deterministic)
        own = _with_bias(own, self.bias)
        if self._parts == "mam":
            return own
        return self._mixed(F.linear(input, self.weight, self.bias), own)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, beta={self.beta:g}"


class SparseMAMLinear(_Vanishing, SparseLinear):
    """:class:`SparseLinear` with maximum plus minimum in place of the sum.

    absent: what a weight that is not alive does. ``zero``: its product, 0, competes like any other,
    so that the layer is the dense one with zeros in its weight; ``none``: only alive weights
    compete, and an output without any is its bias. Blocks of single weights only; other arguments
    as in :class:`SparseLinear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        beta: float = 0.0,
        absent: str = "zero",
        density: float = 0.1,
        keys: Tensor | None = None,
        compute: str = "auto",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_absent(absent)
        super().__init__(
            in_features,
            out_features,
            bias,
            density=density,
            keys=keys,
            compute=compute,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        self.absent = absent
        self._start(beta, self.values.device)

    def forward(self, input: Tensor) -> Tensor:
        if self._parts == "mac":
            return super().forward(input)
        own = sparse_mam(input, self.values, self.topology.layout, absent=self.absent)
        own = _with_bias(own, self.bias)
        return own if self._parts == "mam" else self._mixed(super().forward(input), own)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, beta={self.beta:g}, absent={self.absent}"


def _check_absent(absent: str) -> None:
    if absent not in ABSENT:
        raise InputError(f"absent {absent!r} is unknown: choose {', '.join(ABSENT)}")


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype)


MAMLayer = MAMLinear | SparseMAMLinear


def mam_layers(model: nn.Module) -> dict[str, MAMLayer]:
    """The MAM layers of a model by name, in the order of its modules."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MAMLayer)}


def set_beta(model: nn.Module, beta: float) -> None:
    """Of every MAM layer of a model."""
    for layer in mam_layers(model).values():
        layer.beta = beta


def to_mam(
    model: nn.Module,
    *,
    layers: Sequence[str] | None = None,
    beta: float = 0.0,
    absent: str = "zero",
) -> nn.Module:
    """Put max and min into linear layers of ``model``, in place, dense or sparse; weights, biases
    and topologies stay the same objects, so that an optimizer goes on with them. Layers that are
    MAM already stay as they are.

    layers: names, patterns such as ``classifier.*``, and the words ``first`` and ``last``; by
    default the layers of ``hidden_layers``. beta: what they start with. absent: of sparse layers,
    see :class:`SparseMAMLinear`. Returns the model (a new module only where the model itself is
    such a layer).

    Raises InputError for a pattern that matches no linear layer, for sparse layers whose blocks are
    not single weights, and for a weight that is computed from other parameters.
    """
    _check_absent(absent)
    able = _linear_layers(model)
    if not able:
        raise InputError(f"{type(model).__name__} has no linear layer that max and min could enter")
    chosen = hidden_layers(model) if layers is None else layers
    names = matching(list(able), (chosen,) if isinstance(chosen, str) else chosen, "MAM layer")
    plain = {n: layer for n, layer in able.items() if not isinstance(layer, MAMLayer)}
    return swap(model, {plain[n]: mam_twin(n, plain[n], beta, absent) for n in plain if n in names})


def to_mac(model: nn.Module) -> nn.Module:
    """Put the sum back into every MAM layer of ``model``, in place: the way back of :func:`to_mam`,
    which then starts anew with ``beta``, ``absent``, ``packed`` and ``deterministic``."""
    return swap(model, {layer: _mac_twin(layer) for layer in mam_layers(model).values()})


def hidden_layers(model: nn.Module) -> list[str]:
    """The linear layers that MAM is made for, whether they are MAM already or not: those of the
    perceptrons (``mlp``) of a transformer, else all but the last, which is the classifier; that one
    where there is no other."""
    names = list(_linear_layers(model))
    inner = [name for name in names if "mlp" in name.split(".")]
    return inner or names[:-1] or names


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear | SparseLinear]:
    """Subclasses use their weights in ways of their own; heads of attention are no neurons."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, MAMLinear, SparseMAMLinear)
        or (type(module) is SparseLinear and module.row_groups == 1)
    }


def mam_twin(name: str, layer: nn.Linear | SparseLinear, beta: float, absent: str) -> nn.Module:
    sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
    if not isinstance(layer, SparseLinear) and "weight" not in layer._parameters:
        raise InputError(
            f"layer {name!r} computes its weight from other parameters (weight_norm, "
            "spectral_norm, prune): remove that, or leave it out of layers"
        )
    twin: MAMLayer
    if isinstance(layer, SparseLinear):
        if layer.topology.grid.block != (1, 1):
            raise InputError(
                f"layer {name!r} has blocks of {layer.topology.grid.block}: max and min are for "
                "single weights, block 1"
            )
        twin = SparseMAMLinear(*sizes, bias, beta=beta, absent=absent, **_same(layer))
    else:
        twin = MAMLinear(*sizes, bias, beta=beta, **_same(layer))
        twin.mix = torch.full_like(twin.mix, beta, device=layer.weight.device)
    return _taking(twin, layer)


def _mac_twin(layer: MAMLayer) -> nn.Module:
    sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
    kind = SparseLinear if isinstance(layer, SparseMAMLinear) else nn.Linear
    return _taking(kind(*sizes, bias, **_same(layer)), layer)


def _same(layer: nn.Linear | SparseLinear) -> dict[str, Any]:
    """What a twin is built with; its weights are replaced, and must not move a random state."""
    if isinstance(layer, SparseLinear):
        own = layer.values
        alive = {"keys": layer.topology.keys(), "compute": layer.compute}
        kind = {"device": own.device, "dtype": own.dtype, "generator": torch.Generator()}
        return alive | kind
    return {"device": "meta", "dtype": layer.weight.dtype}


def _taking(twin: Any, layer: Any) -> nn.Module:
    """``twin`` with the parameters and the topology of ``layer`` themselves."""
    if isinstance(layer, SparseLinear):
        twin.values, twin.topology, twin.chosen = layer.values, layer.topology, layer.chosen
    else:
        twin.weight = layer.weight
    twin.bias = layer.bias
    carry_over(layer, twin)
    return cast(nn.Module, twin)
