"""Unstructured products on a GPU: the functions of :mod:`triton_kernels.csr` as kernels.

A program holds one row and a tile of the batch. Activations are copied feature-major first, so that
whatever feature an entry names, its samples lie one after another. Sums are float32, whatever the
dtype, and always in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triton_kernels.require import interpreting, require_triton

# The batch is padded to whole vectors of loads, and Triton knows it.
ALIGNED = 16
# Programs of the weight gradient: enough for the largest GPU where rows are few.
WEIGHT_PROGRAMS = 2048


class Launch(NamedTuple):
    """How a kernel is compiled: samples and entries a program reads at once; its warps."""

    tile: int
    step: int
    num_warps: int


def choose_launch(kernel: str, batch: int, dtype: torch.dtype) -> Launch:
    """kernel: ``product`` or ``weight_gradient``. A lane reads 16 bytes of one feature at a time.

    The gradient's programs are one warp each: its sums run along the lanes, and between warps they
    would go through shared memory at every step.
    """
    widest = 128 if dtype == torch.float32 else 256
    tile = min(widest, 1 << max(4, (batch - 1).bit_length()))
    return Launch(tile, 16, 4) if kernel == "product" else Launch(tile, 8, 1)


@torch.no_grad()
def product(
    x: Tensor, values: Tensor, offsets: Tensor, index: Tensor, slots: Tensor, width: int
) -> Tensor:
    """x: (batch, n), any strides -> (batch, width) = x M^T, where M: (width, n) is given by its
    compressed rows and ``values[slots]``. With the transposed order of a weight, its input
    gradient.

    float32, float16 or bfloat16. Free slots are never read.
    """
    require_triton("the unstructured product on a GPU")
    from triton_kernels.csr_kernel import csr_product_kernel

    _check(x, values)
    if offsets.numel() != width + 1:
        raise ValueError(f"{offsets.numel()} offsets do not give {width} rows: {width + 1} do")
    features = _feature_major(x)
    padded = features.shape[1]
    y = torch.empty(width, padded, dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        launch = choose_launch("product", padded, x.dtype)
        with torch.cuda.device_of(x):
            csr_product_kernel[(width * -(-padded // launch.tile),)](
                features,
                values.contiguous(),
                offsets,
                index,
                slots,
                y,
                padded,
                width,
                TILE=launch.tile,
                STEP=launch.step,
                num_warps=launch.num_warps,
                enable_fp_fusion=True,
            )
    return y[:, : x.shape[0]].T.contiguous()


@torch.no_grad()
def weight_gradient(
    x: Tensor,
    dy: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    capacity: int,
    block: tuple[int, int] = (1, 1),
) -> Tensor:
    """x: (batch, n_in), dy: (batch, n_out), any strides -> (capacity, 1, 1): dy^T x at the alive
    entries, free slots zero. block: no other than (1, 1)."""
    require_triton("the unstructured product on a GPU")
    from triton_kernels.csr_kernel import csr_weight_gradient_kernel

    _check(x, dy)
    if dy.dim() != 2 or x.shape[0] != dy.shape[0] or row_offsets.numel() != dy.shape[1] + 1:
        raise ValueError(
            f"dy {tuple(dy.shape)} must be ({x.shape[0]}, {row_offsets.numel() - 1}): the samples "
            "of x, the rows of the weight"
        )
    grad = x.new_zeros(capacity, *block)
    if cols.numel() == 0 or x.shape[0] == 0:
        return grad
    features = _feature_major(x)
    launch = choose_launch("weight_gradient", features.shape[1], x.dtype)
    rows = dy.shape[1]
    steps = -(-cols.numel() // (rows * launch.step))
    parts = min(steps, -(-WEIGHT_PROGRAMS // rows))
    with torch.cuda.device_of(x):
        csr_weight_gradient_kernel[(rows * parts,)](
            features,
            _feature_major(dy),
            row_offsets,
            cols,
            slots,
            grad,
            features.shape[1],
            rows,
            parts,
            TILE=launch.tile,
            STEP=launch.step,
            num_warps=launch.num_warps,
            enable_fp_fusion=True,
        )
    return grad


def _feature_major(x: Tensor) -> Tensor:
    """(batch, features) -> (features, padded batch), contiguous, zero where padded."""
    batch, features = x.shape
    copy = x.new_zeros(features, -(-batch // ALIGNED) * ALIGNED)
    copy[:, :batch] = x.T
    return copy


def _check(x: Tensor, other: Tensor) -> None:
    """Refuse what no kernel computes; other: values or dy."""
    if x.dim() != 2:
        raise ValueError(f"activations {tuple(x.shape)} must be (batch, features)")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or x.dtype != other.dtype:
        raise ValueError(
            "activations and weights must both be float32, float16 or bfloat16, not "
            f"{x.dtype} and {other.dtype}"
        )
    if x.device != other.device or not (x.is_cuda or interpreting()):
        raise ValueError(
            f"tensors on {x.device} and {other.device} cannot be multiplied by a GPU kernel: move "
            "them to one GPU"
        )
