"""Products with a block-sparse weight on a GPU: what ``blocks`` offers, with the same arguments.

Tensors are in the padded block units of :class:`triton_kernels.layout.Layout`, on a GPU; x, dy and
values in float32, float16 or bfloat16, all in the same. Sums are in float32, in a fixed order, so
that on one GPU the same input gives the same result bit for bit. tf32: use NVIDIA's tensor cores,
which round the operands of float32 products to 10 bits; without it they are exact and slow. Nothing
waits for the host.

Every function raises ValueError on arguments of the wrong kind, ImportError without triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels import tuning
from triton_kernels.require import interpreting, require_triton

SIDES = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A share of the batch with fewer samples would cost more to add up than it saves.
LEAST_SHARE = 512


def supports(block: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether there is a kernel: sides of 16, 32, 64 and 128, in float32 or half precision."""
    return block[0] in SIDES and block[1] in SIDES and dtype in DTYPES


def longest_first(offsets: Tensor) -> Tensor:
    """The rows (or columns) of most blocks first, int32: an ``order`` in which no long one starts
    last. Worth keeping for as long as the topology."""
    return offsets.diff().argsort(descending=True, stable=True).int()


def forward(
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    n_out: int,
    bias: Tensor | None = None,
    relu: bool = False,
    *,
    order: Tensor | None = None,
    tf32: bool = False,
) -> Tensor:
    """x: (batch, n_in) -> x W^T + bias, its negative entries 0 if ``relu``: (batch, n_out).

    bias: (n_out,), of any floating dtype. order: see :func:`longest_first`.
    """
    block = _block(values)
    return _product(
        "forward", x, values, block, row_offsets, cols, slots, n_out, bias, relu, order, tf32
    )


def input_gradient(
    dy: Tensor,
    values: Tensor,
    col_offsets: Tensor,
    rows_t: Tensor,
    slots_t: Tensor,
    n_in: int,
    *,
    order: Tensor | None = None,
    tf32: bool = False,
) -> Tensor:
    """dy: (batch, n_out) -> dy W: (batch, n_in), over the transposed order of the same values."""
    block = _block(values)
    return _product(
        "input_gradient",
        *(dy, values, block, col_offsets, rows_t, slots_t, n_in, None, False, order, tf32),
    )


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    capacity: int,
    block: tuple[int, int],
    *,
    shares: int | None = None,
    tf32: bool = False,
) -> Tensor:
    """dy^T x at the alive blocks alone: (capacity, bh, bw), free slots zero.

    shares: parts of the batch that are summed at the same time, then added in order, for few blocks
    and a long batch; each needs (capacity, bh, bw) floats of memory. None chooses.
    """
    require_triton("the block-sparse product on a GPU")
    _check(x, dy, block, row_offsets, cols, slots, dy.shape[-1], block[0])
    if dy.shape[0] != x.shape[0]:
        raise ValueError(f"x has {x.shape[0]} samples, but dy has {dy.shape[0]}")
    (batch, n_in), n_out = x.shape, dy.shape[1]
    if cols.numel() == 0 or batch == 0:
        return x.new_zeros(capacity, *block)
    from triton_kernels.block_sparse_kernel import weight_gradient_kernel

    x, dy = _rows(x), _rows(dy)
    tile_m, tile_k, num_warps, num_stages = tuning.launch(
        "weight_gradient", block, x.dtype, batch, x.device
    )
    group = tile_k // block[1]
    n_rows = row_offsets.numel() - 1
    programs = cols.numel() // group + n_rows
    if shares is None:
        shares = _shares(programs, batch, x.device)
    share = -(-batch // (shares * tile_m)) * tile_m
    # Memory that every program together fills need not be cleared first.
    allocate = x.new_empty if cols.numel() == capacity else x.new_zeros
    grad = allocate(shares, capacity, *block, dtype=x.dtype if shares == 1 else torch.float32)
    with torch.cuda.device_of(x):
        weight_gradient_kernel[(programs, shares)](
            x,
            dy,
            row_offsets,
            cols,
            slots,
            grad,
            batch,
            n_in,
            n_out,
            n_rows,
            share,
            n_rows.bit_length(),
            x.stride(0),
            dy.stride(0),
            grad.stride(0),
            TILE_M=tile_m,
            GROUP=group,
            BH=block[0],
            BW=block[1],
            TF32=tf32 and torch.version.hip is None,
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=True,
        )
    return grad[0] if shares == 1 else grad.sum(0).to(x.dtype)


def _product(
    kernel: str,
    x: Tensor,
    values: Tensor,
    block: tuple[int, int],
    offsets: Tensor,
    index: Tensor,
    slots: Tensor,
    n_out: int,
    bias: Tensor | None,
    relu: bool,
    order: Tensor | None,
    tf32: bool,
) -> Tensor:
    """x times the rows of blocks that offsets and index describe: (batch, n_out)."""
    require_triton("the block-sparse product on a GPU")
    from triton_kernels.block_sparse_kernel import product_kernel

    bh, bw = block
    transposed = kernel == "input_gradient"
    side_out, side_in = (bw, bh) if transposed else (bh, bw)
    _check(x, values, block, offsets, index, slots, n_out, side_out)
    if bias is not None and (bias.shape != (n_out,) or bias.device != x.device):
        raise ValueError(
            f"bias must be ({n_out},) on {x.device}, not {tuple(bias.shape)} on {bias.device}"
        )
    (batch, n_in), n_rows = x.shape, offsets.numel() - 1
    y = x.new_empty(batch, n_out)
    if y.numel() == 0:
        return y
    x = _rows(x)
    chosen = tuning.launch(kernel, block, x.dtype, batch, x.device)
    with torch.cuda.device_of(x):
        product_kernel[(n_rows * -(-batch // chosen.tile_m),)](
            x,
            values.contiguous(),
            offsets,
            index,
            slots,
            order,
            None if bias is None else bias.contiguous(),
            y,
            batch,
            n_in,
            n_out,
            n_rows,
            x.stride(0),
            y.stride(0),
            TILE_M=chosen.tile_m,
            TILE_K=chosen.tile_k,
            SIDE_OUT=side_out,
            SIDE_IN=side_in,
            STRIDE_OUT=1 if transposed else bw,
            STRIDE_IN=bw if transposed else 1,
            RELU=relu,
            TF32=tf32 and torch.version.hip is None,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            enable_fp_fusion=True,
        )
    return y


def _block(values: Tensor) -> tuple[int, int]:
    if values.dim() != 3:
        raise ValueError(f"values must be (capacity, bh, bw), not {tuple(values.shape)}")
    return values.shape[1], values.shape[2]


def _rows(x: Tensor) -> Tensor:
    """The same with its rows contiguous, whatever lies between them."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def _shares(programs: int, batch: int, device: torch.device) -> int:
    """As many as keep every processor of the GPU busy twice over."""
    if device.type != "cuda":
        return 1
    busy = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(busy // programs, batch // LEAST_SHARE))


def _check(
    x: Tensor,
    other: Tensor,
    block: tuple[int, int],
    offsets: Tensor,
    index: Tensor,
    slots: Tensor,
    n_out: int,
    side_out: int,
) -> None:
    """Refuse what the kernels would misread. other: values or dy."""
    if not supports(block, x.dtype) or other.dtype != x.dtype:
        raise ValueError(
            f"blocks of {block[0]}x{block[1]} in {x.dtype} and {other.dtype} have no kernel: use "
            f"sides among {', '.join(map(str, SIDES))}, and float32, float16 or bfloat16 in both"
        )
    if x.dim() != 2:
        raise ValueError(f"x and dy must be (batch, features), not {tuple(x.shape)}")
    if offsets.numel() != -(-n_out // side_out) + 1 or index.shape != slots.shape:
        raise ValueError(
            f"{offsets.numel()} offsets, {index.numel()} indices and {slots.numel()} slots do not "
            f"describe {n_out} features in blocks of {side_out}: take all three from one Layout"
        )
    tensors = (x, other, offsets, index, slots)
    if any(tensor.device != x.device for tensor in tensors):
        raise ValueError(
            "all tensors must be on one device, not "
            + ", ".join(sorted({str(tensor.device) for tensor in tensors}))
        )
    if not x.is_cuda and not interpreting():
        raise ValueError(
            f"tensors on {x.device} cannot go through a GPU kernel: move them to a GPU, or use "
            "triton_kernels.blocks"
        )
