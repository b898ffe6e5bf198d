"""Products with a scattered weight on the CPU, where numba scatters and gathers.

A weight of up to ``PIECE_BYTES`` is scattered once a training step: its backward finds it where
forward left it, as long as those that wait for their backward take no more than ``WAITING_BYTES``
together; the oldest go first. Of a larger one, in a linear layer, a piece of the rows is scattered
at a time, in forward and again in backward. What is scattered is never older than the last forward.
Single weights that are all alive are not: they lie as a dense weight does.

What is scattered is multiplied by PyTorch's BLAS. The forward product of a linear layer may be left
to the loops of ``blocks_tiles`` instead, which take every 64 rows as a block: ``costs`` says where.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.weak import WeakTensorKeyDictionary

from triton_kernels import blocks_tiles, costs, threads
from triton_kernels.waves import memory, version

# Larger pieces of memory come from the system anew each time (32 MB with glibc), a page at a time.
PIECE_BYTES = 28 << 20
WAITING_BYTES = 64 << 20
# A smaller weight is scattered before a compiler has been imported.
LEAST_ENTRIES = 1 << 16
# Fewer entries than this are not worth a second thread.
_SHARED = 1 << 18
# Share of single weights from which bits say where they are rather than column numbers.
_CROWDED = 1 / 32

# Rows of a dense weight that are a block of it.
_HEIGHT = 64
# Whether loops make the forward product of a linear layer where they can, or the BLAS always. None:
# whichever is faster by ``costs``.
by_loops: bool | None = None

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Index = tuple[Tensor, Tensor, Tensor]


def available(values: Tensor, entries: int) -> bool:
    """Whether it serves a weight of so many entries, zeros included."""
    return values.device.type == "cpu" and entries >= LEAST_ENTRIES and _numba()


@cache
def _numba() -> bool:
    return find_spec("numba") is not None


def forward(
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    n_out: int,
    bias: Tensor | None = None,
) -> Tensor:
    """x: (batch, n_in) -> x W^T + bias: (batch, n_out)."""
    index = row_offsets, cols, slots
    if _lies_dense(values, index, n_out, x.shape[1]):
        return linear(x, values.detach().view(n_out, x.shape[1]), bias)
    pieces = _pieces(values, index, n_out, x.shape[1])
    scratch = _room(values, (pieces[0].outputs, 1, x.shape[1]))
    if _by_loops(x, values, cols.numel(), n_out):
        _scatter(values, pieces[0], scratch)
        order = memory.get(index, ("rows", n_out), lambda: _rows_as_blocks(n_out))
        y = blocks_tiles.forward(x, scratch.view(-1, _HEIGHT, x.shape[1]), *order, n_out, bias)
    else:
        y = x.new_empty(len(x), n_out)
        for piece in pieces:
            weight = scratch[: piece.outputs]
            _scatter(values, piece, weight)
            out = y[:, piece.rows]
            if bias is None:
                torch.mm(x, weight[:, 0].T, out=out)
            else:
                torch.addmm(bias[piece.rows], x, weight[:, 0].T, out=out)
    # Only the gradient of x needs it again.
    if x.requires_grad and len(pieces) == 1:
        keep(scratch, values, index)
    else:
        _leave(scratch)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    need_x: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, dvalues) of ``forward``, free slots zero; one that is not needed is empty."""
    dx = x.new_empty(x.shape if need_x else 0)
    index = row_offsets, cols, slots
    if _lies_dense(values, index, dy.shape[1], x.shape[1]):
        if need_x:
            torch.mm(dy, values.detach().view(dy.shape[1], x.shape[1]), out=dx)
        dvalues = (dy.T @ x).view(values.shape) if need_values else values.new_empty(0)
        return dx, dvalues
    dvalues = _gradient(values, cols) if need_values else values.new_empty(0)
    pieces = _pieces(values, index, dy.shape[1], x.shape[1])
    kept = take(values, index, (dy.shape[1], 1, x.shape[1]))
    room = (pieces[0].outputs, 1, x.shape[1])
    scratch = _room(values, room) if kept is None else kept
    for piece in pieces:
        own, dense = dy[:, piece.rows], scratch[: piece.outputs]
        if need_x:
            if kept is None:
                _scatter(values, piece, dense)
            torch.addmm(dx, own, dense[:, 0], beta=int(piece is not pieces[0]), out=dx)
        if need_values:
            torch.mm(own.T, x, out=dense[:, 0])
            _gather(dvalues, piece, dense)
    _leave(scratch)
    return dx, dvalues


def scatter(
    values: Tensor, row_offsets: Tensor, cols: Tensor, slots: Tensor, dense: Tensor
) -> None:
    """``layout.scatter`` into ``dense``: (n_out, taps, channels), in any memory order."""
    _scatter(values, _Piece.whole((row_offsets, cols, slots), len(dense)), dense)


def _scatter(values: Tensor, piece: _Piece, dense: Tensor) -> None:
    # Not at the top: numba takes a second to import.
    from triton_kernels.expand_numba import expand
    from triton_kernels.scatter_numba import scatter_blocks, scatter_entries

    kernel = scatter_entries if values.shape[1:] == (1, 1) else scatter_blocks
    _share((kernel, expand), values.contiguous(), piece, dense)


def gather(
    dense: Tensor, values: Tensor, row_offsets: Tensor, cols: Tensor, slots: Tensor
) -> Tensor:
    """``layout.gather`` of the gradient of these values from that of the dense weight."""
    gradient = _gradient(values, cols)
    _gather(gradient, _Piece.whole((row_offsets, cols, slots), len(dense)), dense)
    return gradient


def _gather(gradient: Tensor, piece: _Piece, dense: Tensor) -> None:
    from triton_kernels.expand_numba import compress
    from triton_kernels.scatter_numba import gather_blocks, gather_entries

    kernel = gather_entries if gradient.shape[1:] == (1, 1) else gather_blocks
    _share((kernel, compress), gradient, piece, dense)


def _gradient(values: Tensor, cols: Tensor) -> Tensor:
    """Every alive block is written whole; only free slots need zeros."""
    make = values.new_empty if len(values) == cols.numel() else values.new_zeros
    return make(values.shape)


def can_loop(n_out: int, n_in: int, itemsize: int) -> bool:
    """Whether loops could make the forward product. Larger weights are in pieces; some machines
    multiply half precision natively."""
    if itemsize != 4 or n_out % _HEIGHT or n_in % 16 or n_out * n_in * itemsize > PIECE_BYTES:
        return False
    like = torch.empty(0, dtype=torch.float32, device="cpu")
    return blocks_tiles.available(like, (_HEIGHT, n_in))


def _by_loops(x: Tensor, values: Tensor, alive: int, n_out: int) -> bool:
    rows, n_in = x.shape
    size, block = x.element_size(), (values.shape[1], values.shape[2])
    if by_loops is False or not can_loop(n_out, n_in, size):
        return False
    layer = costs.Layer(n_out, n_in, 1, block, alive, rows, rows, size, "cpu")
    return by_loops or costs.dense_work(layer).form == costs.LOOPS


def _rows_as_blocks(n_out: int) -> Index:
    """A dense weight as a sparse one: blocks of as many columns as it has, all alive."""
    ends = torch.arange(n_out // _HEIGHT + 1, dtype=torch.int32, device="cpu")
    return ends, torch.zeros_like(ends[1:]), ends[:-1]


def _lies_dense(values: Tensor, index: Index, n_out: int, n_in: int) -> bool:
    slots = index[2]
    if values.shape != (n_out * n_in, 1, 1) or slots.numel() != len(values):
        return False
    return values.is_contiguous() and memory.get(index, "ordered", lambda: _ordered(slots))


def _ordered(slots: Tensor) -> bool:
    """Whether the values lie in the order of the rows, as they do until a topology has changed."""
    own = slots.numpy()
    return np.array_equal(own, np.arange(own.size, dtype=own.dtype))


class _Bits(NamedTuple):
    """Where single weights are alive, as ``expand_numba`` takes it; and whether they lie in the
    order of the rows."""

    words: Tensor
    ordered: bool

    @classmethod
    def of(cls, values: Tensor, index: Index, n_out: int, n_in: int) -> _Bits | None:
        """None where that way is not for them."""
        single = values.shape[1:] == (1, 1) and values.element_size() == 4
        if not single or index[1].numel() < _CROWDED * n_out * n_in:
            return None

        from triton_kernels.compiled_numba import jit_is_off
        from triton_kernels.expand_numba import mark
        from triton_kernels.registers import expands
        from triton_kernels.vectors import WIDTH

        if jit_is_off() or not expands():
            return None
        row_offsets, cols, slots = index
        words = cols.new_zeros(n_out, -(-n_in // WIDTH), dtype=torch.uint16)
        mark(row_offsets.numpy(), cols.numpy(), words.numpy(), 0, n_out)
        return cls(words, _ordered(slots))


class _Piece(NamedTuple):
    """``outputs`` rows of a weight, and the row offsets, columns and slots of their blocks."""

    rows: slice
    outputs: int
    places: Index
    bits: _Bits | None = None

    @classmethod
    def whole(cls, index: Index, n_out: int) -> _Piece:
        return cls(slice(0, n_out), n_out, index)


def _pieces(values: Tensor, index: Index, n_out: int, n_in: int) -> list[_Piece]:
    """Whole rows of blocks, the most in the first piece."""
    bh, size = values.shape[1], values.element_size()
    row_offsets, cols, slots = index
    bits = memory.get(
        index, ("bits", n_out, n_in, size), lambda: _Bits.of(values, index, n_out, n_in)
    )
    # Sums of half precision are not to be rounded after every piece.
    count = 1 if size <= 2 else -(-n_out * n_in * size // PIECE_BYTES)
    if count == 1:
        return [_Piece(slice(0, n_out), n_out, index, bits)]
    n_rows = row_offsets.numel() - 1
    height = -(-n_rows // count)
    cuts = [*range(0, n_rows, height), n_rows]
    ends = row_offsets[cuts].tolist()
    return [
        _Piece(
            slice(a * bh, min(b * bh, n_out)),
            min(b * bh, n_out) - a * bh,
            (row_offsets[a : b + 1], cols[first:last], slots[first:last]),
            None if bits is None else bits._replace(words=bits.words[a:b]),
        )
        for (a, b), (first, last) in zip(pairwise(cuts), pairwise(ends), strict=True)
    ]


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


def _room(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Memory for a weight of these values, which holds anything."""
    room, _waiting.room = _waiting.room, None
    if room is not None and room.shape == shape and room.dtype == values.dtype:
        return room
    # It may be written to again outside of the inference mode that somebody is in.
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=values.dtype, device=values.device)


def _leave(room: Tensor) -> None:
    """For the next weight."""
    _waiting.room = room if room.nbytes <= PIECE_BYTES else None


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


def _share(
    kernels: tuple[Callable[..., None], Callable[..., None]],
    values: Tensor,
    piece: _Piece,
    dense: Tensor,
) -> None:
    """Run a kernel, the second one where there are bits, on as many threads as PyTorch has, each
    with as many rows of blocks."""
    plain, by_bits = kernels
    kind = _BITS[values.element_size()]
    alive, flat = values.detach().view(kind), dense.detach().view(kind)
    row_offsets, cols, slots = (tensor.numpy() for tensor in piece.places)
    n_rows = len(row_offsets) - 1
    count = min(torch.get_num_threads(), n_rows) if dense.numel() >= _SHARED else 1
    parts = list(pairwise(n_rows * i // count for i in range(count + 1)))
    if piece.bits is None:
        threads.run(plain, (alive.numpy(), row_offsets, cols, slots, flat.numpy()), parts)
    else:
        words, ordered = piece.bits
        arrays = (alive.view(-1).numpy(), words.numpy(), row_offsets, slots, ordered)
        threads.run(by_bits, (*arrays, flat[:, 0].numpy()), parts)
