"""Optimizer state that follows a topology, without asking which optimizer it is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dst.layers import SparseLayer
from growth import InputError


def reset_slots(optimizer: Optimizer, values: nn.Parameter, slots: Tensor) -> None:
    """Forget what the optimizer knows of the blocks in these slots; touch nothing else.

    In every state tensor with one entry a slot, the slots get what a weight at zero has before its
    first gradient: zero, or the optimizer's own start (Adagrad's accumulator, Rprop's step size).
    State kept as one flat vector over all parameters (L-BFGS) is zeroed at the slots' places.
    """
    fresh = None
    for name, tensor in _own_state(optimizer, values):
        if fresh is None:
            fresh = _fresh_state(optimizer, values)
        start = fresh.get(name)
        tensor[slots] = 0 if start is None else start
    for vector, offset in _flat_state(optimizer, values):
        width = values[0].numel()
        vector[offset : offset + values.numel()].view(-1, width)[slots] = 0


def resize(layer: SparseLayer, optimizer: Optimizer | None, capacity: int) -> None:
    """Reallocate the layer's values, and their optimizer state, to ``capacity`` slots.

    The only operation that moves values. Blocks keep their slots if those fit, and otherwise move
    to the lowest slots in key order. The parameter object stays the same, and its gradient moves
    along.

    Raises InputError when fewer slots than alive blocks are asked for, an optimizer that does
    not hold the values, and state that is one flat vector.
    """
    topology, values = layer.topology, layer.values
    groups = [] if optimizer is None else optimizer.param_groups
    if optimizer is not None and not any(p is values for g in groups for p in g["params"]):
        raise InputError("the optimizer does not hold the values of this layer")
    if optimizer is not None and list(_flat_state(optimizer, values)):
        raise InputError(
            f"{type(optimizer).__name__} keeps its state in one vector over all parameters, which "
            "cannot be resized: resize before its first step, or build it anew"
        )
    old = topology.slots.long()
    topology.resize(capacity)
    new = topology.slots.long()

    def moved(tensor: Tensor, start: Any = 0) -> Tensor:
        fresh = torch.zeros(capacity, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
        fresh[:] = start
        fresh[new] = tensor[old]
        return fresh

    if optimizer is not None:
        fresh_state = _fresh_state(optimizer, values)
        for name, tensor in list(_own_state(optimizer, values)):
            start = fresh_state.get(name)
            optimizer.state[values][name] = moved(tensor, 0 if start is None else start)
    gradient = None if values.grad is None else moved(values.grad)
    values.grad = None
    fresh_values = moved(values.data)
    # A graph that is still alive (the last loss) holds the node that accumulates the gradient, and
    # with it the old shape. PyTorch makes a new one only where the dtype changes on the way.
    values.data = values.data.to(torch.float32 if values.dtype == torch.float64 else torch.float64)
    values.data = fresh_values
    values.grad = gradient


def _own_state(optimizer: Optimizer, values: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    for name, state in optimizer.state.get(values, {}).items():
        if _is_per_block(state, values):
            yield name, state


def _is_per_block(state: Any, values: Tensor) -> bool:
    """Of the values' shape, or pooled inside each block (Adafactor's row and column means)."""
    return (
        isinstance(state, Tensor)
        and state.dim() == values.dim()
        and state.shape[0] == values.shape[0]
    )


def _fresh_state(optimizer: Optimizer, values: nn.Parameter) -> dict[str, Tensor]:
    """State of one block at zero after a step with a zero gradient, from an optimizer of the same
    class and settings. Empty where such an optimizer cannot be built: all starts are then zero."""
    group = next(g for g in optimizer.param_groups if any(p is values for p in g["params"]))
    # Not of values[:1]: there may be no slot at all.
    block = nn.Parameter(
        torch.zeros(1, *values.shape[1:], dtype=values.dtype, device=values.device)
    )
    block.grad = torch.zeros_like(block)
    # Adagrad starts its accumulator from the argument, whatever the group says.
    accepted = inspect.signature(type(optimizer)).parameters
    settings = {k: v for k, v in group.items() if k in accepted and k != "params"}
    build: Any = type(optimizer)
    try:
        twin = build([{**group, "params": [block]}], **settings)
        twin.step()
    except (TypeError, ValueError, RuntimeError):
        return {}
    return {name: state for name, state in twin.state[block].items() if _is_per_block(state, block)}


def _flat_state(optimizer: Optimizer, values: nn.Parameter) -> Iterator[tuple[Tensor, int]]:
    """Vectors over all parameters of a group, and where the values begin in them."""
    for group in optimizer.param_groups:
        offset = 0
        for parameter in group["params"]:
            if parameter is values:
                break
            offset += parameter.numel()
        else:
            continue
        total = sum(parameter.numel() for parameter in group["params"])
        for state in optimizer.state.get(group["params"][0], {}).values():
            for tensor in state if isinstance(state, list) else [state]:
                if isinstance(tensor, Tensor) and tensor.dim() == 1 and tensor.numel() == total:
                    yield tensor, offset
