"""Scattered weights between forward and backward, on the CPU.

A weight is scattered once a training step: its backward finds it where forward left it, as long as
those that wait for theirs take no more than ``WAITING_BYTES`` together; the oldest go first. What
is scattered is never older than the last forward.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from triton_kernels.waves import version

# Larger pieces of memory come from the system anew each time (32 MB with glibc), a page at a time.
PIECE_BYTES = 28 << 20
WAITING_BYTES = 64 << 20

Index = tuple[Tensor, Tensor, Tensor]


class _Kept(NamedTuple):
    """A scattered weight, and what it was scattered from: the values as they were."""

    weight: Tensor
    places: Index
    versions: list[int]


class _Waiting(threading.local):
    """Weights whose backward is to come, in the order in which they were scattered. Autograd runs
    it on the thread of its caller. None stays longer than its values.

    room: what the last one lay in, up to ``PIECE_BYTES`` more, since the system takes a millisecond
    to give as much again.
    """

    def __init__(self) -> None:
        self.weights: Any = WeakTensorKeyDictionary()
        self.room: Tensor | None = None


_waiting = _Waiting()


def room(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Memory for a weight of these values, which holds anything."""
    room, _waiting.room = _waiting.room, None
    if room is not None and room.shape == shape and room.dtype == values.dtype:
        return room
    # It may be written to again outside of the inference mode that somebody is in.
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=values.dtype, device=values.device)


def leave(memory: Tensor) -> None:
    """For the next weight."""
    _waiting.room = memory if memory.nbytes <= PIECE_BYTES else None


def keep(weight: Tensor, values: Tensor, index: Index) -> None:
    """Leave a weight, which nobody else may write to, for ``take``."""
    weights = _waiting.weights
    weights.pop(values, None)
    held = sum(kept.weight.nbytes for kept in weights.values()) + weight.nbytes
    for older in list(weights):
        if held <= WAITING_BYTES:
            break
        held -= weights.pop(older).weight.nbytes
    if held <= WAITING_BYTES:
        weights[values] = _Kept(weight, index, _versions(values, index))


def take(values: Tensor, index: Index, shape: tuple[int, ...]) -> Tensor | None:
    """What was kept of these values at these places, if it is still there, in this shape: for the
    caller alone."""
    kept = _waiting.weights.pop(values, None)
    if kept is None or kept.versions != _versions(values, index) or kept.weight.shape != shape:
        return None
    same = all(a is b for a, b in zip(kept.places, index, strict=True))
    return kept.weight if same else None


def _versions(values: Tensor, index: Index) -> list[int]:
    return [version(t) for t in (values, *index)]
