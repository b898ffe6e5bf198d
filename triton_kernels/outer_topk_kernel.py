"""The kernel of ``outer_topk``: one tile of G = dz^T x, its scores, and those that are appended.

Needs triton; ``outer_topk`` imports it where it is launched.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _block_scores(
    product,
    TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ABSOLUTE: tl.constexpr,
):
    """(TILE / BLOCK_ROWS, TILE / BLOCK_COLS) scores of a tile of G."""
    if BLOCK_ROWS == 1:
        return tl.abs(product) if ABSOLUTE else product
    else:
        squares = tl.reshape(
            product * product,
            (TILE // BLOCK_ROWS, BLOCK_ROWS, TILE // BLOCK_COLS, BLOCK_COLS),
        )
        return tl.sqrt_rn(tl.sum(tl.sum(squares, axis=3), axis=1))


# Specialised on these, the kernel would be compiled anew for a wave that starts at an odd tile.
@triton.jit(do_not_specialize=["start", "room", "col_tiles"])
def outer_topk_kernel(
    dz_ptr,
    x_ptr,
    row_ptr,
    col_ptr,
    order_ptr,
    threshold_ptr,
    last_ptr,
    counter_ptr,
    place_ptr,
    score_ptr,
    start,
    room,
    depth,
    dz_stride,
    x_stride,
    col_tiles,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ABSOLUTE: tl.constexpr,
):
    """Scores of one tile of G; those that pass the threshold are appended.

    dz, x: (depth, tiles * TILE), zero-padded to whole steps and tiles. counter: scores appended so
    far; it runs on past ``room``, where nothing is stored any more.
    """
    ROWS: tl.constexpr = TILE // BLOCK_ROWS
    COLS: tl.constexpr = TILE // BLOCK_COLS
    tile = tl.load(order_ptr + start + tl.program_id(0)).to(tl.int64)
    row_tile = tile // col_tiles
    col_tile = tile % col_tiles

    batch = tl.arange(0, STEP).to(tl.int64)
    side = tl.arange(0, TILE)
    dz_at = dz_ptr + batch[None, :] * dz_stride + (row_tile * TILE + side)[:, None]
    x_at = x_ptr + batch[:, None] * x_stride + (col_tile * TILE + side)[None, :]
    product = tl.zeros((TILE, TILE), dtype=tl.float32)
    for _ in range(0, depth, STEP):
        product = tl.dot(tl.load(dz_at), tl.load(x_at), product, input_precision="ieee")
        dz_at += STEP * dz_stride
        x_at += STEP * x_stride
    score = _block_scores(product, TILE, BLOCK_ROWS, BLOCK_COLS, ABSOLUTE)

    row = tl.load(row_ptr + row_tile * ROWS + tl.arange(0, ROWS))
    col = tl.load(col_ptr + col_tile * COLS + tl.arange(0, COLS))
    threshold = tl.load(threshold_ptr)
    last_row = tl.load(last_ptr)
    last_col = tl.load(last_ptr + 1)
    # Ties that lower keys have won already would fill the buffer, were they not left out here.
    wins_tie = (row < last_row)[:, None] | ((row == last_row)[:, None] & (col < last_col)[None, :])
    passes = (score > threshold) | ((score == threshold) & wins_tie)
    passes = passes & (row >= 0)[:, None] & (col >= 0)[None, :]

    passes = tl.reshape(passes.to(tl.int32), (ROWS * COLS,))
    total = tl.sum(passes, axis=0)
    if total > 0:
        base = tl.atomic_add(counter_ptr, total.to(tl.int64), sem="relaxed")
        free = tl.maximum(tl.minimum(room - base, ROWS * COLS), 0).to(tl.int32)
        at = tl.cumsum(passes, axis=0) - 1
        stored = (passes > 0) & (at < free)
        place = tile * (ROWS * COLS) + tl.arange(0, ROWS * COLS)
        tl.store(score_ptr + base + at, tl.reshape(score, (ROWS * COLS,)), mask=stored)
        tl.store(place_ptr + base + at, place, mask=stored)
