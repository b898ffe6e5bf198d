"""Unstructured products on the CPU, as numba compiles them: of single weights, and of blocks that
are too small for better, as if their weights were single ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from triton_kernels import blocks_tiles, threads
from triton_kernels.csr_runs import WIDEST, Matrix, runs_of

# Numbers of the batch at a time, in vectors of 16: no more than the batch fills.
_VECTORS = (1, 2, 4)
# A piece of the features takes so many bytes: most of a core's nearest cache; or of the next one,
# where the nearest would hold fewer than so many nonzeros of a row.
_NEAREST = 24 << 10
_NEXT = 256 << 10
_LEAST = 4
# Rows of a group: what they keep of the activations stays in a core's cache. More where all
# features do not, since they come from far for every group.
_ROWS = 512
_FAR = 512 << 10
# Blocks with a shorter side than this are single weights, where there are loops for wider ones.
_SMALL = 16
# Fewer products than this are not worth a second thread.
_SHARED = 1 << 20


@cache
def _numba() -> bool:
    return find_spec("numba") is not None


def available(x: Tensor, block: tuple[int, int] = (1, 1)) -> bool:
    """Whether nothing is better for activations like ``x`` and a weight in such blocks."""
    if block == (1, 1):
        return x.device.type == "cpu" and _numba()
    return min(block) < _SMALL and blocks_tiles.available(x, (_SMALL, _SMALL))


def forward(
    x: Tensor, values: Tensor, row_offsets: Tensor, cols: Tensor, slots: Tensor, n_out: int
) -> Tensor:
    """x: (batch, n_in) -> x W^T: (batch, n_out)."""
    matrix = _matrix((n_out, x.shape[1]), values.shape)
    return _product(x, values, (row_offsets, cols, slots), matrix)


def input_gradient(
    dy: Tensor, values: Tensor, col_offsets: Tensor, rows_t: Tensor, slots_t: Tensor, n_in: int
) -> Tensor:
    """dy: (batch, n_out) -> dy W: (batch, n_in), over the transposed order."""
    matrix = _matrix((dy.shape[1], n_in), values.shape).T
    return _product(dy, values, (col_offsets, rows_t, slots_t), matrix)


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    capacity: int,
    block: tuple[int, int] = (1, 1),
) -> Tensor:
    """dy^T x at the alive entries alone: (capacity, bh, bw), free slots and padding zero."""
    dtype, x = x.dtype, _wide(x)
    grad = _gradient(x, dy, slots, (capacity, *block))
    matrix = _matrix((dy.shape[1], x.shape[1]), grad.shape)
    _walk(x, _wide(dy), None, (row_offsets, cols, slots), matrix, None, grad)
    return grad.to(dtype)


def gradients(
    x: Tensor, dy: Tensor, values: Tensor, col_offsets: Tensor, rows_t: Tensor, slots_t: Tensor
) -> tuple[Tensor, Tensor]:
    """That of x, (batch, n_in), and that of the values, (capacity, bh, bw): both products read the
    same of dy, which here happens once."""
    dtype, x = x.dtype, _wide(x)
    dx, grad = torch.empty_like(x), _gradient(x, dy, slots_t, values.shape)
    matrix = _matrix((dy.shape[1], x.shape[1]), values.shape).T
    _walk(_wide(dy), x, values, (col_offsets, rows_t, slots_t), matrix, dx, grad)
    return dx.to(dtype), grad.to(dtype)


def _matrix(shape: tuple[int, int], values: Sequence[int]) -> Matrix:
    """A weight of this shape, of values of that one."""
    _, bh, bw = values
    return Matrix(shape, (bh, bw), (bw, 1))


def _product(
    x: Tensor, values: Tensor, order: tuple[Tensor, Tensor, Tensor], matrix: Matrix
) -> Tensor:
    dtype, x = x.dtype, _wide(x)
    y = x.new_empty(len(x), matrix.shape[0])
    _walk(x, None, values, order, matrix, y, None)
    return y.to(dtype)


def _wide(x: Tensor) -> Tensor:
    """In single precision at least."""
    return (x if x.dtype == torch.float64 else x.float()).detach().contiguous()


def _gradient(x: Tensor, dy: Tensor, slots: Tensor, values: Sequence[int]) -> Tensor:
    """Room for that of values of this shape, zero where none is written."""
    capacity, bh, bw = values
    all_of_it = slots.numel() == capacity and not (dy.shape[1] % bh or x.shape[1] % bw)
    return (x.new_empty if all_of_it else x.new_zeros)(capacity, bh, bw)


def _walk(
    x: Tensor,
    own: Tensor | None,
    values: Tensor | None,
    order: tuple[Tensor, Tensor, Tensor],
    matrix: Matrix,
    y: Tensor | None,
    grad: Tensor | None,
) -> None:
    """The pass over the nonzeros that fills y, or grad, or both: see ``csr_numba``. On as many
    threads as PyTorch has, each with as many nonzeros. Rows are whole, so that the result does not
    depend on how many there are; each thread copies all of x for itself, a tile at a time."""
    # Not at the top: numba takes a second to import.
    from triton_kernels.csr_numba import walk
    from triton_kernels.registers import dots_at_once, kept_twice
    from triton_kernels.vectors import WIDTH

    batch, size, (rows, columns) = len(x), x.element_size(), matrix.shape
    fitting = [v for v in _VECTORS if v <= kept_twice(size)] or [1]
    vectors = next((v for v in fitting if WIDTH * v >= batch), fitting[-1])
    feature = WIDTH * fitting[-1] * size
    nonzeros = order[1].numel() * math.prod(matrix.sides)
    # By the batch only where it pays: each width takes another order of the nonzeros.
    width = _NEAREST // feature
    if nonzeros * width < _LEAST * rows * columns:
        width = min(_NEXT // (WIDTH * vectors * size), WIDEST)
    group = _ROWS if columns * feature <= _FAR else 2 * _ROWS
    runs, shares = runs_of(order, matrix, width, group, torch.get_num_threads())
    if nonzeros * batch < _SHARED:
        shares = [[(0, len(runs.starts) - 1)]]

    none = x.new_empty(0, 0)
    weights = none if values is None else values.detach().to(x.dtype)
    tensors = (
        *(x, none if own is None else own, weights.reshape(-1)),
        *(none if y is None else y, (none if grad is None else grad).view(-1)),
    )
    x_, own_, weights_, y_, grad_ = (tensor.numpy() for tensor in tensors)
    kernel = walk(vectors, y is not None, grad is not None, dots_at_once(size))
    for parts in shares:
        threads.run(kernel, [x_, own_, weights_, *runs, y_, grad_], parts)
