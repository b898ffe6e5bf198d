"""Sparse products over a topology that changes: plain functions on tensors.

Every product is a custom op with its gradient and a fake, so that ``torch.compile`` and autocast
work. Imports without triton; what launches a kernel imports it there.
"""

from triton_kernels.conv import sparse_conv2d
from triton_kernels.costs import COMPUTE
from triton_kernels.layout import Layout, gather, scatter
from triton_kernels.linear import sparse_linear

__all__ = [
    "COMPUTE",
    "Layout",
    "gather",
    "scatter",
    "sparse_conv2d",
    "sparse_linear",
]
