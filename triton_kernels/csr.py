"""Unstructured products through PyTorch's CSR: the same three functions as ``blocks``, for block 1.

PyTorch's own autograd raises on CSR products on the CPU, so that the two gradients are written out
here. Half precision is computed in float32: its CSR products are not there on every device.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def _matrix(offsets: Tensor, index: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(offsets, index, values, shape, check_invariants=False)


def available(device: torch.device) -> bool:
    """PyTorch's CSR products on the CPU come with MKL alone."""
    return device.type != "cpu" or torch.backends.mkl.is_available()


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def product(
    x: Tensor, values: Tensor, offsets: Tensor, index: Tensor, slots: Tensor, width: int
) -> Tensor:
    """x: (batch, n) -> (batch, width) = x M^T, where M: (width, n) is given by its compressed rows
    and ``values[slots]``. With the transposed order of a weight, its input gradient."""
    alive = _wide(values.view(-1)[slots.long()])
    matrix = _matrix(offsets, index, alive, (width, x.shape[1]))
    # The body of a custom op still runs under autocast, which would narrow the operands again.
    with torch.autocast(x.device.type, enabled=False):
        return (matrix @ _wide(x).T).T.to(x.dtype).contiguous()


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    capacity: int,
    block: tuple[int, int] = (1, 1),
) -> Tensor:
    """dy^T x at the alive entries alone: (capacity, 1, 1), free slots zero."""
    shape = (dy.shape[1], x.shape[1])
    left, right = _wide(dy).T.contiguous(), _wide(x).contiguous()
    pattern = _matrix(row_offsets, cols, right.new_zeros(cols.numel()), shape)
    with torch.autocast(x.device.type, enabled=False):
        sampled = torch.sparse.sampled_addmm(pattern, left, right, beta=0.0).values()
    grad = x.new_zeros(capacity, 1, 1)
    grad.view(-1)[slots.long()] = sampled.to(x.dtype)
    return grad
