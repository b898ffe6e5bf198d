"""Scattered weights between forward and backward, on the CPU.

A weight is scattered once a training step: its backward finds it where forward left it, as long as
those that wait for theirs take no more than ``WAITING_BYTES`` together; the oldest go first. What
is scattered is never older than the last forward.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from triton_kernels.waves import version

# Larger pieces of memory come from the system anew each time (32 MB with glibc), a page at a time.
PIECE_BYTES = 28 << 20
WAITING_BYTES = 64 << 20

# Offsets, columns and slots of rows of blocks, as a layout has them.
Index = tuple[Tensor, Tensor, Tensor]


class _Kept(NamedTuple):
    """A scattered weight, how it lies, and what it was scattered from: the values as they were."""

    weight: Tensor
    lies: Hashable
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
    last, _waiting.room = _waiting.room, None
    if last is not None and last.shape == shape and last.dtype == values.dtype:
        return last
    # It may be written to again outside of the inference mode that somebody is in.
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=values.dtype, device=values.device)


def leave(weight: Tensor) -> None:
    """Its memory, for the next one."""
    _waiting.room = weight if weight.nbytes <= PIECE_BYTES else None


def keep(weight: Tensor, lies: Hashable, values: Tensor, index: Index) -> None:
    """Leave a weight, which nobody else may write to, for ``take``. lies: its shape, and all else
    that says what its memory holds."""
    weights = _waiting.weights
    weights.pop(values, None)
    held = sum(kept.weight.nbytes for kept in weights.values()) + weight.nbytes
    for older in list(weights):
        if held <= WAITING_BYTES:
            break
        held -= weights.pop(older).weight.nbytes
    if held <= WAITING_BYTES:
        weights[values] = _Kept(weight, lies, index, _versions(values, index))


def take(lies: Hashable, values: Tensor, index: Index) -> Tensor | None:
    """What was kept of these values at these places, if it is still there and lies like this: for
    the caller alone."""
    kept = _waiting.weights.pop(values, None)
    if kept is None or kept.versions != _versions(values, index) or kept.lies != lies:
        return None
    same = all(a is b for a, b in zip(kept.places, index, strict=True))
    return kept.weight if same else None


def _versions(values: Tensor, index: Index) -> list[int]:
    return [version(t) for t in (values, *index)]
