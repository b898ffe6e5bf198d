"""The kernels of ``csr_gpu``: products with single weights, the batch along the lanes.

Needs triton; ``csr_gpu`` imports it where they are launched. Activations are feature-major,
(features, batch), contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl


# Specialised on it, the kernel would be compiled anew for another layer.
@triton.jit(do_not_specialize=["rows"])
def csr_product_kernel(
    x_ptr,
    values_ptr,
    offsets_ptr,
    index_ptr,
    slots_ptr,
    y_ptr,
    batch,
    rows,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """TILE samples of one row of y = W x.

    x: (columns, batch), y: (rows, batch). STEP entries of the row are read at once, each of them
    summed apart until the end.
    """
    row = (tl.program_id(0) % rows).to(tl.int64)
    # All rows of a tile of samples come one after another, while these are in the cache.
    sample = (tl.program_id(0) // rows).to(tl.int64) * TILE + tl.arange(0, TILE)
    first = tl.load(offsets_ptr + row).to(tl.int64)
    count = (tl.load(offsets_ptr + row + 1).to(tl.int64) - first).to(tl.int32)
    entry = tl.arange(0, STEP)
    sums = tl.zeros((STEP, TILE), dtype=tl.float32)
    for start in range(0, count, STEP):
        alive = start + entry < count
        column = tl.load(index_ptr + first + start + entry, mask=alive, other=0).to(tl.int64)
        slot = tl.load(slots_ptr + first + start + entry, mask=alive, other=0).to(tl.int64)
        value = tl.load(values_ptr + slot, mask=alive, other=0.0).to(tl.float32)
        x = tl.load(
            x_ptr + (column * batch)[:, None] + sample[None, :],
            mask=alive[:, None] & (sample < batch)[None, :],
            other=0.0,
        )
        sums += value[:, None] * x.to(tl.float32)
    y = tl.sum(sums, axis=0).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * batch + sample, y, mask=sample < batch)


@triton.jit(do_not_specialize=["rows", "parts"])
def csr_weight_gradient_kernel(
    x_ptr,
    dy_ptr,
    offsets_ptr,
    cols_ptr,
    slots_ptr,
    grad_ptr,
    batch,
    rows,
    parts,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Every ``parts``-th step of STEP entries of one row of dy x^T, over the whole batch.

    x: (columns, batch), dy: (rows, batch), grad: (capacity,).
    """
    row = (tl.program_id(0) % rows).to(tl.int64)
    part = tl.program_id(0) // rows
    first = tl.load(offsets_ptr + row).to(tl.int64)
    count = (tl.load(offsets_ptr + row + 1).to(tl.int64) - first).to(tl.int32)
    entry = tl.arange(0, STEP)
    lane = tl.arange(0, TILE)
    for start in range(part * STEP, count, parts * STEP):
        alive = start + entry < count
        column = tl.load(cols_ptr + first + start + entry, mask=alive, other=0).to(tl.int64)
        slot = tl.load(slots_ptr + first + start + entry, mask=alive, other=0).to(tl.int64)
        sums = tl.zeros((STEP, TILE), dtype=tl.float32)
        for begin in range(0, batch, TILE):
            sample = begin + lane
            dy = tl.load(
                dy_ptr + row * batch + sample[None, :], mask=(sample < batch)[None, :], other=0.0
            )
            x = tl.load(
                x_ptr + (column * batch)[:, None] + sample[None, :],
                mask=alive[:, None] & (sample < batch)[None, :],
                other=0.0,
            )
            sums += x.to(tl.float32) * dy.to(tl.float32)
        grad = tl.sum(sums, axis=1).to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + slot, grad, mask=alive)
