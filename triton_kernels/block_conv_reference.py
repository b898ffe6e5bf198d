"""What ``block_conv`` computes, written plainly: for every alive block, a window of the input.

Any device and dtype; reads the metadata back to the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


class _Block(NamedTuple):
    """An alive block: outputs, channels, and the padded input's rows and columns under its tap."""

    slot: int
    out: slice
    channels: slice
    window: tuple[slice, slice]


def _blocks(
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    block: Pair,
    channels: int,
    size: Sequence[int],
    kernel: Pair,
    stride: Pair,
    dilation: Pair,
) -> Iterator[_Block]:
    """size: of the output, (H', W')."""
    across = -(-channels // block[1])
    offsets, columns, places = row_offsets.tolist(), cols.tolist(), slots.tolist()
    for row in range(len(offsets) - 1):
        for entry in range(offsets[row], offsets[row + 1]):
            tap, part = divmod(columns[entry], across)
            start = [at * step for at, step in zip(divmod(tap, kernel[1]), dilation, strict=True)]
            window = [
                slice(begin, begin + (count - 1) * step + 1, step)
                for begin, count, step in zip(start, size, stride, strict=True)
            ]
            yield _Block(
                places[entry],
                slice(row * block[0], (row + 1) * block[0]),
                slice(part * block[1], (part + 1) * block[1]),
                (window[0], window[1]),
            )


def _padded(x: Tensor, channels: int, padding: Pair) -> Tensor:
    """Zeros around the image, and up to whole blocks of channels."""
    return F.pad(x, (padding[1], padding[1], padding[0], padding[0], 0, -x.shape[1] % channels))


def output_size(x_shape: Sequence[int], kernel: Pair, *how: Pair) -> Pair:
    """(H', W') of a convolution; how: stride, padding and dilation."""
    stride, padding, dilation = how
    height, width = (
        (size + 2 * pad - spread * (taps - 1) - 1) // step + 1
        for size, taps, step, pad, spread in zip(
            x_shape[2:], kernel, stride, padding, dilation, strict=True
        )
    )
    return height, width


def forward(
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    n_out: int,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    bias: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """x: (batch, C, H, W) -> (batch, n_out, H', W')."""
    bh, bw = values.shape[1:]
    size = output_size(x.shape, kernel, stride, padding, dilation)
    rows = row_offsets.numel() - 1
    y = x.new_zeros(x.shape[0], rows * bh, *size)
    wide = _padded(x, bw, padding)
    for slot, out, channels, (down, across) in _blocks(
        row_offsets, cols, slots, (bh, bw), x.shape[1], size, kernel, stride, dilation
    ):
        window = wide[:, channels, down, across]
        y[:, out] += torch.einsum("nchw,oc->nohw", window, values[slot])
    y = y[:, :n_out]
    if bias is not None:
        y = y + bias.view(-1, 1, 1)
    return y.relu() if relu else y


def input_gradient(
    dy: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    x_shape: tuple[int, int, int, int],
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    """dy: (batch, n_out, H', W') -> (batch, C, H, W). Walks the blocks by row, where the kernel
    walks them by column."""
    bh, bw = values.shape[1:]
    batch, n_in, height, width = x_shape
    wide = _padded(dy.new_zeros(x_shape), bw, padding)
    dy = F.pad(dy, (0, 0, 0, 0, 0, -dy.shape[1] % bh))
    for slot, out, channels, (down, across) in _blocks(
        row_offsets, cols, slots, (bh, bw), n_in, dy.shape[2:], kernel, stride, dilation
    ):
        part = torch.einsum("nohw,oc->nchw", dy[:, out], values[slot])
        wide[:, channels, down, across] += part
    top, left = padding
    return wide[:, :n_in, top : top + height, left : left + width]


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    capacity: int,
    block: Pair,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    """x: (batch, C, H, W), dy: (batch, n_out, H', W') -> (capacity, bh, bw), free slots zero."""
    grad = x.new_zeros(capacity, *block)
    wide = _padded(x, block[1], padding)
    dy = F.pad(dy, (0, 0, 0, 0, 0, -dy.shape[1] % block[0]))
    for slot, out, channels, (down, across) in _blocks(
        row_offsets, cols, slots, block, x.shape[1], dy.shape[2:], kernel, stride, dilation
    ):
        window = wide[:, channels, down, across]
        grad[slot] = torch.einsum("nohw,nchw->oc", dy[:, out], window)
    return grad
