"""The kernels of ``block_conv``: implicit products over the alive blocks, halo masks instead of an
unfolded input.

Needs triton; ``block_conv`` imports it where they are launched. Activations are addressed by
(image, row, column) strides, their channels one after another.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A row of an image far above it, whatever is added to it.
OUTSIDE: tl.constexpr = tl.constexpr(-(1 << 30))


@triton.jit
def _by_lane(index_ptr, entry, end, part, BLOCKS: tl.constexpr):
    """What ``index`` holds for the block of every lane, entry ``entry + part``; 0 from ``end`` on.
    One scalar load a block, and a single scalar where all lanes are of one block."""
    if BLOCKS == 1:
        return tl.load(index_ptr + entry)
    else:
        found = tl.zeros_like(part)
        for block in tl.static_range(BLOCKS):
            one = tl.load(index_ptr + entry + block, mask=entry + block < end, other=0)
            found = tl.where(part == block, one.to(tl.int32), found)
        return found


# Specialised on these, the kernel would be compiled anew for another batch or image.
@triton.jit(do_not_specialize=["batch", "height", "width", "grid_h", "grid_w", "out_h", "out_w"])
def conv_product_kernel(
    x_ptr,
    values_ptr,
    offsets_ptr,
    index_ptr,
    slots_ptr,
    bias_ptr,
    y_ptr,
    batch,
    height,
    width,
    channels,
    x_stride_n,
    x_stride_h,
    x_stride_w,
    grid_h,
    grid_w,
    out_h,
    out_w,
    n_out,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    INPUT_GRADIENT: tl.constexpr,
    RELU: tl.constexpr,
    TF32: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """TILE positions of one row of blocks of y = conv(x, W); or, with INPUT_GRADIENT, of one column
    of them of the gradient y of the input, given the gradient x of the output.

    x: (batch, height, width, channels), by strides; y: (batch, out_h, out_w, n_out), contiguous.
    index: for every entry of a row, tap * blocks of channels of x + block of channels. bias, or
    None. A step takes STEP channels at their taps: several blocks, or a part of one.

    The gradient's positions are taken one class after another of those that are equal modulo the
    stride: within a class the alive taps are the same, and all of them hit. The class is the outer
    index of the offsets. grid_h, grid_w: positions of a class, or those of y.
    """
    DEPTH: tl.constexpr = BH if INPUT_GRADIENT else BW
    SIDE: tl.constexpr = BW if INPUT_GRADIENT else BH
    VALUE_K: tl.constexpr = BW if INPUT_GRADIENT else 1
    VALUE_N: tl.constexpr = 1 if INPUT_GRADIENT else BW
    BLOCKS: tl.constexpr = (STEP + DEPTH - 1) // DEPTH
    PARTS: tl.constexpr = (DEPTH + STEP - 1) // STEP

    rows = tl.cdiv(n_out, SIDE)
    area = grid_h.to(tl.int64) * grid_w
    tiles = tl.cdiv(batch * area, TILE)
    # The rows of a tile of positions come one after another, while its windows are in the cache.
    row = tl.program_id(0) % rows
    tile = (tl.program_id(0) // rows).to(tl.int64)
    same = (tile // tiles).to(tl.int32)
    first = tile % tiles * TILE

    # Images are counted from the first one of this program, in 32 bits.
    local = (first % area).to(tl.int32) + tl.arange(0, TILE)
    image = local // (grid_h * grid_w)
    local = local % (grid_h * grid_w)
    at_h, at_w = local // grid_w, local % grid_w
    if INPUT_GRADIENT:
        phase_h, phase_w = same // STRIDE_W, same % STRIDE_W
        from_h, from_w = at_h, at_w
        at_h, at_w = at_h * STRIDE_H + phase_h, at_w * STRIDE_W + phase_w
    else:
        from_h, from_w = at_h * STRIDE_H - PADDING_H, at_w * STRIDE_W - PADDING_W
    there = (image < (batch - first // area).to(tl.int32)) & (at_h < out_h) & (at_w < out_w)
    x_at = x_ptr + first // area * x_stride_n + image.to(tl.int64) * x_stride_n
    x_at += from_h.to(tl.int64) * x_stride_h + from_w.to(tl.int64) * x_stride_w
    # Where there is no position, nothing is inside of the image.
    from_h = tl.where(there, from_h, OUTSIDE)

    lane = tl.arange(0, STEP)
    part = lane // DEPTH
    side = tl.arange(0, SIDE)
    entry = tl.load(offsets_ptr + same * rows + row).to(tl.int64)
    end = tl.load(offsets_ptr + same * rows + row + 1).to(tl.int64)
    blocks = tl.cdiv(channels, DEPTH)
    steps = tl.cdiv(end - entry, BLOCKS).to(tl.int32) * PARTS
    acc = tl.zeros((TILE, SIDE), dtype=tl.float32)
    for step in range(0, steps):
        now = entry + step // PARTS * BLOCKS
        within = lane % DEPTH + step % PARTS * STEP
        index = _by_lane(index_ptr, now, end, part, BLOCKS)
        slot = _by_lane(slots_ptr, now, end, part, BLOCKS).to(tl.int64)
        tap = index // blocks
        if INPUT_GRADIENT:
            shift_h = (phase_h + PADDING_H - tap // KERNEL_W * DILATION_H) // STRIDE_H
            shift_w = (phase_w + PADDING_W - tap % KERNEL_W * DILATION_W) // STRIDE_W
        else:
            shift_h, shift_w = tap // KERNEL_W * DILATION_H, tap % KERNEL_W * DILATION_W
        channel = index % blocks * DEPTH + within
        shift = shift_h.to(tl.int64) * x_stride_h + shift_w.to(tl.int64) * x_stride_w + channel
        value_at = slot * (BH * BW) + within * VALUE_K
        alive = now + part < end

        if BLOCKS == 1:
            h, w = (from_h + shift_h)[:, None], (from_w + shift_w)[:, None]
        else:
            h, w = from_h[:, None] + shift_h[None, :], from_w[:, None] + shift_w[None, :]
        inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
        x = tl.load(
            x_at[:, None] + shift[None, :],
            mask=inside & (alive & (channel < channels))[None, :],
            other=0.0,
        )
        value = tl.load(
            values_ptr + value_at[:, None] + side[None, :] * VALUE_N,
            mask=alive[:, None],
            other=0.0,
        )
        acc = tl.dot(x, value, acc, input_precision="tf32" if TF32 else "ieee")

    out = row * SIDE + side
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + out, mask=out < n_out, other=0.0).to(tl.float32)[None, :]
    if RELU:
        # A maximum would turn NaN into 0.
        acc = tl.where(acc < 0, 0.0, acc)
    position = (image * out_h + at_h).to(tl.int64) * out_w + at_w
    y_at = y_ptr + first // area * (out_h.to(tl.int64) * out_w * n_out)
    tl.store(
        y_at + position[:, None] * n_out + out[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=there[:, None] & (out < n_out)[None, :],
    )


@triton.jit(do_not_specialize=["batch", "height", "width", "out_h", "out_w", "n_rows", "chunk"])
def conv_weight_gradient_kernel(
    x_ptr,
    dy_ptr,
    offsets_ptr,
    cols_ptr,
    slots_ptr,
    grad_ptr,
    batch,
    height,
    width,
    channels,
    x_stride_n,
    x_stride_h,
    x_stride_w,
    out_h,
    out_w,
    n_out,
    dy_stride,
    n_rows,
    chunk,
    grad_stride,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    TF32: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    SEARCHED: tl.constexpr,
):
    """The gradient at up to GROUP alive blocks of one row, over ``chunk`` output positions.

    x: (batch, height, width, channels), by strides; dy: (batch * out_h * out_w, n_out); grad:
    (chunks, capacity, BH, BW), ``grad_stride`` from chunk to chunk. STEP positions a step; chunk is
    a multiple of it. The groups of row r are numbered from row_offsets[r] // GROUP + r on, which
    leaves room for all of them; a program whose number no group has ends at once. SEARCHED: rows
    among which that number is looked for at a time.
    """
    group = tl.program_id(0)
    row = 0
    for start in range(0, n_rows, SEARCHED):
        later = start + 1 + tl.arange(0, SEARCHED)
        base = tl.load(offsets_ptr + later, mask=later < n_rows, other=0) // GROUP + later
        row += tl.sum(((base <= group) & (later < n_rows)).to(tl.int32), axis=0)
    first = tl.load(offsets_ptr + row).to(tl.int64)
    end = tl.load(offsets_ptr + row + 1).to(tl.int64)
    entry = first + (group - row - first // GROUP) * GROUP
    if entry < end:
        lane = tl.arange(0, GROUP * BW)
        part, within = lane // BW, lane % BW
        blocks = tl.cdiv(channels, BW)
        index = _by_lane(cols_ptr, entry, end, part, GROUP) + tl.zeros_like(lane)
        tap = index // blocks
        shift_h, shift_w = tap // KERNEL_W * DILATION_H, tap % KERNEL_W * DILATION_W
        channel = index % blocks * BW + within
        alive = entry + part < end
        x_at = x_ptr + channel
        x_at += shift_h.to(tl.int64) * x_stride_h + shift_w.to(tl.int64) * x_stride_w
        side = tl.arange(0, BH)
        out = row * BH + side

        area = out_h.to(tl.int64) * out_w
        position = tl.program_id(1).to(tl.int64) * chunk
        local = (position % area).to(tl.int32) + tl.arange(0, STEP)
        # Images are counted from the first one of this program, in 32 bits.
        image = local // (out_h * out_w)
        local = local % (out_h * out_w)
        at_h, at_w = local // out_w, local % out_w
        images = (batch - position // area).to(tl.int32)
        x_at += position // area * x_stride_n
        left = tl.minimum(batch * area - position, chunk).to(tl.int32)
        ahead = tl.arange(0, STEP)
        dy_at = dy_ptr + (position + ahead)[:, None] * dy_stride + out[None, :]
        step_n, step_h, step_w = STEP // (out_h * out_w), STEP // out_w % out_h, STEP % out_w

        # The inputs are the rows of the product: a group of small blocks fills a tensor core's 64.
        acc = tl.zeros((GROUP * BW, BH), dtype=tl.float32)
        for done in range(0, left, STEP):
            from_h, from_w = at_h * STRIDE_H - PADDING_H, at_w * STRIDE_W - PADDING_W
            x_from = image.to(tl.int64) * x_stride_n
            x_from += from_h.to(tl.int64) * x_stride_h + from_w.to(tl.int64) * x_stride_w
            from_h = tl.where(image < images, from_h, OUTSIDE)
            h, w = from_h[None, :] + shift_h[:, None], from_w[None, :] + shift_w[:, None]
            inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
            x = tl.load(
                x_at[:, None] + x_from[None, :],
                mask=inside & (alive & (channel < channels))[:, None],
                other=0.0,
            )
            dy = tl.load(
                dy_at,
                mask=(ahead < left - done)[:, None] & (out < n_out)[None, :],
                other=0.0,
            )
            acc = tl.dot(x, dy, acc, input_precision="tf32" if TF32 else "ieee")

            at_w += step_w
            over = at_w >= out_w
            at_w = tl.where(over, at_w - out_w, at_w)
            at_h += step_h + over.to(tl.int32)
            over = at_h >= out_h
            at_h = tl.where(over, at_h - out_h, at_h)
            image += step_n + over.to(tl.int32)
            dy_at += STEP * dy_stride

        slot = (_by_lane(slots_ptr, entry, end, part, GROUP) + tl.zeros_like(lane)).to(tl.int64)
        grad_at = grad_ptr + tl.program_id(1).to(tl.int64) * grad_stride
        tl.store(
            grad_at + (slot * (BH * BW) + within)[:, None] + side[None, :] * BW,
            acc.to(grad_ptr.dtype.element_ty),
            mask=alive[:, None],
        )
