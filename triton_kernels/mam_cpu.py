"""Multiply-and-max/min on the CPU, the same functions as ``mam_reference``: compiled by numba.

Beside what they return, they hold some MB: half precision and samples are copied a piece at a time.
Nothing depends on the number of threads, nor on that of the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from triton_kernels import threads
from triton_kernels.layout import Layout
from triton_kernels.mam_reference import Winners, first_absent, wide
from triton_kernels.waves import Memory

# Numbers that are copied at a time.
_PIECE = 1 << 20
# Fewer products than this are not worth a second thread, nor fewer sums of a gradient.
_SHARED_PRODUCTS, _SHARED_SUMS = 1 << 20, 1 << 16

_kept = Memory()


def winners(x: Tensor, weight: Tensor) -> Winners:
    """x: (batch, n_in), weight: (n_out, n_in)."""
    return _winners(x, weight, None)


def count_selections(x: Tensor, weight: Tensor, counts: Tensor) -> None:
    """counts: int32 (n_out, n_in), in place."""
    for samples in _pieces(len(x), max(1, len(weight))):
        _winners(x[samples], weight, counts)


def _winners(x: Tensor, weight: Tensor, counts: Tensor | None) -> Winners:
    from triton_kernels.mam_numba import forward

    found = _empty(x, len(weight))
    nothing = torch.empty(0, 0, dtype=torch.int32)
    for samples in _pieces(*x.shape):
        own, part = _plain(x[samples]), [t[samples] for t in found]
        vectors, tiled = _tiles(own)
        kernel = forward(vectors)
        for rows in _strips(weight):
            strip = _plain(weight[rows])
            taken = (tiled, own, strip, nothing if counts is None else counts, *part, rows.start)
            _share(kernel, taken, len(strip), len(own) * strip.numel() > _SHARED_PRODUCTS)
    return found._replace(values=found.values.to(x.dtype))


def input_gradient(dy: Tensor, weight: Tensor, arg_max: Tensor, arg_min: Tensor) -> Tensor:
    """dy: (batch, n_out), weight: (n_out, n_in) -> (batch, n_in)."""
    from triton_kernels.mam_numba import input_gradient as kernel

    dx = dy.new_empty(len(dy), weight.shape[1])
    for samples in _pieces(len(dy), max(dy.shape[1], weight.shape[1])):
        slopes, args = _plain(dy[samples]), [a[samples].contiguous() for a in (arg_max, arg_min)]
        sums = slopes.new_zeros(len(slopes), weight.shape[1])
        for rows in _strips(weight):
            tensors = (slopes, _plain(weight[rows]), *args, sums, rows.start)
            _share(kernel, tensors, len(sums), slopes.numel() > _SHARED_SUMS)
        dx[samples] = sums
    return dx


def weight_gradient(
    dy: Tensor, x: Tensor, arg_max: Tensor, arg_min: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """dy: (batch, n_out), x: (batch, n_in) -> (n_out, n_in), added to ``out`` if there is one."""
    from triton_kernels.mam_numba import weight_gradient as kernel

    dweight = x.new_zeros(dy.shape[1], x.shape[1]) if out is None else out
    for rows in _strips(dweight):
        whole = dweight[rows]
        sums = whole if _is_plain(whole) else wide(torch.zeros_like(whole)).contiguous()
        for samples in _pieces(len(x), max(dy.shape[1], x.shape[1])):
            args = (a[samples].contiguous() for a in (arg_max, arg_min))
            tensors = (_plain(dy[samples]), _plain(x[samples]), *args, sums, rows.start)
            _share(kernel, tensors, len(sums), dy[samples].numel() > _SHARED_SUMS)
        if sums is not whole:
            whole += sums
    return dweight


def sparse_winners(x: Tensor, values: Tensor, layout: Layout, *, absent: str = "zero") -> Winners:
    """x: (batch, n_in), values: (capacity, 1, 1)."""
    return _sparse_winners(x, values, layout, absent, None)


def count_sparse_selections(
    x: Tensor, values: Tensor, layout: Layout, counts: Tensor, *, absent: str = "zero"
) -> None:
    """counts: int32 (capacity,), in place."""
    for samples in _pieces(len(x), max(1, layout.n_out)):
        _sparse_winners(x[samples], values, layout, absent, counts)


def _sparse_winners(
    x: Tensor, values: Tensor, layout: Layout, absent: str, counts: Tensor | None
) -> Winners:
    from triton_kernels.mam_numba import sparse_forward

    found, index = _empty(x, layout.n_out), layout[:3]
    zeros = torch.full((layout.n_out,), layout.n_in)
    if absent == "zero":
        zeros = _kept.get(index[:2], "first absent", lambda: first_absent(*index[:2]))
    if counts is None:
        counts = torch.empty(0, dtype=torch.int32)
    weights = _alive(values, layout)
    for samples in _pieces(*x.shape):
        own, part = _plain(x[samples]), [t[samples] for t in found]
        vectors, tiled = _tiles(own)
        tensors = (tiled, own, weights, *index, zeros, counts, *part)
        work = len(own) * weights.numel()
        _share(sparse_forward(vectors), tensors, layout.n_out, work > _SHARED_PRODUCTS)
    return found._replace(values=found.values.to(x.dtype))


def sparse_input_gradient(
    dy: Tensor, values: Tensor, layout: Layout, arg_max: Tensor, arg_min: Tensor
) -> Tensor:
    """dy: (batch, n_out), args: positions, or -1 -> (batch, n_in)."""
    from triton_kernels.mam_numba import sparse_input_gradient as kernel

    dx, weights = dy.new_empty(len(dy), layout.n_in), _alive(values, layout)
    for samples in _pieces(len(dy), max(dy.shape[1], layout.n_in)):
        slopes, args = _plain(dy[samples]), [a[samples].contiguous() for a in (arg_max, arg_min)]
        sums = slopes.new_zeros(len(slopes), layout.n_in)
        tensors = (slopes, weights, layout.cols, *args, sums)
        _share(kernel, tensors, len(sums), slopes.numel() > _SHARED_SUMS)
        dx[samples] = sums
    return dx


def sparse_weight_gradient(
    dy: Tensor, x: Tensor, layout: Layout, arg_max: Tensor, arg_min: Tensor, capacity: int
) -> Tensor:
    """dy: (batch, n_out), x: (batch, n_in) -> (capacity, 1, 1), free slots zero."""
    from triton_kernels.mam_numba import sparse_weight_gradient as kernel

    sums = wide(x.new_empty(0)).new_zeros(capacity)
    for samples in _pieces(len(x), max(dy.shape[1], x.shape[1])):
        args = (a[samples].contiguous() for a in (arg_max, arg_min))
        slopes, own = _plain(dy[samples]), _plain(x[samples])
        tensors = (slopes, own, layout.cols, layout.slots, *args, sums)
        _share(kernel, tensors, dy.shape[1], slopes.numel() > _SHARED_SUMS)
    return sums.to(x.dtype).view(-1, 1, 1)


def _alive(values: Tensor, layout: Layout) -> Tensor:
    """(alive,), in the layout's row order."""
    return wide(values.reshape(-1).index_select(0, layout.slots))


def _empty(x: Tensor, n_out: int) -> Winners:
    """Values in the precision in which they are compared."""
    index = torch.empty(len(x), n_out, dtype=torch.int32)
    return Winners(wide(x.new_empty(0)).new_empty(index.shape), index, torch.empty_like(index))


def _plain(x: Tensor) -> Tensor:
    """What a kernel reads: contiguous, single precision at least. A copy only where needed."""
    return wide(x).contiguous()


def _is_plain(x: Tensor) -> bool:
    return x.is_contiguous() and x.dtype in (torch.float32, torch.float64)


def _tiles(x: Tensor) -> tuple[int, Tensor]:
    """(batch, n) -> vectors of 16 numbers in a tile of the batch, and (tiles, n, batch in a tile),
    zero-padded. Wider tiles would not stay in the registers of a processor without AVX-512."""
    vectors = 1 if len(x) <= 16 else 2
    whole, rest = divmod(len(x), 16 * vectors)
    tiled = x.new_zeros(whole + (rest > 0), x.shape[1], 16 * vectors)
    tiled[:whole] = x[: len(x) - rest].unflatten(0, (whole, 16 * vectors)).transpose(1, 2)
    if rest:
        tiled[whole, :, :rest] = x[len(x) - rest :].T
    return vectors, tiled


def _strips(x: Tensor) -> Iterator[slice]:
    """Rows that need not be copied at once; in pieces where they must be."""
    if _is_plain(x):
        yield slice(0, len(x))
    else:
        yield from _pieces(*x.shape)


def _pieces(count: int, width: int) -> Iterator[slice]:
    """Of ``count`` rows, so many at a time that no more than ``_PIECE`` numbers are copied, but
    enough of them to fill a vector."""
    step = max(64, _PIECE // width)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _share(
    kernel: Callable[..., None], arguments: Sequence[Tensor | int], count: int, worth: bool
) -> None:
    """Run a kernel on [0, count), cut in as many parts as PyTorch has threads where that is worth
    it."""
    parts = torch.get_num_threads() if worth else 1
    # Rows of weights run past the samples in pairs.
    cuts = [2 * round(count * i / parts / 2) for i in range(parts)]
    arrays = [a.detach().numpy() if isinstance(a, Tensor) else a for a in arguments]
    ends = [(a, b) for a, b in pairwise([*cuts, count]) if a < b]
    threads.run(kernel, arrays, ends)
