"""Unstructured products on the CPU, the same functions as ``csr``: numba where it is installed."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from triton_kernels import threads
from triton_kernels.csr_runs import WIDEST, runs_of

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
# Fewer products than this are not worth a second thread.
_SHARED = 1 << 20


@cache
def _numba() -> bool:
    return find_spec("numba") is not None


def available(x: Tensor) -> bool:
    return x.device.type == "cpu" and _numba()


def product(
    x: Tensor, values: Tensor, offsets: Tensor, index: Tensor, slots: Tensor, width: int
) -> Tensor:
    """x: (batch, n) -> (batch, width) = x M^T, where M: (width, n) is given by its compressed rows
    and ``values[slots]``. With the transposed order of a weight, its input gradient."""
    dtype, x = x.dtype, _wide(x)
    y = x.new_empty(len(x), width)
    _walk(x, None, values, (offsets, index, slots), y, None)
    return y.to(dtype)


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    capacity: int,
    block: tuple[int, int] = (1, 1),
) -> Tensor:
    """dy^T x at the alive entries alone: (capacity, 1, 1), free slots zero."""
    dtype, x = x.dtype, _wide(x)
    grad = _gradient(x, slots, capacity)
    _walk(x, _wide(dy), None, (row_offsets, cols, slots), None, grad)
    return grad.to(dtype)


def gradients(
    x: Tensor, dy: Tensor, values: Tensor, col_offsets: Tensor, rows_t: Tensor, slots_t: Tensor
) -> tuple[Tensor, Tensor]:
    """That of x, (batch, n_in), and that of the values, (capacity, 1, 1): both products read the
    same of dy, which here happens once."""
    dtype, x = x.dtype, _wide(x)
    dx, grad = torch.empty_like(x), _gradient(x, slots_t, len(values))
    _walk(_wide(dy), x, values, (col_offsets, rows_t, slots_t), dx, grad)
    return dx.to(dtype), grad.to(dtype)


def _wide(x: Tensor) -> Tensor:
    """In single precision at least."""
    return (x if x.dtype == torch.float64 else x.float()).detach().contiguous()


def _gradient(x: Tensor, slots: Tensor, capacity: int) -> Tensor:
    return (x.new_empty if slots.numel() == capacity else x.new_zeros)(capacity, 1, 1)


def _walk(
    x: Tensor,
    own: Tensor | None,
    values: Tensor | None,
    order: tuple[Tensor, Tensor, Tensor],
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

    (batch, columns), size = x.shape, x.element_size()
    fitting = [v for v in _VECTORS if v <= kept_twice(size)] or [1]
    vectors = next((v for v in fitting if WIDTH * v >= batch), fitting[-1])
    feature = WIDTH * fitting[-1] * size
    rows, nonzeros = len(order[0]) - 1, order[1].numel()
    # By the batch only where it pays: each width takes another order of the nonzeros.
    width = _NEAREST // feature
    if nonzeros * width < _LEAST * rows * columns:
        width = min(_NEXT // (WIDTH * vectors * size), WIDEST)
    group = _ROWS if columns * feature <= _FAR else 2 * _ROWS
    runs, shares = runs_of(order, columns, width, group, torch.get_num_threads())
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
