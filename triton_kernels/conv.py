"""The sparse convolution as a custom op with its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from triton_kernels import scatter_cpu, waiting
from triton_kernels.eager import eager, plain
from triton_kernels.forms import conv_form
from triton_kernels.layout import Layout, gather, scatter
from triton_kernels.linear import cast_for_autocast


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    layout: Layout,
    kernel_size: tuple[int, int],
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    compute: str = "dense",
) -> Tensor:
    """2-D convolution with a weight given by its alive blocks, columns in (kh, kw, C) order.

    x: (batch, C, H, W) or (C, H, W); values: (capacity, bh, bw); bias: (n_out,) or None. compute:
    ``sparse`` never forms the weight, where there is such a product for the tensors (see
    ``forms.conv_form``); else it is scattered, and again in backward unless it still waits there
    (``waiting``). Under autocast the operands are cast to its dtype.
    """
    if x.dim() not in (3, 4) or x.shape[-3] != layout.channels:
        raise ValueError(
            f"x {tuple(x.shape)} must be (batch, {layout.channels}, H, W) or without the batch"
        )
    x, values, bias = cast_for_autocast(x, values, bias)
    batched = x if x.dim() == 4 else x[None]
    geometry = (kernel_size, stride, padding, dilation)
    product = _eager if plain(batched, values) else _conv
    y = product(batched, values, *layout[:6], layout.n_out, *geometry, compute == "sparse")
    if bias is not None:
        # Its own memory: another tensor of the size of y would be written and read for nothing.
        y = y.add_(bias.view(-1, 1, 1))
    return y if x.dim() == 4 else y[0]


def _dense_weight(
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    n_out: int,
    kernel: Sequence[int],
) -> Tensor:
    """(n_out, C, kh, kw), in the memory order of ``x``."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if scatter_cpu.available(values, n_out * x.shape[1] * math.prod(kernel)):
        order = torch.channels_last if last else torch.contiguous_format
        shape = (n_out, x.shape[1], *kernel)
        weight = torch.empty(shape, dtype=values.dtype, memory_format=order)
        columns = weight.permute(0, 2, 3, 1).view(n_out, -1, x.shape[1])
        scatter_cpu.scatter(values, row_offsets, cols, slots, columns)
        return weight
    dense = scatter(values, row_offsets, cols, slots, n_out, kernel[0] * kernel[1], x.shape[1])
    weight = dense.view(n_out, kernel[0], kernel[1], x.shape[1]).permute(0, 3, 1, 2)
    # The (kh, kw, C) order in which it was scattered is channels-last. Left so beside an input that
    # is not, it would drag the rest of the network into that format.
    return weight if last else weight.contiguous()


def _forward(
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    col_offsets: Tensor,
    rows_t: Tensor,
    slots_t: Tensor,
    n_out: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    sparse: bool,
) -> Tensor:
    geometry = (kernel, stride, padding, dilation)
    form = conv_form(x, (values.shape[1], values.shape[2])) if sparse else None
    if form is not None:
        return form.forward(x, values, row_offsets, cols, slots, n_out, *geometry)
    index = row_offsets, cols, slots
    weight = _dense_weight(x, values, *index, n_out, kernel)
    # Only the gradient of x needs it again.
    if x.requires_grad and scatter_cpu.available(values, weight.numel()):
        waiting.keep(weight, weight.shape, values, index)
    return torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation)


_conv = torch.library.custom_op("sparsegrow::conv2d", _forward, mutates_args=())


@_conv.register_fake
def _(
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    col_offsets: Tensor,
    rows_t: Tensor,
    slots_t: Tensor,
    n_out: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    sparse: bool,
) -> Tensor:
    weight = x.new_empty(n_out, x.shape[1], *kernel)
    return torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation)


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
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    sparse: bool,
    need_x: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, dvalues); one that is not needed is empty."""
    capacity, bh, bw = values.shape
    geometry = (kernel, stride, padding, dilation)
    form = conv_form(x, (bh, bw)) if sparse else None
    if form is not None:
        dx, dvalues = x.new_empty(0), values.new_empty(0)
        if need_x:
            dx = form.input_gradient(dy, values, col_offsets, rows_t, slots_t, x, *geometry)
        if need_values:
            at = (row_offsets, cols, slots, capacity, (bh, bw))
            dvalues = form.weight_gradient(x, dy, *at, *geometry)
        return dx, dvalues
    index = row_offsets, cols, slots
    weight = waiting.take((dy.shape[1], x.shape[1], *kernel), values, index)
    if weight is None:
        weight = _dense_weight(x, values, *index, dy.shape[1], kernel)
    dx, dense, _ = torch.ops.aten.convolution_backward(
        dy,
        x,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        1,
        [need_x, need_values, False],
    )
    if not need_x:
        dx = x.new_empty(0)
    if not need_values:
        return dx, values.new_empty(0)
    dense = dense.permute(0, 2, 3, 1).flatten(1, 2)
    if scatter_cpu.available(values, dense.numel()):
        return dx, scatter_cpu.gather(dense, values, *index)
    return dx, gather(dense, *index, capacity, (bh, bw))


_conv_backward = torch.library.custom_op("sparsegrow::conv2d_backward", _gradients, mutates_args=())


@_conv_backward.register_fake
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
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    sparse: bool,
    need_x: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        values.new_empty(values.shape if need_values else (0,)),
    )


def _setup(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Any, ...], output: Tensor
) -> None:
    *tensors, _, kernel, stride, padding, dilation, sparse = inputs
    ctx.save_for_backward(*tensors)
    ctx.geometry = (kernel, stride, padding, dilation, sparse)  # type: ignore[attr-defined]


def _backward(
    ctx: torch.autograd.function.FunctionCtx,
    dy: Tensor,
    gradients: Callable[..., tuple[Tensor, Tensor]] = _conv_backward,
) -> tuple[Tensor | None, ...]:
    need_x, need_values = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
    dx, dvalues = gradients(
        dy,
        *ctx.saved_tensors,  # type: ignore[attr-defined]
        *ctx.geometry,  # type: ignore[attr-defined]
        need_x,
        need_values,
    )
    return (dx if need_x else None, dvalues if need_values else None, *[None] * 12)


_conv.register_autograd(_backward, setup_context=_setup)
_eager = eager(_forward, _setup, partial(_backward, gradients=_gradients))
