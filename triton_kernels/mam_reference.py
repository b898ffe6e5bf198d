"""Multiply-and-max/min, written plainly in PyTorch: what the kernels are compared with, and what
runs where there is none. Products exist for a piece of the batch and of the outputs at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from triton_kernels.layout import Layout, expand

# Products that exist at the same time: some MB.
PRODUCTS = 1 << 20


class Winners(NamedTuple):
    """values: (batch, n_out), the largest product plus the smallest one. arg_max, arg_min: int32
    (batch, n_out), which they are: a column, or, of a sparse weight, a position in the layout's row
    order, and -1 where an absent weight won."""

    values: Tensor
    arg_max: Tensor
    arg_min: Tensor


def wide(x: Tensor) -> Tensor:
    """In the precision in which products are compared: exact for products of half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def winners(x: Tensor, weight: Tensor) -> Winners:
    """x: (batch, n_in), weight: (n_out, n_in), n_in > 0. Of equal products the first one wins; the
    first NaN wins over everything."""
    found = _empty(x, len(weight))
    # One memory for all pieces: new ones lie elsewhere each time where the heap is in pieces.
    held = wide(x.new_empty(0))
    for samples, rows in _pieces(len(x), len(weight), x.shape[1]):
        products = torch.mul(wide(x[samples])[:, None], wide(weight[rows]), out=held.resize_(0))
        high, arg_max = products.max(dim=2)
        low, arg_min = products.min(dim=2)
        _write(found, samples, rows, high + low, arg_max, arg_min)
    return found


def input_gradient(dy: Tensor, weight: Tensor, arg_max: Tensor, arg_min: Tensor) -> Tensor:
    """dy: (batch, n_out) -> (batch, n_in): to the inputs of the winning products alone."""
    dx = wide(dy.new_zeros(len(dy), weight.shape[1]))
    for samples, rows in _pieces(len(dy), len(weight), 1):
        for arg in (arg_max, arg_min):
            won = arg[samples, rows].long()
            terms = wide(dy[samples, rows]) * wide(weight[rows].gather(1, won.T)).T
            dx[samples].scatter_add_(1, won, terms)
    return dx.to(dy.dtype)


def weight_gradient(
    dy: Tensor, x: Tensor, arg_max: Tensor, arg_min: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """dy: (batch, n_out), x: (batch, n_in) -> (n_out, n_in): to the winning weights alone. Added to
    ``out``, in place, where there is one."""
    n_out, n_in = dy.shape[1], x.shape[1]
    dweight = x.new_zeros(n_out, n_in) if out is None else out
    # Half precision is summed in single, a strip of rows at a time.
    for _, rows in _pieces(0, n_out, n_in):
        sums = wide(x.new_zeros(rows.stop - rows.start, n_in))
        for samples, _ in _pieces(len(x), 1, len(sums)):
            for arg in (arg_max, arg_min):
                won = arg[samples, rows].long()
                terms = wide(dy[samples, rows]) * wide(x[samples].gather(1, won))
                sums.scatter_add_(1, won.T, terms.T)
        dweight[rows] += sums
    return dweight


def count_selections(x: Tensor, weight: Tensor, counts: Tensor) -> None:
    """counts: int32 (n_out, n_in), += 1 for the two winners of every sample and output."""
    for samples, rows in _pieces(len(x), len(weight), x.shape[1]):
        found = winners(x[samples], weight[rows])
        for arg in found[1:]:
            ones = torch.ones_like(arg).T
            counts[rows].scatter_add_(1, arg.T.long(), ones)


def sparse_winners(x: Tensor, values: Tensor, layout: Layout, *, absent: str = "zero") -> Winners:
    """values: (capacity, 1, 1) of single weights. absent: ``zero``: an absent weight is a weight of
    zero, whatever its input; ``none``: it does not compete, and a row without weights gives 0."""
    found = _empty(x, layout.n_out)
    ends = layout.row_offsets.long()
    longest = int(ends.diff().max()) if layout.n_out else 0
    weights, cols = wide(values).view(-1)[layout.slots.long()], layout.cols.long()
    zeros = first_absent(layout.row_offsets, layout.cols) if absent == "zero" else None
    for samples, rows in _pieces(len(x), layout.n_out, max(1, longest)):
        # The rows' weights, the shorter rows filled up at their end, where nothing wins a tie.
        at = ends[:-1][rows, None] + torch.arange(max(1, longest), device=x.device)
        filling = at >= ends[1:][rows, None]
        held = (weights, cols) if cols.numel() else (weights.new_zeros(1), cols.new_zeros(1))
        own, columns = (tensor[at.clamp(max=len(tensor) - 1)] for tensor in held)
        products = wide(x[samples])[:, columns] * own
        high, k_max = products.masked_fill(filling, -torch.inf).max(dim=2)
        low, k_min = products.masked_fill(filling, torch.inf).min(dim=2)
        start = ends[:-1][rows]
        empty = (ends[1:][rows] == start).expand(high.shape)
        beaten_max, beaten_min = empty, empty
        if zeros is not None:
            zero_at, open_ = zeros[rows], zeros[rows] < layout.n_in
            col_max, col_min = (columns.T.gather(0, k) for k in (k_max, k_min))
            beaten_max = open_ & (empty | (high < 0) | ((high == 0) & (col_max > zero_at)))
            beaten_min = open_ & (empty | (low > 0) | ((low == 0) & (col_min > zero_at)))
        _write(
            found,
            samples,
            rows,
            high.masked_fill(beaten_max, 0) + low.masked_fill(beaten_min, 0),
            (start + k_max).masked_fill(beaten_max, -1),
            (start + k_min).masked_fill(beaten_min, -1),
        )
    return found


def sparse_input_gradient(
    dy: Tensor, values: Tensor, layout: Layout, arg_max: Tensor, arg_min: Tensor
) -> Tensor:
    """dy: (batch, n_out), args: positions, or -1 -> (batch, n_in)."""
    dx = wide(dy.new_zeros(len(dy), layout.n_in))
    if layout.cols.numel() == 0:
        return dx.to(dy.dtype)
    weights, cols = wide(values).view(-1)[layout.slots.long()], layout.cols.long()
    for samples, rows in _pieces(len(dy), layout.n_out, 1):
        for arg in (arg_max, arg_min):
            won = arg[samples, rows].long()
            terms = (wide(dy[samples, rows]) * weights[won]).masked_fill(won < 0, 0)
            dx[samples].scatter_add_(1, cols[won], terms)
    return dx.to(dy.dtype)


def sparse_weight_gradient(
    dy: Tensor, x: Tensor, layout: Layout, arg_max: Tensor, arg_min: Tensor, capacity: int
) -> Tensor:
    """dy: (batch, n_out), x: (batch, n_in) -> (capacity, 1, 1), free slots zero."""
    grad = x.new_zeros(capacity, 1, 1)
    if layout.cols.numel() == 0:
        return grad
    cols, slots = layout.cols.long(), layout.slots.long()
    sums = wide(x.new_zeros(capacity))
    for samples, rows in _pieces(len(x), layout.n_out, 1):
        for arg in (arg_max, arg_min):
            won = arg[samples, rows].long()
            terms = wide(dy[samples, rows]) * wide(x[samples].gather(1, cols[won]))
            sums.index_add_(0, slots[won].flatten(), terms.masked_fill(won < 0, 0).flatten())
    return grad.copy_(sums.view(-1, 1, 1))


def count_sparse_selections(
    x: Tensor, values: Tensor, layout: Layout, counts: Tensor, *, absent: str = "zero"
) -> None:
    """counts: int32 (capacity,), by slot: += 1 for the two winners of every sample and output."""
    for samples, _ in _pieces(len(x), 1, max(1, layout.n_out)):
        for arg in sparse_winners(x[samples], values, layout, absent=absent)[1:]:
            slots = layout.slots[arg[arg >= 0].long()].long()
            counts.index_add_(0, slots, torch.ones_like(slots, dtype=torch.int32))


def first_absent(row_offsets: Tensor, cols: Tensor) -> Tensor:
    """int64 (n_out,): each row's first column without a weight; n_in where there is none."""
    rows = expand(row_offsets, cols.numel())
    turn = torch.arange(cols.numel(), device=cols.device) - row_offsets.long()[rows]
    moved = cols != turn
    return row_offsets.diff().long().scatter_reduce(0, rows[moved], turn[moved], "amin")


def _empty(x: Tensor, n_out: int) -> Winners:
    index = torch.empty(len(x), n_out, dtype=torch.int32, device=x.device)
    return Winners(x.new_empty(len(x), n_out), index, torch.empty_like(index))


def _write(found: Winners, samples: slice, rows: slice, *what: Tensor) -> None:
    for target, tensor in zip(found, what, strict=True):
        target[samples, rows] = tensor


def _pieces(batch: int, n_out: int, depth: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of (batch, n_out), each with at most ``PRODUCTS`` / depth entries, or one."""
    rows = max(1, min(n_out, PRODUCTS // depth))
    samples = max(1, PRODUCTS // (depth * rows))
    for start in range(0, n_out, rows):
        for first in range(0, max(1, batch), samples):
            yield (
                slice(first, min(first + samples, batch)),
                slice(start, min(start + rows, n_out)),
            )
