"""Products with a scattered weight on the CPU, where numba scatters and gathers.

A weight of up to ``waiting.PIECE_BYTES`` is scattered once a training step, and waits for its
backward. Of a larger one, a piece of the rows is scattered at a time, in forward and again in
backward. Single weights that are all alive are not scattered: they lie as a dense weight does.

What is scattered is multiplied by PyTorch's BLAS or, where ``costs`` says that they are faster, by
our own loops, for which it lies in strips.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from triton_kernels import costs, scatter_cpu, strips_cpu, waiting
from triton_kernels.scatter_cpu import Dense, Piece
from triton_kernels.waiting import Index
from triton_kernels.waves import memory

# Whether loops multiply where they can, or the BLAS always. None: whichever is faster by ``costs``.
by_loops: bool | None = None


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
    weight = _Weight(x, values, index, n_out)
    room, whole = waiting.room(values, weight.shape), len(weight.pieces) == 1
    y = x.new_empty(0 if whole else (len(x), n_out))
    for piece in weight.pieces:
        scatter_cpu.put(values, piece, weight.dense(room, piece))
        own = weight.forward(x, room, piece, None if bias is None else bias[piece.rows])
        if whole:
            y = own
        else:
            y[:, piece.rows] = own
    # Only the gradient of x needs it again.
    if x.requires_grad and whole:
        waiting.keep(room, weight.lies, values, index)
    else:
        waiting.leave(room)
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
    index, n_out = (row_offsets, cols, slots), dy.shape[1]
    dx, dvalues = x.new_empty(0), values.new_empty(0)
    if _lies_dense(values, index, n_out, x.shape[1]):
        if need_x:
            dx = dy @ values.detach().view(n_out, x.shape[1])
        return dx, (dy.T @ x).view(values.shape) if need_values else dvalues
    if need_values:
        dvalues = scatter_cpu.room_for_gradient(values, cols)
    weight = _Weight(x, values, index, n_out)
    kept = waiting.take(weight.lies, values, index)
    room = waiting.room(values, weight.shape) if kept is None else kept
    for piece in weight.pieces:
        own = dy[:, piece.rows]
        if need_x:
            if kept is None:
                scatter_cpu.put(values, piece, weight.dense(room, piece))
            dx = weight.add_input_gradient(dx, own, room, piece)
        if need_values:
            weight.gradient(x, own, room, piece)
            scatter_cpu.get(dvalues, piece, weight.dense(room, piece))
    waiting.leave(room)
    return dx, dvalues


class _Weight:
    """What multiplies by a scattered weight, a piece of it at a time, which lies in a room.

    shape: of the room; lies: what it holds, as ``waiting`` takes it.
    """

    def __init__(self, x: Tensor, values: Tensor, index: Index, n_out: int) -> None:
        self._index, self._columns = index, x.shape[1]
        self._loops = _by_loops(x, values, index[1].numel(), n_out)
        self.pieces = scatter_cpu.pieces(values, index, n_out, x.shape[1])
        rows = self.pieces[0].outputs
        plain = (rows, 1, x.shape[1])
        self.shape = strips_cpu.shape(rows, x.shape[1]) if self._loops else plain
        self.lies = self._loops, n_out, x.shape[1]

    def dense(self, room: Tensor, piece: Piece) -> Dense:
        """As ``scatter_cpu`` takes it."""
        if self._loops:
            return strips_cpu.dense(room, piece.outputs, self._columns)
        return Dense.of(room[: piece.outputs])

    def forward(self, x: Tensor, room: Tensor, piece: Piece, bias: Tensor | None) -> Tensor:
        if self._loops:
            return strips_cpu.forward(x, room, self._blocks(room, piece), piece.outputs, bias)
        return linear(x, room[: piece.outputs, 0], bias)

    def add_input_gradient(self, dx: Tensor, dy: Tensor, room: Tensor, piece: Piece) -> Tensor:
        """``dx`` and that of this piece; of the first one alone."""
        first = piece.rows.start == 0
        if self._loops:
            blocks = self._blocks(room, piece)
            own = strips_cpu.input_gradient(dy, room, blocks, self._columns)
            return own if first else dx.add_(own)
        weight = room[: piece.outputs, 0]
        return dy @ weight if first else dx.addmm_(dy, weight)

    def gradient(self, x: Tensor, dy: Tensor, room: Tensor, piece: Piece) -> None:
        """That of the piece's weight -> ``room``."""
        if self._loops:
            strips_cpu.weight_gradient(x, dy, room, self._blocks(room, piece))
        else:
            torch.mm(dy.T, x, out=room[: piece.outputs, 0])

    def _blocks(self, room: Tensor, piece: Piece) -> strips_cpu.Blocks:
        key = "strips", piece.outputs, *room.shape
        return memory.get(self._index, key, lambda: strips_cpu.Blocks.of(room, piece.outputs))


def _by_loops(x: Tensor, values: Tensor, alive: int, n_out: int) -> bool:
    if by_loops is False or not strips_cpu.available(values, n_out, x.shape[1]):
        return False
    if by_loops:
        return True
    rows, n_in = x.shape
    size, block = x.element_size(), (values.shape[1], values.shape[2])
    layer = costs.Layer(n_out, n_in, 1, block, alive, rows, rows, size, "cpu")
    return costs.dense_work(layer).form == costs.LOOPS


def _lies_dense(values: Tensor, index: Index, n_out: int, n_in: int) -> bool:
    slots = index[2]
    if values.shape != (n_out * n_in, 1, 1) or slots.numel() != len(values):
        return False
    return values.is_contiguous() and memory.get(
        index, "ordered", lambda: scatter_cpu.in_order(slots)
    )
