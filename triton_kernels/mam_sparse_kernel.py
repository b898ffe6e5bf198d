"""The kernel of ``mam_gpu`` for single weights: the batch along the lanes, as in ``csr_kernel``.

Needs triton; ``mam_gpu`` imports it where it is launched.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def largest_of(best, step, entry, count):
    """best: (STEP, TILE), each entry's largest product; step: where its STEP began. -> the largest
    one, NaN before all, and the first position in the row that holds it."""
    held = (entry < count)[:, None]
    nan = held & (best != best)
    any_nan = tl.max(nan.to(tl.int32), axis=0) > 0
    value = tl.max(tl.where(held & (best == best), best, float("-inf")), axis=0)
    found = tl.where(any_nan[None, :], nan, held & (best == value[None, :]))
    position = tl.min(tl.where(found, step + entry[:, None], count), axis=0)
    return tl.where(any_nan, float("nan"), value), position


@triton.jit
def against_absent(value, position, cols_ptr, first, count, n_in, ABSENT: tl.constexpr):
    """(value, k) after the row's first absent weight, whose product is 0, has competed. k is -1
    where it won; of equal products, the lower column has."""
    # A block beside a scalar condition: the interpreter wants blocks alone.
    count = tl.full(position.shape, 0, tl.int32) + count
    lost = count == 0
    if ABSENT:
        col = tl.load(cols_ptr + first + position, mask=position < count, other=0)
        # A column at its own position has no absent one before it.
        behind = (value < 0) | ((value == 0) & (col != position))
        lost = lost | (behind & (count < n_in))
    return tl.where(lost, 0.0, value), tl.where(lost, -1, (first + position).to(tl.int32))


@triton.jit(do_not_specialize=["rows"])
def sparse_winners_kernel(
    x_ptr,
    values_ptr,
    offsets_ptr,
    cols_ptr,
    slots_ptr,
    y_ptr,
    arg_max_ptr,
    arg_min_ptr,
    counts_ptr,
    samples,
    batch,
    rows,
    n_in,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    ABSENT: tl.constexpr,
    COUNT: tl.constexpr,
):
    """TILE samples of one row.

    x: (n_in, batch), of which ``samples`` are no padding. Writes y and the args, (rows, batch), or,
    if COUNT, adds to counts, (capacity,), alone. STEP entries of the row are read at once, each
    with winners of its own until the end. ABSENT: absent weights compete, as zeros.
    """
    row = (tl.program_id(0) % rows).to(tl.int64)
    # All rows of a tile of samples come one after another, while these are in the cache.
    sample = (tl.program_id(0) // rows).to(tl.int64) * TILE + tl.arange(0, TILE)
    first = tl.load(offsets_ptr + row).to(tl.int64)
    count = (tl.load(offsets_ptr + row + 1).to(tl.int64) - first).to(tl.int32)
    entry = tl.arange(0, STEP)
    high = tl.full((STEP, TILE), float("-inf"), tl.float32)
    low = tl.full((STEP, TILE), float("-inf"), tl.float32)
    high_step = tl.full((STEP, TILE), 0, tl.int32)
    low_step = tl.full((STEP, TILE), 0, tl.int32)
    for start in range(0, count, STEP):
        alive = start + entry < count
        column = tl.load(cols_ptr + first + start + entry, mask=alive, other=0).to(tl.int64)
        slot = tl.load(slots_ptr + first + start + entry, mask=alive, other=0).to(tl.int64)
        value = tl.load(values_ptr + slot, mask=alive, other=0.0).to(tl.float32)
        x = tl.load(
            x_ptr + (column * batch)[:, None] + sample[None, :],
            mask=alive[:, None] & (sample < batch)[None, :],
            other=0.0,
        )
        product = value[:, None] * x.to(tl.float32)
        better = alive[:, None] & (high == high) & ~(product <= high)
        high = tl.where(better, product, high)
        high_step = tl.where(better, start, high_step)
        product = -product
        better = alive[:, None] & (low == low) & ~(product <= low)
        low = tl.where(better, product, low)
        low_step = tl.where(better, start, low_step)
    high, at_high = largest_of(high, high_step, entry, count)
    low, at_low = largest_of(low, low_step, entry, count)
    high, arg_max = against_absent(high, at_high, cols_ptr, first, count, n_in, ABSENT)
    low, arg_min = against_absent(low, at_low, cols_ptr, first, count, n_in, ABSENT)
    if COUNT:
        for which in tl.static_range(2):
            arg = arg_max if which == 0 else arg_min
            won = (arg >= 0) & (sample < samples)
            slot = tl.load(slots_ptr + arg, mask=won, other=0)
            tl.atomic_add(counts_ptr + slot, 1, mask=won, sem="relaxed")
    else:
        at = row * batch + sample
        inside = sample < batch
        tl.store(y_ptr + at, (high - low).to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(arg_max_ptr + at, arg_max, mask=inside)
        tl.store(arg_min_ptr + at, arg_min, mask=inside)
