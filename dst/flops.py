"""Counting what a network costs: multiply-accumulates, and FLOPs of a whole training.

Two FLOPs a multiply-accumulate; normalisation, activations and the loss are left out, as in the
RigL paper's appendix H, and so are the two products inside attention that no weight takes part in:
the scores, and their sum over the values.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dst.attention import dense_projections
from dst.layers import SparseLayer
from dst.mam import mam_layers


class LayerCost(NamedTuple):
    """Multiply-accumulates of one layer's forward pass for one example."""

    sparse: int
    dense: int


def layer_costs(model: nn.Module, example: Tensor) -> dict[str, LayerCost]:
    """Of every linear layer and convolution that ``example``, one input with its batch dimension,
    passes through; the projections inside a dense ``nn.MultiheadAttention`` count as layers."""
    costs: dict[str, LayerCost] = {}
    hooks = []

    def add(name: str, vectors: int, alive: int, total: int) -> None:
        positions = vectors // example.shape[0]
        before = costs.get(name, LayerCost(0, 0))
        costs[name] = LayerCost(before.sparse + positions * alive, before.dense + positions * total)

    def counter(name: str, alive: int, total: int, n_out: int):  # type: ignore[no-untyped-def]
        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            add(name, output.numel() // n_out, alive, total)

        return count

    def attention_counter(name: str):  # type: ignore[no-untyped-def]
        def count(module: nn.MultiheadAttention, inputs: Any, named: Any, output: Any) -> None:
            given = inspect.signature(module.forward).bind(*inputs, **named).arguments
            for inner, vectors, size in _projected(module, given):
                add(f"{name}.{inner}".lstrip("."), vectors, size, size)

        return count

    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention:
            hook = attention_counter(name)
            hooks.append(module.register_forward_hook(hook, with_kwargs=True))
            continue
        if isinstance(module, SparseLayer):
            sizes = (module.alive, module.total, module.topology.grid.n_out)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            sizes = (module.weight.numel(), module.weight.numel(), module.weight.shape[0])
        else:
            continue
        hooks.append(module.register_forward_hook(counter(name, *sizes)))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(example)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return costs


def _projected(
    attention: nn.MultiheadAttention, given: Mapping[str, Tensor]
) -> Iterator[tuple[str, int, int]]:
    """What a dense attention multiplies with its weights, none of which it calls as a module: name
    of the weight, number of vectors, multiply-accumulates of each. given: query, key and value."""
    vectors = [given[name].numel() // given[name].shape[-1] for name in ("query", "key", "value")]
    weights = dense_projections(attention)
    if "in_proj" in weights:  # a third of its rows for each input
        yield "in_proj", sum(vectors), weights["in_proj"].numel() // 3
    else:
        for (name, weight), count in zip(weights.items(), vectors, strict=True):
            yield name, count, weight.numel()
    yield "out_proj", vectors[0], attention.out_proj.weight.numel()


def forward_macs(costs: Mapping[str, LayerCost], alive: Mapping[str, float]) -> int:
    """Multiply-accumulates of one example's forward pass when layers are as dense as ``alive``
    says, by name; costs: of :func:`layer_costs`, at whatever density they were counted."""
    return sum(round(cost.dense * alive[name]) for name, cost in costs.items())


class ImageCost(NamedTuple):
    """FLOPs of one image in training."""

    forward: int
    backward: int


def image_cost(
    model: nn.Module, costs: Mapping[str, LayerCost], alive: Mapping[str, float]
) -> ImageCost:
    """When layers are as dense as ``alive`` says; costs: see :func:`forward_macs`.

    A weight costs 2 FLOPs forward and 4 backward. In a MAM layer it costs 3 forward (Nikiforos
    2024), and backward only the winners cost: two for every output, in both gradients. Between, by
    vanishing contributions, both are paid.
    """
    layers = mam_layers(model)
    forward = backward = 0
    for name, cost in costs.items():
        macs, layer = round(cost.dense * alive[name]), layers.get(name)
        if layer is None or layer.beta > 0:
            forward += 2 * macs
            backward += 4 * macs
        if layer is not None and layer.beta < 1:
            forward += 3 * macs
            backward += 8 * (cost.dense // layer.in_features)
    return ImageCost(forward, backward)


def training_flops(flops: int, replaced_flops: int, search_flops: int) -> int:
    """What all images cost (Evci et al. 2020, appendix H: 3 forward passes' worth each), less a
    forward pass' worth for those of steps that an update replaced, and what the searches did.

    flops: of all images, as :func:`image_cost` counts them. replaced_flops: of the forward pass of
    those of replaced steps. With an exact search at every Delta T steps this is RigL's (3 f_S Delta
    T + 2 f_S + f_D) / (Delta T + 1); with a dense gradient at every step, of which the alive
    weights' own is a part, SNFS' 2 f_S + f_D.
    """
    return flops - replaced_flops + search_flops


def dense_training_flops(macs: int) -> int:
    """Of the dense network. macs: multiply-accumulates of its forward pass, over all images."""
    return 6 * macs
