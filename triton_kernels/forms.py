"""Which implementation of the sparse products serves a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from triton_kernels import (
    block_conv,
    block_sparse,
    blocks,
    blocks_cpu,
    blocks_tiles,
    conv_cpu,
    csr,
    csr_cpu,
    csr_gpu,
)
from triton_kernels.waves import Memory


class Form(NamedTuple):
    """The three products of a layer, with the arguments of those in ``blocks``, or, for a
    convolution, of those in ``conv_cpu``. takes_bias: whether the forward one takes it as well.
    gradients: those of a linear layer at once, where that is faster: see ``csr_cpu.gradients``."""

    name: str
    forward: Callable[..., Tensor]
    input_gradient: Callable[..., Tensor]
    weight_gradient: Callable[..., Tensor]
    takes_bias: bool = False
    gradients: Callable[..., tuple[Tensor, Tensor]] | None = None


def linear_form(x: Tensor, block: tuple[int, int]) -> Form:
    """The fastest there is for activations like ``x`` and a weight in such blocks."""
    single = tuple(block) == (1, 1)
    if x.is_cuda and _triton() and single and x.dtype in block_sparse.DTYPES:
        return CSR_GPU
    if x.is_cuda and _triton() and block_sparse.supports(block, x.dtype):
        return BLOCKS_GPU
    if csr_cpu.available(x, (block[0], block[1])):
        return CSR_CPU
    if single and csr.available(x.device):
        return CSR
    if blocks_tiles.available(x, block):
        return BLOCKS_TILES
    return BLOCKS_CPU if blocks_cpu.available(x) else BLOCKS


def conv_form(x: Tensor, block: tuple[int, int]) -> Form | None:
    """The same for a convolution; None where a scattered weight is the only way."""
    if x.is_cuda and _triton() and block_sparse.supports(block, x.dtype):
        return CONV_GPU
    return CONV_CPU if tuple(block) != (1, 1) and blocks_cpu.available(x) else None


@cache
def _triton() -> bool:
    return find_spec("triton") is not None


# In what order the input's gradient walks the blocks of a topology.
_orders = Memory()


def _conv_gpu_forward(x: Tensor, *args: object) -> Tensor:
    return _ordered_like(x, block_conv.forward(x, *args))  # type: ignore[arg-type]


def _conv_gpu_input_gradient(
    dy: Tensor,
    values: Tensor,
    col_offsets: Tensor,
    rows_t: Tensor,
    slots_t: Tensor,
    x: Tensor,
    *geometry: Sequence[int],
) -> Tensor:
    tensors = (col_offsets, rows_t, slots_t)
    how = tuple(tuple(pair) for pair in geometry)
    n_rows = -(-dy.shape[1] // values.shape[1])
    order = _orders.get(tensors, how, lambda: block_conv.input_order(*tensors, n_rows, *how))
    dx = block_conv.input_gradient(dy, values, *tensors, x.shape, *how, order=order)
    return _ordered_like(x, dx)


def _ordered_like(x: Tensor, y: Tensor) -> Tensor:
    """The kernels write channels-last: a copy where the network is not."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


BLOCKS = Form("blocks", blocks.forward, blocks.input_gradient, blocks.weight_gradient)
BLOCKS_CPU = Form(
    "blocks_cpu", blocks_cpu.forward, blocks_cpu.input_gradient, blocks_cpu.weight_gradient
)
BLOCKS_TILES = Form(
    "blocks_tiles",
    blocks_tiles.forward,
    blocks_tiles.input_gradient,
    blocks_tiles.weight_gradient,
    takes_bias=True,
)
BLOCKS_GPU = Form(
    "block_sparse",
    block_sparse.forward,
    block_sparse.input_gradient,
    block_sparse.weight_gradient,
    takes_bias=True,
)
CSR = Form("csr", csr.product, csr.product, csr.weight_gradient)
CSR_CPU = Form(
    "csr_cpu",
    csr_cpu.forward,
    csr_cpu.input_gradient,
    csr_cpu.weight_gradient,
    gradients=csr_cpu.gradients,
)
CSR_GPU = Form("csr_gpu", csr_gpu.product, csr_gpu.product, csr_gpu.weight_gradient)  # type: ignore[has-type]
CONV_CPU = Form("conv_cpu", conv_cpu.forward, conv_cpu.input_gradient, conv_cpu.weight_gradient)
CONV_GPU = Form(
    "block_conv",
    _conv_gpu_forward,
    _conv_gpu_input_gradient,
    block_conv.weight_gradient,  # type: ignore[has-type]
)
