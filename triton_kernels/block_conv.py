"""Block-sparse convolution on a GPU as an implicit product: the input is read in place under halo
masks, never unfolded, and the weight never scattered.

Activations are channels-last: one that is not is copied into that order first, and results come in
it. Weights are as in :class:`triton_kernels.layout.Layout`, columns (kh, kw, C) in blocks of
channels at one tap. Sums are float32, whatever the dtype, and always in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_kernels import tuning
from triton_kernels.require import interpreting, require_triton

SIDES = (16, 32, 64, 128)
# Programs of the weight gradient: enough for the largest GPU.
WEIGHT_PROGRAMS = 512
# Positions for which a program of its own pays.
LEAST_CHUNK = 1024
# Rows of blocks among which a program looks for its group at a time.
SEARCHED = 256


class InputOrder(NamedTuple):
    """The alive blocks as the input's gradient walks them: by class of positions (those that are
    equal modulo the stride), block of channels, tap, and row.

    offsets: (classes * blocks of channels + 1,). tap_rows: (alive,), tap * rows + row. slots:
    (alive,). All int32.
    """

    offsets: Tensor
    tap_rows: Tensor
    slots: Tensor


def input_order(
    col_offsets: Tensor,
    rows_t: Tensor,
    slots_t: Tensor,
    n_rows: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> InputOrder:
    """Built on the device, without waiting for it; valid until the topology changes."""
    device, alive = col_offsets.device, rows_t.numel()
    taps, n_cols = kernel[0] * kernel[1], col_offsets.numel() - 1
    across = n_cols // taps
    tap = torch.arange(taps, device=device)
    # Input row h meets tap kh where h + padding - kh * dilation is a multiple of the stride.
    phase_h = (tap // kernel[1] * dilation[0] - padding[0]) % stride[0]
    phase_w = (tap % kernel[1] * dilation[1] - padding[1]) % stride[1]
    group = (phase_h * stride[1] + phase_w)[:, None] * across + torch.arange(across, device=device)
    group, columns = group.flatten().sort(stable=True)

    lengths = col_offsets.diff()[columns]
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    position = torch.arange(n_cols, device=device).repeat_interleave(lengths, output_size=alive)
    source = torch.arange(alive, device=device)
    source += (col_offsets[:-1][columns] - offsets[:-1])[position]
    tap_rows = (columns // across * n_rows)[position] + rows_t[source]
    groups = torch.arange(stride[0] * stride[1] * across + 1, device=device)
    offsets = offsets[torch.searchsorted(group, groups)]
    return InputOrder(offsets.int(), tap_rows.int(), slots_t[source].int())


@torch.no_grad()
def forward(
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    n_out: int,
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    bias: Tensor | None = None,
    relu: bool = False,
    *,
    tf32: bool = False,
) -> Tensor:
    """x: (batch, C, H, W), any strides -> (batch, n_out, H', W'), channels-last.

    values: (capacity, bh, bw), edge blocks padded with zeros, free slots never read; sides of 16,
    32, 64 or 128. bias: (n_out,) or None. float32, float16 or bfloat16. tf32: whether float32
    factors are rounded to it; sums are float32 in either case.
    """
    require_triton("the sparse convolution on a GPU")
    from triton_kernels.block_conv_kernel import conv_product_kernel

    block = (values.shape[1], values.shape[2])
    _check(x, values, block)
    _check_offsets(row_offsets, -(-n_out // block[0]))
    height, width = _output_size(x.shape, kernel, stride, padding, dilation)
    y = _empty_channels_last(x, (x.shape[0], n_out, height, width))
    if y.numel() == 0:
        return y
    x = _channels_last(x)
    positions = x.shape[0] * height * width
    launch = tuning.launch("conv_forward", block, x.dtype, positions, x.device)
    tiles = -(-positions // launch.tile_m)
    with torch.cuda.device_of(x):
        conv_product_kernel[(tiles * (row_offsets.numel() - 1),)](
            x,
            values.contiguous(),
            row_offsets,
            cols,
            slots,
            bias,
            y,
            *_image(x),
            height,
            width,
            height,
            width,
            n_out,
            **_constants(kernel, stride, padding, dilation, block, tf32),
            INPUT_GRADIENT=False,
            RELU=relu,
            TILE=launch.tile_m,
            STEP=launch.tile_k,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            enable_fp_fusion=True,
        )
    return y


@torch.no_grad()
def input_gradient(
    dy: Tensor,
    values: Tensor,
    col_offsets: Tensor,
    rows_t: Tensor,
    slots_t: Tensor,
    x_shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    *,
    order: InputOrder | None = None,
    tf32: bool = False,
) -> Tensor:
    """dy: (batch, n_out, H', W'), any strides -> (batch, C, H, W) = x_shape, channels-last.

    order: of :func:`input_order`; made here if None. The rest as for :func:`forward`.
    """
    require_triton("the sparse convolution on a GPU")
    from triton_kernels.block_conv_kernel import conv_product_kernel

    block = (values.shape[1], values.shape[2])
    _check(dy, values, block)
    _check_output(dy, x_shape, kernel, stride, padding, dilation)
    _check_offsets(col_offsets, kernel[0] * kernel[1] * -(-x_shape[1] // block[1]))
    dx = _empty_channels_last(dy, x_shape)
    if dx.numel() == 0:
        return dx
    if order is None:
        n_rows = -(-dy.shape[1] // block[0])
        order = input_order(col_offsets, rows_t, slots_t, n_rows, kernel, stride, padding, dilation)
    dy = _channels_last(dy)
    batch, channels, height, width = x_shape
    # Positions of a class, of the largest one.
    grid = (-(-height // stride[0]), -(-width // stride[1]))
    positions = batch * grid[0] * grid[1]
    launch = tuning.launch("conv_input_gradient", block, dy.dtype, positions, dy.device)
    tiles = stride[0] * stride[1] * -(-positions // launch.tile_m)
    with torch.cuda.device_of(dy):
        conv_product_kernel[(tiles * -(-channels // block[1]),)](
            dy,
            values.contiguous(),
            order.offsets,
            order.tap_rows,
            order.slots,
            None,
            dx,
            *_image(dy),
            *grid,
            height,
            width,
            channels,
            **_constants(kernel, stride, padding, dilation, block, tf32),
            INPUT_GRADIENT=True,
            RELU=False,
            TILE=launch.tile_m,
            STEP=launch.tile_k,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            enable_fp_fusion=True,
        )
    return dx


@torch.no_grad()
def weight_gradient(
    x: Tensor,
    dy: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    capacity: int,
    block: tuple[int, int],
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    *,
    tf32: bool = False,
) -> Tensor:
    """x: (batch, C, H, W), dy: (batch, n_out, H', W') -> (capacity, bh, bw): the gradient at the
    alive blocks, zero in free slots and in the padding of edge blocks.

    Positions are split among programs where there are few blocks, and their sums added up in order.
    """
    require_triton("the sparse convolution on a GPU")
    from triton_kernels.block_conv_kernel import conv_weight_gradient_kernel

    _check(x, dy, block)
    height, width = _check_output(dy, x.shape, kernel, stride, padding, dilation)
    _check_offsets(row_offsets, -(-dy.shape[1] // block[0]))
    positions = x.shape[0] * height * width
    if cols.numel() == 0 or positions == 0:
        return x.new_zeros(capacity, *block)
    x, flat = _channels_last(x), _positions(dy)
    launch = tuning.launch("conv_weight_gradient", block, x.dtype, positions, x.device)
    group = max(1, launch.tile_k // block[1])
    n_rows = row_offsets.numel() - 1
    groups = cols.numel() // group + n_rows
    chunks = min(-(-WEIGHT_PROGRAMS // groups), -(-positions // LEAST_CHUNK))
    chunk = -(-positions // (chunks * launch.tile_m)) * launch.tile_m
    chunks = -(-positions // chunk)
    dtype = x.dtype if chunks == 1 else torch.float32
    grad = torch.zeros(chunks, capacity, *block, dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        conv_weight_gradient_kernel[(groups, chunks)](
            x,
            flat,
            row_offsets,
            cols,
            slots,
            grad,
            *_image(x),
            height,
            width,
            dy.shape[1],
            flat.stride(0),
            n_rows,
            chunk,
            grad.stride(0),
            **_constants(kernel, stride, padding, dilation, block, tf32),
            GROUP=group,
            STEP=launch.tile_m,
            SEARCHED=SEARCHED,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            enable_fp_fusion=True,
        )
    return grad[0] if chunks == 1 else grad.sum(0).to(x.dtype)


def _constants(
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    block: tuple[int, int],
    tf32: bool,
) -> dict[str, int]:
    return {
        "KERNEL_W": kernel[1],
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PADDING_H": padding[0],
        "PADDING_W": padding[1],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
        "BH": block[0],
        "BW": block[1],
        "TF32": tf32,
    }


def _image(x: Tensor) -> tuple[int, ...]:
    """batch, height, width and channels, and the strides of the first three."""
    return (x.shape[0], *x.shape[2:], x.shape[1], x.stride(0), *x.stride()[2:])


def _channels_last(x: Tensor) -> Tensor:
    """With the channels of a position one after another, which any view may have."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _positions(x: Tensor) -> Tensor:
    """(positions of all images, channels), the channels one after another."""
    flat = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _empty_channels_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(
        tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _output_size(
    x_shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """(H', W'), refused where it would be empty."""
    height, width = (
        (size + 2 * pad - spread * (taps - 1) - 1) // step + 1
        for size, taps, step, pad, spread in zip(
            x_shape[2:], kernel, stride, padding, dilation, strict=True
        )
    )
    if height < 1 or width < 1:
        raise ValueError(
            f"x {tuple(x_shape)} is smaller than the kernel {kernel} with padding {padding} and "
            f"dilation {dilation}: give larger images or more padding"
        )
    return height, width


def _check(x: Tensor, other: Tensor, block: tuple[int, int]) -> None:
    """Refuse what no kernel computes; other: values or dy."""
    if x.dim() != 4:
        raise ValueError(f"activations {tuple(x.shape)} must be (batch, channels, height, width)")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or x.dtype != other.dtype:
        raise ValueError(
            "activations and weights must both be float32, float16 or bfloat16, not "
            f"{x.dtype} and {other.dtype}"
        )
    if block[0] not in SIDES or block[1] not in SIDES:
        raise ValueError(
            f"block {block} has no kernel: choose sides among {', '.join(map(str, SIDES))}"
        )
    if x.device != other.device or not (x.is_cuda or interpreting()):
        raise ValueError(
            f"tensors on {x.device} and {other.device} cannot be convolved by a GPU kernel: move "
            "them to one GPU"
        )


def _check_offsets(offsets: Tensor, count: int) -> None:
    """Refuse the metadata of another weight; count: of its rows, or columns, of blocks."""
    if offsets.numel() != count + 1:
        raise ValueError(
            f"{offsets.numel()} offsets are not those of a weight for these channels and taps: "
            f"{count + 1} are, one more than it has rows or columns of blocks"
        )


def _check_output(
    dy: Tensor,
    x_shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Refuse a gradient that is not of this convolution's output; its (H', W')."""
    size = _output_size(x_shape, kernel, stride, padding, dilation)
    if dy.dim() != 4 or dy.shape[0] != x_shape[0] or dy.shape[2:] != size:
        raise ValueError(
            f"dy {tuple(dy.shape)} must be ({x_shape[0]}, n_out, {size[0]}, {size[1]}), the output "
            f"of a convolution of {tuple(x_shape)}"
        )
    return size[0], size[1]
