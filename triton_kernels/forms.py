"""Which implementation of the sparse products serves a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from triton_kernels import blocks, blocks_cpu, conv_cpu, csr, csr_cpu


class Form(NamedTuple):
    """The three products of a layer, with the arguments of those in ``blocks``, or, for a
    convolution, of those in ``conv_cpu``."""

    name: str
    forward: Callable[..., Tensor]
    input_gradient: Callable[..., Tensor]
    weight_gradient: Callable[..., Tensor]


_BLOCKS = Form("blocks", blocks.forward, blocks.input_gradient, blocks.weight_gradient)
_BLOCKS_CPU = Form(
    "blocks_cpu", blocks_cpu.forward, blocks_cpu.input_gradient, blocks_cpu.weight_gradient
)
_CSR = Form("csr", csr.product, csr.product, csr.weight_gradient)
_CSR_CPU = Form("csr_cpu", csr_cpu.product, csr_cpu.product, csr_cpu.weight_gradient)
_CONV_CPU = Form("conv_cpu", conv_cpu.forward, conv_cpu.input_gradient, conv_cpu.weight_gradient)


def linear_form(x: Tensor, block: tuple[int, int]) -> Form:
    """The fastest there is for activations like ``x`` and a weight in such blocks."""
    if tuple(block) == (1, 1):
        if csr_cpu.available(x):
            return _CSR_CPU
        return _CSR if csr.available(x.device) else _BLOCKS
    return _BLOCKS_CPU if blocks_cpu.available(x) else _BLOCKS


def conv_form(x: Tensor, block: tuple[int, int]) -> Form | None:
    """The same for a convolution; None where a scattered weight is the only way."""
    if tuple(block) == (1, 1):
        return None
    return _CONV_CPU if blocks_cpu.available(x) else None
