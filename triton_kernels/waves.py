"""The products of a sparse weight's blocks on the CPU, in an order in which none waits for another.

Activations lie in planes: one matrix of (rows, width) for every block of ``width`` features, so
that what a block multiplies is one piece of memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from triton_kernels import blas
from triton_kernels.blas import Matrices
from triton_kernels.layout import expand

Index = NDArray[np.int64]
T = TypeVar("T")


class Waves(NamedTuple):
    """What is added to the same place, one after the other; what is not, at once.

    order: (alive,), positions of the blocks; ends: where each wave ends in it. The k-th wave holds
    the k-th block of every target. empty: targets without any.
    """

    order: Index
    ends: list[int]
    empty: Index


def waves(target: Index, targets: int) -> Waves:
    """target: (alive,), where each block's product is added, in [0, targets)."""
    by_target = np.argsort(target, kind="stable")
    counts = np.bincount(target, minlength=targets)
    first = np.concatenate([[0], counts.cumsum()[:-1]])
    turn = np.arange(target.size) - first[target[by_target]]
    order = by_target[np.argsort(turn, kind="stable")]
    return Waves(order, np.bincount(turn).cumsum().tolist(), np.flatnonzero(counts == 0))


class Blocks(NamedTuple):
    """Alive blocks, int64 (alive,): their row (or column, in the transposed order), the other of
    the two, and their slot in the values."""

    major: Index
    minor: Index
    slots: Index


def add_products(
    source: Tensor,
    source_starts: Index,
    weight: Matrices,
    out: Tensor,
    out_starts: Index,
    order: Waves,
    size: tuple[int, int, int],
) -> None:
    """The sums, for each target, of the strips of ``source`` times their blocks -> ``out``.

    source, out: planes, or any memory that holds them; starts: (alive,) of each block's strip in
    them, in elements. size: (rows, k, n), a strip of (rows, k) times a block of (k, n). What no
    block adds to is left as it is.
    """
    rows, k, n = size
    blas.multiply(
        Matrices(source, source_starts[order.order], k),
        weight._replace(starts=weight.starts[order.order]),
        Matrices(out, out_starts[order.order], n),
        (rows, n, k),
        order.ends,
    )


class Memory:
    """What was worked out from the tensors of a layout, for as long as they live unchanged."""

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()

    def get(self, tensors: tuple[Tensor, ...], key: Hashable, make: Callable[[], T]) -> T:
        """``make()``, a function of these tensors and this key; called once. It must not return
        what refers to the first tensor, which would live forever then."""
        known = self._known.get(tensors[0])
        if known is None or not known[0].same(tensors):
            known = self._known[tensors[0]] = (_State.of(tensors), {})
        if key not in known[1]:
            known[1][key] = make()
        return known[1][key]  # type: ignore[no-any-return]


class _State(NamedTuple):
    """Which tensors, and how often each had been written to."""

    tensors: list[weakref.ref[Tensor]]
    versions: list[int]

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...]) -> _State:
        return cls([weakref.ref(t) for t in tensors], [version(t) for t in tensors])

    def same(self, tensors: tuple[Tensor, ...]) -> bool:
        known = (ref() is t for ref, t in zip(self.tensors, tensors, strict=True))
        return all(known) and self.versions == [version(t) for t in tensors]


def version(tensor: Tensor) -> int:
    """How often it was written to."""
    return 0 if tensor.is_inference() else tensor._version


# Of the layouts that are in use.
memory = Memory()


def blocks_of(offsets: Tensor, index: Tensor, slots: Tensor) -> Blocks:
    """The alive blocks of one of the two orders of a layout."""

    def make() -> Blocks:
        major = expand(offsets, index.numel())
        # Copies: what is remembered of tensors must not keep them alive.
        return Blocks(*(t.numpy().astype(np.int64) for t in (major, index, slots)))

    return memory.get((offsets, index, slots), "blocks", make)


def waves_of(
    tensors: tuple[Tensor, Tensor, Tensor], key: Hashable, make: Callable[[], tuple[Index, int]]
) -> Waves:
    """``waves(*make())``, worked out once for these tensors of a layout and this key."""
    return memory.get(tensors, key, lambda: waves(*make()))
