"""The kernels of ``mam_gpu``: the search for the winners, and sums of what goes to them.

``(best == best) & ~(new <= best)`` says whether ``new`` beats ``best``: NaN beats all but NaN.
Needs triton; ``mam_gpu`` imports it where they are launched.
"""

from __future__ import annotations

import triton
import triton.language as tl


# Specialised on them, the kernel would be compiled anew for another batch.
@triton.jit(do_not_specialize=["batch", "depth", "share"])
def search_kernel(
    x_ptr,
    w_ptr,
    high_ptr,
    low_ptr,
    tiles_ptr,
    batch,
    n_out,
    depth,
    share,
    x_stride,
    w_stride,
    SAMPLES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """SAMPLES x OUTPUTS of the largest and the smallest product, over a share of the inputs.

    x: (depth, x_stride) and w: (depth, w_stride) have the inputs as rows; every tile, of DEPTH of
    them, is there in full. Products are formed and compared in their dtype. high and low: float32
    (shares, batch, n_out). tiles: int32 of that shape, the first tile that holds the largest
    product in its low half, that of the smallest one in its high half.
    """
    share_id = tl.program_id(2)
    sample = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    first = share_id * share
    last = tl.minimum(first + share, depth)
    x_ptr += tl.cast(first, tl.int64) * x_stride
    w_ptr += tl.cast(first, tl.int64) * w_stride
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    high = tl.full((SAMPLES, OUTPUTS), float("-inf"), dtype)
    low = tl.full((SAMPLES, OUTPUTS), float("inf"), dtype)
    tiles = tl.full((SAMPLES, OUTPUTS), 0, tl.int32)
    for start in range(first, last, DEPTH):
        # Which tile won is asked once a tile: asked of every product, it would double the work.
        high_before, low_before = high, low
        for _ in range(0, DEPTH, UNROLL):
            for _ in tl.static_range(UNROLL):
                # Scalar steps of the pointers: a block of pointers would be carried through shared
                # memory, with two barriers an input.
                x = tl.load(x_ptr + sample)
                w = tl.load(w_ptr + output)
                product = x[:, None] * w[None, :]
                high = tl.maximum(high, product, propagate_nan=tl.PropagateNan.ALL).to(dtype)
                low = tl.minimum(low, product, propagate_nan=tl.PropagateNan.ALL).to(dtype)
                x_ptr += x_stride
                w_ptr += w_stride
        tile = start // DEPTH
        better = (high_before == high_before) & ~(high <= high_before)
        tiles = tl.where(better, (tiles & -65536) | tile, tiles)
        better = (low_before == low_before) & ~(low >= low_before)
        tiles = tl.where(better, (tiles & 65535) | (tile << 16), tiles)
    row = tl.cast(share_id, tl.int64) * batch + sample
    at = row[:, None] * n_out + output[None, :]
    inside = (sample < batch)[:, None] & (output < n_out)[None, :]
    tl.store(high_ptr + at, high.to(tl.float32), mask=inside)
    tl.store(low_ptr + at, low.to(tl.float32), mask=inside)
    tl.store(tiles_ptr + at, tiles, mask=inside)


@triton.jit
def first_of(
    value, tile, x_ptr, w_ptr, output, inside, n_in, DEPTH: tl.constexpr, PACKED: tl.constexpr
):
    """The lowest input in the tile whose product is ``value``; x_ptr: the sample's row."""
    step = tl.arange(0, DEPTH)
    column = tile[:, None] * DEPTH + step[None, :]
    there = inside[:, None] & (column < n_in)
    x = tl.load(x_ptr + column, mask=there, other=0.0)
    at = output.to(tl.int64)[:, None] * n_in + column
    w = tl.load(w_ptr + at, mask=there, other=0.0)
    if PACKED:
        product = (x * w).to(tl.float32)
    else:
        product = x.to(tl.float32) * w.to(tl.float32)
    wanted = value[:, None]
    found = there & ((product == wanted) | ((product != product) & (wanted != wanted)))
    return tile * DEPTH + tl.min(tl.where(found, step[None, :], DEPTH), axis=1)


@triton.jit(do_not_specialize=["batch", "shares"])
def winners_kernel(
    x_ptr,
    w_ptr,
    high_ptr,
    low_ptr,
    tiles_ptr,
    values_ptr,
    arg_max_ptr,
    arg_min_ptr,
    counts_ptr,
    batch,
    n_out,
    n_in,
    shares,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    PACKED: tl.constexpr,
    COUNT: tl.constexpr,
):
    """From the tile that won to the input that did, for OUTPUTS of one sample.

    x: (batch, n_in), w: (n_out, n_in). high, low, tiles: of ``search_kernel``. Writes values and
    the two args, (batch, n_out), or, if COUNT, adds to counts, (n_out, n_in), alone.
    """
    sample = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = output < n_out
    at = sample * n_out + output
    high = tl.load(high_ptr + at, mask=inside, other=0.0)
    low = tl.load(low_ptr + at, mask=inside, other=0.0)
    tiles = tl.load(tiles_ptr + at, mask=inside, other=0)
    tile_high, tile_low = tiles & 65535, (tiles >> 16) & 65535
    for share in range(1, shares):
        there = tl.cast(share, tl.int64) * batch * n_out + at
        tiles = tl.load(tiles_ptr + there, mask=inside, other=0)
        other = tl.load(high_ptr + there, mask=inside, other=0.0)
        better = (high == high) & ~(other <= high)
        high = tl.where(better, other, high)
        tile_high = tl.where(better, tiles & 65535, tile_high)
        other = tl.load(low_ptr + there, mask=inside, other=0.0)
        better = (low == low) & ~(other >= low)
        low = tl.where(better, other, low)
        tile_low = tl.where(better, (tiles >> 16) & 65535, tile_low)
    row = x_ptr + sample * n_in
    arg_max = first_of(high, tile_high, row, w_ptr, output, inside, n_in, DEPTH, PACKED)
    arg_min = first_of(low, tile_low, row, w_ptr, output, inside, n_in, DEPTH, PACKED)
    if COUNT:
        counts = counts_ptr + output.to(tl.int64) * n_in
        tl.atomic_add(counts + arg_max, 1, mask=inside, sem="relaxed")
        tl.atomic_add(counts + arg_min, 1, mask=inside, sem="relaxed")
    else:
        tl.store(values_ptr + at, (high + low).to(values_ptr.dtype.element_ty), mask=inside)
        tl.store(arg_max_ptr + at, arg_max, mask=inside)
        tl.store(arg_min_ptr + at, arg_min, mask=inside)


@triton.jit(do_not_specialize=["bits"])
def scatter_kernel(
    dy_ptr,
    other_ptr,
    arg_max_ptr,
    arg_min_ptr,
    cols_ptr,
    slots_ptr,
    largest_ptr,
    sums_ptr,
    rest_ptr,
    n_out,
    n_in,
    dy_stride,
    arg_stride,
    bits,
    TO_WEIGHT: tl.constexpr,
    SPARSE: tl.constexpr,
    LARGEST: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Adds dy * other, for TILE outputs of one sample, to their two winners.

    TO_WEIGHT: other is x, (batch, n_in), the winner weight (output, column), or, if SPARSE, its
    position. Otherwise other is the weight, (n_out, n_in), or, if SPARSE, its values, and the
    winner is input (sample, column). args: columns, or positions, of which -1 is nobody.

    Sums are float32, in any order. Or, in two passes, LARGEST finds the bits of every sum's largest
    finite term, int32, and WHOLE, with these known, adds terms cut to multiples of 2^-bits of it,
    int64. Infinity and NaN, which whole numbers do not know, go to ``rest``, float32, where they
    are the same in any order too.
    """
    sample = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = output < n_out
    dy = tl.load(dy_ptr + sample * dy_stride + output, mask=inside, other=0.0)
    for which in tl.static_range(2):
        if which == 0:
            arg = tl.load(arg_max_ptr + sample * arg_stride + output, mask=inside, other=-1)
        else:
            arg = tl.load(arg_min_ptr + sample * arg_stride + output, mask=inside, other=-1)
        won = arg >= 0
        column = arg
        if SPARSE:
            column = tl.load(cols_ptr + arg, mask=won, other=0)
        if TO_WEIGHT:
            other = tl.load(other_ptr + sample * n_in + column, mask=won, other=0.0)
            target = arg.to(tl.int64)
            if not SPARSE:
                target += output.to(tl.int64) * n_in
        else:
            if SPARSE:
                at = tl.load(slots_ptr + arg, mask=won, other=0).to(tl.int64)
            else:
                at = output.to(tl.int64) * n_in + arg
            other = tl.load(other_ptr + at, mask=won, other=0.0)
            target = sample * n_in + column
        term = dy.to(tl.float32) * other.to(tl.float32)
        finite = won & (tl.abs(term) < float("inf"))
        if LARGEST:
            magnitude = tl.abs(term).to(tl.int32, bitcast=True)
            tl.atomic_max(largest_ptr + target, magnitude, mask=finite, sem="relaxed")
        elif WHOLE:
            largest = tl.load(largest_ptr + target, mask=finite, other=0)
            # 1023 + bits - (exponent + 1), in the exponent's place of a float64.
            unit = ((1149 + bits - (largest >> 23)).to(tl.int64) << 52).to(tl.float64, bitcast=True)
            exact = dy.to(tl.float64) * other.to(tl.float64)
            whole = tl.where(finite, exact * unit, 0.0).to(tl.int64)
            tl.atomic_add(sums_ptr + target, whole, mask=finite & (whole != 0), sem="relaxed")
            tl.atomic_add(rest_ptr + target, term, mask=won & ~finite, sem="relaxed")
        else:
            tl.atomic_add(sums_ptr + target, term, mask=won, sem="relaxed")
