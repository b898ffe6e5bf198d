"""The sparse linear product as a custom op with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from triton_kernels import scatter_cpu, scattered_cpu
from triton_kernels.eager import eager, plain
from triton_kernels.forms import linear_form
from triton_kernels.layout import Layout, gather, scatter


def sparse_linear(
    x: Tensor, values: Tensor, layout: Layout, bias: Tensor | None = None, *, compute: str = "dense"
) -> Tensor:
    """x W^T + bias with W given by its alive blocks.

    x: (..., n_in); values: (capacity, bh, bw); bias: (n_out,) or None. Returns (..., n_out).
    compute: ``sparse`` never forms W; ``dense`` scatters it for the product, and again in backward
    unless it still waits there (``scattered_cpu``). Under autocast both operands are cast to its
    dtype.
    """
    if x.shape[-1] != layout.n_in:
        raise ValueError(f"x has {x.shape[-1]} features, but the weight has {layout.n_in} inputs")
    x, values, bias = cast_for_autocast(x, values, bias)
    flat = x.reshape(-1, layout.n_in)
    product = _eager if plain(flat, values) else _linear
    y = product(flat, values, bias, *layout[:6], layout.n_out, compute == "sparse")
    return y.view(*x.shape[:-1], layout.n_out)


def cast_for_autocast(
    x: Tensor, values: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What ``F.linear`` does under autocast, which leaves float64 alone; outside of it, the tensors
    as they are."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, values, bias
    dtype = torch.get_autocast_dtype(kind)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return cast(x), cast(values), None if bias is None else cast(bias)


def _forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    col_offsets: Tensor,
    rows_t: Tensor,
    slots_t: Tensor,
    n_out: int,
    sparse: bool,
) -> Tensor:
    if sparse:
        form = linear_form(x, (values.shape[1], values.shape[2]))
        if form.takes_bias:
            return form.forward(x, values, row_offsets, cols, slots, n_out, bias)
        y = form.forward(x, values, row_offsets, cols, slots, n_out).contiguous()
    elif scatter_cpu.available(values, n_out * x.shape[1]):
        return scattered_cpu.forward(x, values, row_offsets, cols, slots, n_out, bias)
    else:
        weight = scatter(values, row_offsets, cols, slots, n_out, 1, x.shape[1])
        y = x @ weight.view(n_out, -1).T
    # Its own memory: another tensor of the size of y would be written and read for nothing.
    return y if bias is None else y.add_(bias)


_linear = torch.library.custom_op("sparsegrow::linear", _forward, mutates_args=())


@_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    col_offsets: Tensor,
    rows_t: Tensor,
    slots_t: Tensor,
    n_out: int,
    sparse: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], n_out)


def _gradients(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    col_offsets: Tensor,
    rows_t: Tensor,
    slots_t: Tensor,
    sparse: bool,
    need_x: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, dvalues); one that is not needed is empty."""
    dx, dvalues = x.new_empty(0), values.new_empty(0)
    capacity, bh, bw = values.shape
    if not sparse and scatter_cpu.available(values, dy.shape[1] * x.shape[1]):
        index = row_offsets, cols, slots
        dx, dvalues = scattered_cpu.backward(dy, x, values, *index, need_x, need_values)
    elif not sparse:
        if need_x:
            weight = scatter(values, row_offsets, cols, slots, dy.shape[1], 1, x.shape[1])
            dx = dy @ weight.view(dy.shape[1], -1)
        if need_values:
            dense = (dy.T @ x).view(dy.shape[1], 1, x.shape[1])
            dvalues = gather(dense, row_offsets, cols, slots, capacity, (bh, bw))
    else:
        form = linear_form(x, (bh, bw))
        if need_x and need_values and form.gradients is not None:
            return form.gradients(x, dy, values, col_offsets, rows_t, slots_t)
        if need_x:
            dx = form.input_gradient(dy, values, col_offsets, rows_t, slots_t, x.shape[1])
        if need_values:
            dvalues = form.weight_gradient(x, dy, row_offsets, cols, slots, capacity, (bh, bw))
    return dx.contiguous(), dvalues


_linear_backward = torch.library.custom_op(
    "sparsegrow::linear_backward", _gradients, mutates_args=()
)


@_linear_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    col_offsets: Tensor,
    rows_t: Tensor,
    slots_t: Tensor,
    sparse: bool,
    need_x: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        values.new_empty(values.shape if need_values else (0,)),
    )


def _setup(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Any, ...], output: Tensor
) -> None:
    x, values, _, *layout, _, ctx.sparse = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(x, values, *layout)


def _backward(
    ctx: torch.autograd.function.FunctionCtx,
    dy: Tensor,
    gradients: Callable[..., tuple[Tensor, Tensor]] = _linear_backward,
) -> tuple[Tensor | None, ...]:
    need_x, need_values, need_bias = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
    dbias = dy.sum(0) if need_bias else None
    if not need_x and not need_values:
        return (None, None, dbias, *[None] * 8)
    dx, dvalues = gradients(
        dy.contiguous(),
        *ctx.saved_tensors,  # type: ignore[attr-defined]
        ctx.sparse,  # type: ignore[attr-defined]
        need_x,
        need_values,
    )
    return (dx if need_x else None, dvalues if need_values else None, dbias, *[None] * 8)


_linear.register_autograd(_backward, setup_context=_setup)


_eager = eager(_forward, _setup, partial(_backward, gradients=_gradients))
