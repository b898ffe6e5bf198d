"""Block-sparse convolutions on the CPU, without unfolding: the linear products of shifted planes.

An image is laid out channels last with its padding, positions in one row after the other. Then the
input of a kernel's tap, at all positions at once, is the same memory some rows further on, and a
block at one tap is one product of matrices. What falls between two rows of positions is computed
and dropped (in backward: multiplied by zero). A stride cuts the image into as many phases, each of
which is convolved with stride 1. See ``triton_kernels.waves`` for how the products are ordered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from triton_kernels import blas
from triton_kernels.blas import Matrices
from triton_kernels.blocks_cpu import wide
from triton_kernels.waves import Index, add_products, blocks_of, waves_of

# Positions that are copied and multiplied at a time: whole images, at least one.
POSITIONS = 2048


class Geometry(NamedTuple):
    """Where a convolution's positions lie. size, out: height and width of its input and output;
    kernel, stride, padding, dilation: down and across."""

    channels: int
    size: tuple[int, int]
    out: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(
        cls,
        x_shape: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Geometry:
        size = (x_shape[2], x_shape[3])
        out = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
        )
        if min(out) < 1:
            raise ValueError(
                f"an input of {size[0]} x {size[1]} is too small for kernel {tuple(kernel)}, "
                f"padding {tuple(padding)} and dilation {tuple(dilation)}"
            )
        pairs = (tuple(pair) for pair in (out, kernel, stride, padding, dilation))
        return cls(x_shape[1], size, *pairs)  # type: ignore[arg-type]

    @property
    def phase(self) -> tuple[int, int]:
        """Height and width of a phase, padding included."""
        high, across = (
            -(-(n + 2 * p) // s)
            for n, p, s in zip(self.size, self.padding, self.stride, strict=True)
        )
        return high, across

    @property
    def positions(self) -> int:
        """Of an image, in each phase."""
        return self.phase[0] * self.phase[1]

    @property
    def images(self) -> int:
        """How many are multiplied at a time."""
        return max(1, POSITIONS // max(1, self.positions))

    def taps(self) -> tuple[Index, Index]:
        """(phase, positions further on) of each tap."""
        high, across = (np.arange(k) * d for k, d in zip(self.kernel, self.dilation, strict=True))
        phase = (high % self.stride[0])[:, None] * self.stride[1] + across % self.stride[1]
        shift = (high // self.stride[0])[:, None] * self.phase[1] + across // self.stride[1]
        return phase.ravel(), shift.ravel()


def forward(
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    n_out: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """x: (batch, C, H, W) -> (batch, n_out, H', W'), in the memory order of ``x``."""
    bh, bw = values.shape[1:]
    geometry = Geometry.of(x.shape, kernel, stride, padding, dilation)
    order = row_offsets, cols, slots
    blocks = blocks_of(*order)
    n_rows = row_offsets.numel() - 1
    turns = waves_of(order, "linear", lambda: (blocks.major, n_rows))
    weight = Matrices(values.to(wide(values.dtype)), blocks.slots * (bh * bw), bw, True)
    y = _like(x, (len(x), n_out, *geometry.out))
    for part in _images(len(x), geometry):
        source = _input_planes(x[part], bw, geometry)
        length = source.shape[1]
        sums = source.new_empty(n_rows, length, bh)
        if turns.empty.size:
            sums[torch.from_numpy(turns.empty)] = 0
        starts = _input_starts(blocks.minor, length, bw, geometry)
        add_products(
            source, starts, weight, sums, blocks.major * (length * bh), turns, (length, bw, bh)
        )
        _crop(sums, y[part], geometry)
    return y


def input_gradient(
    dy: Tensor,
    values: Tensor,
    col_offsets: Tensor,
    rows_t: Tensor,
    slots_t: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """dy: (batch, n_out, H', W') -> (batch, C, H, W), in the memory order of ``x``."""
    bh, bw = values.shape[1:]
    geometry = Geometry.of(x.shape, kernel, stride, padding, dilation)
    order = col_offsets, rows_t, slots_t
    blocks = blocks_of(*order)
    phases, width = geometry.stride[0] * geometry.stride[1], -(-geometry.channels // bw)
    # All taps that see a phase add to it.
    phase, shift = (of[blocks.major // width] for of in geometry.taps())
    target = phase * width + blocks.major % width
    key = (*geometry.kernel, *geometry.stride, *geometry.dilation)
    turns = waves_of(order, key, lambda: (target, phases * width))
    weight = Matrices(values.to(wide(values.dtype)), blocks.slots * (bh * bw), bw)
    dx = _like(x, x.shape)
    # A tap that looks ahead in forward looks back here, at the first position beyond the planes.
    front = int(geometry.taps()[1].max())
    for part in _images(len(x), geometry):
        source = _output_planes(dy[part], bh, geometry, front)
        length = len(dy[part]) * geometry.positions
        sums = source.new_empty(phases * width, length, bw)
        if turns.empty.size:
            sums[torch.from_numpy(turns.empty)] = 0
        starts = (front + blocks.minor * length - shift) * bh
        add_products(source, starts, weight, sums, target * (length * bw), turns, (length, bh, bw))
        _image(sums, dx[part], geometry)
    return dx


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    capacity: int,
    block: tuple[int, int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """At the alive blocks alone: (capacity, bh, bw), free slots zero."""
    bh, bw = block
    geometry = Geometry.of(x.shape, kernel, stride, padding, dilation)
    blocks = blocks_of(row_offsets, cols, slots)
    grad = torch.zeros(capacity, bh, bw, dtype=wide(x.dtype))
    for part in _images(len(x), geometry):
        left = _output_planes(dy[part], bh, geometry, 0)
        right = _input_planes(x[part], bw, geometry)
        length = right.shape[1]
        blas.multiply(
            Matrices(left, blocks.major * (length * bh), bh, transposed=True),
            Matrices(right, _input_starts(blocks.minor, length, bw, geometry), bw),
            Matrices(grad, blocks.slots * (bh * bw), bw),
            (bh, bw, length),
            [cols.numel()],
            add=True,
        )
    return grad.to(x.dtype)


def _images(batch: int, geometry: Geometry) -> list[slice]:
    step = geometry.images
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def _like(x: Tensor, shape: Sequence[int]) -> Tensor:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    order = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=x.dtype, memory_format=order)


def _input_starts(cols: Index, length: int, bw: int, geometry: Geometry) -> Index:
    """Where what each block column sees begins, in the planes of the input."""
    width = -(-geometry.channels // bw)
    phase, shift = geometry.taps()
    tap = cols // width
    return ((phase[tap] * width + cols % width) * length + shift[tap]) * bw


def _input_planes(x: Tensor, bw: int, geometry: Geometry) -> Tensor:
    """(images, C, H, W) -> (phases * channel blocks, positions, bw), with as much zero memory
    behind them as the last tap looks ahead."""
    width, (high, across) = -(-geometry.channels // bw), geometry.phase
    (sh, sw), (ph, pw) = geometry.stride, geometry.padding
    size = sh * sw * width * len(x) * high * across * bw
    memory = torch.zeros(size + int(geometry.taps()[1].max()) * bw, dtype=wide(x.dtype))
    out = memory[:size].view(sh, sw, width, len(x), high, across, bw)
    whole = geometry.channels // bw
    for i in range(sh):
        for j in range(sw):
            # Rows and columns of the image that belong to the phase, and where they lie in it.
            rows, top = _phase(i, sh, ph, geometry.size[0])
            columns, left = _phase(j, sw, pw, geometry.size[1])
            seen = x[:, :, rows, columns]
            inside = out[i, j, :, :, top : top + seen.shape[2], left : left + seen.shape[3]]
            _to_blocks(seen, inside, whole, bw)
    return out.view(sh * sw * width, -1, bw)


def _phase(phase: int, stride: int, padding: int, size: int) -> tuple[slice, int]:
    """The positions of an image whose padded place is ``phase`` modulo the stride, and where in the
    phase the first of them lies."""
    first = (phase - padding) % stride
    return slice(first, size, stride), (first + padding) // stride


def _to_blocks(image: Tensor, out: Tensor, whole: int, width: int) -> None:
    """image: (images, C, h, w) -> out: (blocks, images, h, w, width), of which only the channels
    that exist are written."""
    inside = image[:, : whole * width].unflatten(1, (whole, width)).permute(1, 0, 3, 4, 2)
    out[:whole].copy_(inside)
    if image.shape[1] > whole * width:
        rest = image[:, whole * width :]
        out[whole, ..., : rest.shape[1]] = rest.permute(0, 2, 3, 1)


def _output_planes(dy: Tensor, bh: int, geometry: Geometry, front: int) -> Tensor:
    """(images, n_out, H', W') -> zeros, ``front`` rows of them, and (row blocks * positions, bh):
    zero where a position is no output's."""
    (high, across), (out_high, out_across) = geometry.phase, geometry.out
    blocks = -(-dy.shape[1] // bh)
    memory = torch.zeros(front + blocks * len(dy) * high * across, bh, dtype=wide(dy.dtype))
    out = memory[front:].view(blocks, len(dy), high, across, bh)
    _to_blocks(dy, out[:, :, :out_high, :out_across], dy.shape[1] // bh, bh)
    return memory


def _crop(sums: Tensor, y: Tensor, geometry: Geometry) -> None:
    """(row blocks, positions, bh) -> y: (images, n_out, H', W')."""
    high, across = geometry.out
    planes = sums.view(len(sums), len(y), *geometry.phase, sums.shape[2])
    _from_blocks(planes[:, :, :high, :across], y)


def _image(sums: Tensor, dx: Tensor, geometry: Geometry) -> None:
    """(phases * channel blocks, positions, bw) -> dx: (images, C, H, W)."""
    (sh, sw), (ph, pw) = geometry.stride, geometry.padding
    planes = sums.view(sh, sw, -1, len(dx), *geometry.phase, sums.shape[2])
    for i in range(sh):
        for j in range(sw):
            rows, top = _phase(i, sh, ph, geometry.size[0])
            columns, left = _phase(j, sw, pw, geometry.size[1])
            part = dx[:, :, rows, columns]
            high, across = part.shape[2:]
            _from_blocks(planes[i, j][:, :, top : top + high, left : left + across], part)


def _from_blocks(planes: Tensor, image: Tensor) -> None:
    """planes: (blocks, images, h, w, width) -> image: (images, C, h, w)."""
    width = planes.shape[4]
    whole, rest = divmod(image.shape[1], width)
    inside = planes[:whole].permute(1, 0, 4, 2, 3)
    image[:, : whole * width].unflatten(1, (whole, width)).copy_(inside)
    if rest:
        image[:, whole * width :].copy_(planes[whole, ..., :rest].permute(0, 3, 1, 2))
