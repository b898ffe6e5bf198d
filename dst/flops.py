"""Counting what a network costs: multiply-accumulates, and FLOPs of a whole training.

Two FLOPs a multiply-accumulate; normalisation, activations and the loss are left out, as in the
RigL paper's appendix H.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dst.layers import SparseLayer


class LayerCost(NamedTuple):
    """Multiply-accumulates of one layer's forward pass for one example."""

    sparse: int
    dense: int


def layer_costs(model: nn.Module, example: Tensor) -> dict[str, LayerCost]:
    """Of every linear layer and convolution that ``example``, one input with its batch dimension,
    passes through."""
    costs: dict[str, LayerCost] = {}
    hooks = []

    def counter(name: str, alive: int, total: int, n_out: int):  # type: ignore[no-untyped-def]
        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            positions = output.numel() // n_out // example.shape[0]
            before = costs.get(name, LayerCost(0, 0))
            costs[name] = LayerCost(
                before.sparse + positions * alive, before.dense + positions * total
            )

        return count

    for name, module in model.named_modules():
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


class TrainingCost(NamedTuple):
    """FLOPs of a training run, and of the same run of the dense network."""

    flops: int
    dense_flops: int


def training_cost(
    costs: dict[str, LayerCost], images: int, skipped_images: int, search_flops: int
) -> TrainingCost:
    """3 forward passes' worth an image (Evci et al. 2020, appendix H), 2 for images of steps that
    an update replaced, and what the searches did. With an exact search at every Delta T steps this
    is RigL's (3 f_S Delta T + 2 f_S + f_D) / (Delta T + 1)."""
    sparse = 2 * sum(cost.sparse for cost in costs.values())
    dense = 2 * sum(cost.dense for cost in costs.values())
    return TrainingCost(sparse * (3 * images - skipped_images) + search_flops, 3 * dense * images)
