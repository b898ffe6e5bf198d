"""The kernels of ``block_sparse``: the product with the alive blocks, forward and backward, and the
gradient at the alive blocks.

Needs triton; ``block_sparse`` imports it where they are launched.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _gather(index_ptr, entry, end, part, none, BLOCKS: tl.constexpr):
    """For every lane, what ``index`` holds for its block: entry ``entry + part``, or ``none`` from
    ``end`` on. One scalar load a block, where a load by lane would read it once per weight."""
    gathered = tl.zeros_like(part).to(tl.int64) + none
    for block in tl.static_range(BLOCKS):
        found = tl.load(index_ptr + entry + block, mask=entry + block < end, other=none)
        gathered = tl.where(part == block, found.to(tl.int64), gathered)
    return gathered


# Specialised on these, the kernel would be compiled anew for another batch.
@triton.jit(do_not_specialize=["batch", "n_rows"])
def product_kernel(
    x_ptr,
    values_ptr,
    offsets_ptr,
    index_ptr,
    slots_ptr,
    order_ptr,
    bias_ptr,
    y_ptr,
    batch,
    n_in,
    n_out,
    n_rows,
    x_stride,
    y_stride,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
    SIDE_OUT: tl.constexpr,
    SIDE_IN: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    STRIDE_IN: tl.constexpr,
    RELU: tl.constexpr,
    TF32: tl.constexpr,
):
    """TILE_M samples of one row of blocks of y = x W^T.

    x: (batch, n_in), y: (batch, n_out). A block is SIDE_OUT x SIDE_IN, with strides of its own, so
    that the transposed order and swapped strides give the input gradient. order, bias: or None.
    A step takes TILE_K inputs: several blocks, or a part of one.
    """
    BLOCKS: tl.constexpr = (TILE_K + SIDE_IN - 1) // SIDE_IN
    PARTS: tl.constexpr = (SIDE_IN + TILE_K - 1) // TILE_K
    program = tl.program_id(0)
    # The rows of a tile of x come one after another, while the tile is in the cache.
    row = program % n_rows
    sample = (program // n_rows).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    if order_ptr is not None:
        row = tl.load(order_ptr + row)
    row = row.to(tl.int64)
    first = tl.load(offsets_ptr + row).to(tl.int64)
    end = tl.load(offsets_ptr + row + 1).to(tl.int64)

    lane = tl.arange(0, TILE_K)
    out = tl.arange(0, SIDE_OUT)
    part = lane // SIDE_IN
    # Past the batch any sample does: what comes of it is not stored.
    x_at = x_ptr + tl.where(sample < batch, sample, 0)[:, None] * x_stride
    value_at = values_ptr + out[None, :] * STRIDE_OUT
    nowhere = tl.cdiv(n_in, SIDE_IN)

    acc = tl.zeros((TILE_M, SIDE_OUT), dtype=tl.float32)
    steps = tl.cdiv(end - first, BLOCKS).to(tl.int32) * PARTS
    for step in range(0, steps):
        entry = first + step // PARTS * BLOCKS
        within = lane % SIDE_IN + step % PARTS * TILE_K
        column = _gather(index_ptr, entry, end, part, nowhere, BLOCKS) * SIDE_IN + within
        slot = _gather(slots_ptr, entry, end, part, -1, BLOCKS)
        x = tl.load(x_at + column[None, :], mask=(column < n_in)[None, :], other=0.0)
        value = tl.load(
            value_at + (slot * (SIDE_OUT * SIDE_IN) + within * STRIDE_IN)[:, None],
            mask=(slot >= 0)[:, None],
            other=0.0,
        )
        acc = tl.dot(x, value, acc, input_precision="tf32" if TF32 else "ieee")

    at = row * SIDE_OUT + out
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + at, mask=at < n_out, other=0.0).to(tl.float32)[None, :]
    if RELU:
        # A maximum would turn NaN into 0.
        acc = tl.where(acc < 0, 0.0, acc)
    tl.store(
        y_ptr + sample[:, None] * y_stride + at[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(sample < batch)[:, None] & (at < n_out)[None, :],
    )


@triton.jit(do_not_specialize=["batch", "n_rows", "share", "search_steps"])
def weight_gradient_kernel(
    x_ptr,
    dy_ptr,
    offsets_ptr,
    cols_ptr,
    slots_ptr,
    grad_ptr,
    batch,
    n_in,
    n_out,
    n_rows,
    share,
    search_steps,
    x_stride,
    dy_stride,
    grad_stride,
    TILE_M: tl.constexpr,
    GROUP: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    TF32: tl.constexpr,
):
    """dy^T x at up to GROUP alive blocks of one row, over one share of the batch.

    x: (batch, n_in), dy: (batch, n_out), grad: (shares, capacity, BH, BW). ``share`` samples, a
    whole number of steps of TILE_M, are one. The groups of row r are numbered from
    row_offsets[r] // GROUP + r on, which leaves room for all of them; a program whose number no
    group has ends at once.
    """
    group = tl.program_id(0)
    low, high = tl.zeros((), tl.int32), n_rows
    for _ in range(0, search_steps):
        middle = (low + high) // 2
        before = tl.load(offsets_ptr + middle) // GROUP + middle <= group
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    row = low.to(tl.int64)
    first = tl.load(offsets_ptr + row).to(tl.int64)
    end = tl.load(offsets_ptr + row + 1).to(tl.int64)
    entry = first + (group - row - first // GROUP) * GROUP
    if entry < end:
        lane = tl.arange(0, GROUP * BW)
        part, within = lane // BW, lane % BW
        column = _gather(cols_ptr, entry, end, part, tl.cdiv(n_in, BW), GROUP) * BW + within
        out = tl.arange(0, BH)
        at = row * BH + out
        sample = tl.program_id(1).to(tl.int64) * share + tl.arange(0, TILE_M)
        stop = tl.minimum(batch, (tl.program_id(1).to(tl.int64) + 1) * share)

        # The inputs are the rows of the product: a group of small blocks fills a tensor core's 64.
        x_at = x_ptr + sample[None, :] * x_stride + column[:, None]
        dy_at = dy_ptr + sample[:, None] * dy_stride + at[None, :]
        step = tl.full((), TILE_M, tl.int64)
        acc = tl.zeros((GROUP * BW, BH), dtype=tl.float32)
        for _ in range(0, tl.cdiv(share, TILE_M)):
            x = tl.load(x_at, mask=(column < n_in)[:, None] & (sample < stop)[None, :], other=0.0)
            dy = tl.load(dy_at, mask=(sample < stop)[:, None] & (at < n_out)[None, :], other=0.0)
            acc = tl.dot(x, dy, acc, input_precision="tf32" if TF32 else "ieee")
            sample += TILE_M
            x_at += step * x_stride
            dy_at += step * dy_stride

        slot = _gather(slots_ptr, entry, end, part, -1, GROUP)
        grad_at = grad_ptr + tl.program_id(1).to(tl.int64) * grad_stride
        tl.store(
            grad_at + (slot * (BH * BW) + within)[:, None] + out[None, :] * BW,
            acc.to(grad_ptr.dtype.element_ty),
            mask=(slot >= 0)[:, None],
        )
