"""The largest entries of G = dz^T x on a GPU, exactly, without ever holding G.

Columns are sorted by norm and G is cut into tiles, visited in the order of their Cauchy-Schwarz
bound ||dz_I||max * ||x_J||max, as in LEMP (Teflioudi, Gemulla and Mykytiuk, 2015). A wave of tiles
is one launch: each program multiplies one tile and appends the pairs that beat the running
threshold to a buffer. Between two waves the threshold, the count-th best so far, is raised; when
it passes the bound of the next tile, the search is over. The threshold is at every moment a lower
bound of the final one, so that nothing is missed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triton_kernels.require import interpreting, require_triton

METRICS = ("abs-ip", "ip")
BLOCK_SIZES = (16, 32, 64, 128)
# Scores that a wave may append, beside room for twice the count: 12 MB.
ROOM = 1 << 20
# Tiles of the first wave; fewer would leave processors of a large GPU idle.
FIRST_TILES = 512
# Every wave visits at most this many times the tiles already visited: the threshold has not risen
# yet, and what it would have spared is computed.
GROWTH = 3


class Config(NamedTuple):
    """How the kernel is compiled: entries of G a program computes (tile x tile), batch entries a
    step, warps, and the stages of the software pipeline."""

    tile: int
    step: int
    num_warps: int
    num_stages: int


def choose_config(block: tuple[int, int], dtype: torch.dtype) -> Config:
    """Larger single-weight tiles spill registers when they append."""
    step = 16 if dtype == torch.float32 else 32
    return Config(64, step, 4, 3) if block == (1, 1) else Config(128, step, 8, 3)


def supports(block: tuple[int, int]) -> bool:
    """Whether the kernel knows blocks of this size: (1, 1), or sides of 16, 32, 64 and 128."""
    return block == (1, 1) or (block[0] in BLOCK_SIZES and block[1] in BLOCK_SIZES)


class Found(NamedTuple):
    """keys: int64 (count,), ascending. scores: float32 (count,). flops: floating-point operations
    of the products. launches: of the kernel."""

    keys: Tensor
    scores: Tensor
    flops: int
    launches: int


def outer_topk(
    x: Tensor,
    dz: Tensor,
    count: int,
    active: Tensor,
    *,
    block: tuple[int, int] = (1, 1),
    metric: str = "abs-ip",
) -> tuple[Tensor, Tensor]:
    """The keys and the scores of :func:`search`."""
    return search(x, dz, count, active, block=block, metric=metric)[:2]


@torch.no_grad()
def search(
    x: Tensor,
    dz: Tensor,
    count: int,
    active: Tensor,
    *,
    block: tuple[int, int] = (1, 1),
    metric: str = "abs-ip",
    room: int | None = None,
) -> Found:
    """The ``count`` inactive pairs of the highest score; among equal ones, those of the lowest key.

    x: (batch, n_in), dz: (batch, n_out); float32, float16 or bfloat16, finite, any strides, on a
    GPU. Half-precision products are summed in float32, float32 ones computed without tf32.
    active: sorted unique int64 keys row * n_cols + col, in blocks, on the same device.
    block: see :func:`supports`; blocks are cut from n_out rows and n_in columns, edges padded with
    zeros. metric: ``abs-ip`` (|G|, or the Frobenius norm of a block) or ``ip`` (G, block 1 alone).
    room: scores that one wave may append; None chooses.

    Memory: sorted copies of x and dz, and O(count + room). The same input gives the same result,
    bit for bit, in whatever order the programs run.

    Raises ValueError on arguments of the wrong kind, when fewer than ``count`` are inactive, and
    when fewer have a finite score; ImportError without triton.
    """
    require_triton("the search for connections on a GPU")
    from triton_kernels.outer_topk_kernel import outer_topk_kernel

    n_cols = _check(x, dz, count, active, block, metric)
    if count == 0:
        return Found(active.new_empty(0), x.new_empty(0, dtype=torch.float32), 0, 0)
    dtype = torch.promote_types(x.dtype, dz.dtype)
    config = choose_config(block, dtype)
    rows = _arrange(dz.to(dtype), block[0], config)
    cols = _arrange(x.to(dtype), block[1], config)
    order, bounds = _visiting_order(rows, cols, x.shape[0], block)

    tile_scores = (config.tile // block[0]) * (config.tile // block[1])
    room = max(tile_scores, min(room or ROOM + 2 * count, order.numel() * tile_scores))
    places = torch.empty(room, dtype=torch.int64, device=x.device)
    scores = torch.empty(room, dtype=torch.float32, device=x.device)
    counter = torch.zeros(1, dtype=torch.int64, device=x.device)
    best_keys, best_scores = active.new_empty(0), scores.new_empty(0)
    # What a pair must beat: a higher score, or the same one and a lower (row, col).
    threshold, last = scores.new_full((1,), -torch.inf), rows.ids.new_full((2,), -1)

    start, stop, launches, visited = 0, order.numel(), 0, 0
    size = max(1, min(max(FIRST_TILES, 4 * count // tile_scores), room // tile_scores))
    while start < stop:
        size = min(size, stop - start)
        counter.zero_()
        with torch.cuda.device_of(x):
            outer_topk_kernel[(size,)](
                rows.vectors,
                cols.vectors,
                rows.ids,
                cols.ids,
                order,
                threshold,
                last,
                counter,
                places,
                scores,
                start,
                room,
                rows.vectors.shape[0],
                rows.vectors.stride(0),
                cols.vectors.stride(0),
                cols.bounds.numel(),
                TILE=config.tile,
                STEP=config.step,
                BLOCK_ROWS=block[0],
                BLOCK_COLS=block[1],
                ABSOLUTE=metric == "abs-ip",
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                enable_fp_fusion=True,
            )
        launches, visited = launches + 1, visited + size
        appended = int(counter)
        if appended > room:
            # What was dropped depends on which programs came last: the wave is done again in
            # parts, and a single tile always has room.
            size = max(1, min(size // 2, size * room // (2 * appended)))
            continue
        start += size

        wave_scores = scores[:appended]
        keys = _keys(places[:appended], rows, cols, config.tile, block, n_cols)
        inactive = _absent(keys, active)
        best_keys = torch.cat([best_keys, keys[inactive]])
        best_scores = torch.cat([best_scores, wave_scores[inactive]])
        if best_keys.numel() >= count:
            at, threshold, last_key = _best(best_keys, best_scores, count)
            best_keys, best_scores = best_keys[at], best_scores[at]
            last = torch.cat([last_key // n_cols, last_key % n_cols]).int()
        stop = min(stop, int((bounds >= threshold).sum()))
        # Half the room, if the next tiles append at the rate at which these would have.
        passing = max(1, int((wave_scores >= threshold).sum()))
        size = max(1, min(GROWTH * start, size * room // (2 * passing)))

    if best_keys.numel() < count:
        raise ValueError(
            f"only {best_keys.numel()} of {count} connections have a finite score: the vectors "
            "are too large, scale them down"
        )
    best_keys, at = best_keys.sort()
    flops = 2 * x.shape[0] * config.tile**2 * visited
    return Found(best_keys, best_scores[at], flops, launches)


def _check(
    x: Tensor, dz: Tensor, count: int, active: Tensor, block: tuple[int, int], metric: str
) -> int:
    """Refuse what cannot be searched; return n_cols."""
    if x.dim() != 2 or dz.dim() != 2 or x.shape[0] != dz.shape[0] or 0 in (*x.shape, *dz.shape):
        raise ValueError(
            f"x {tuple(x.shape)} and dz {tuple(dz.shape)} must be (batch, n_in) and "
            "(batch, n_out) over the same batch, none of them 0"
        )
    for vectors in (x, dz):
        if vectors.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"x and dz must be float32, float16 or bfloat16, not {vectors.dtype}")
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is not searched here: choose {', '.join(METRICS)}")
    if not supports(block) or (block != (1, 1) and metric != "abs-ip"):
        raise ValueError(
            f"block {block} with metric {metric!r} has no kernel: use (1, 1), or 'abs-ip' and "
            f"sides among {', '.join(map(str, BLOCK_SIZES))}"
        )
    if x.device != dz.device or x.device != active.device:
        raise ValueError(
            f"x, dz and active must be on one device, not {x.device}, {dz.device} and "
            f"{active.device}"
        )
    if not x.is_cuda and not interpreting():
        raise ValueError(
            f"tensors on {x.device} cannot be searched by a GPU kernel: move them to a GPU"
        )
    if active.dtype != torch.int64 or active.dim() != 1:
        raise ValueError(
            f"active must be a 1-D int64 tensor of keys, not {active.dim()}-D {active.dtype}"
        )
    n_rows, n_cols = -(-dz.shape[1] // block[0]), -(-x.shape[1] // block[1])
    left = n_rows * n_cols - active.numel()
    if not 0 <= count <= left:
        raise ValueError(
            f"cannot find {count} connections: {left} of {n_rows * n_cols} are inactive; "
            "ask for at most that many"
        )
    return n_cols


class _Side(NamedTuple):
    """The vectors of one side of the product, their blocks sorted by norm, largest first.

    vectors: (depth, tiles * tile), zero where padded. ids: int32 (tiles * blocks a tile), which
    block stands there, -1 for none. bounds: float64 (tiles,), the largest norm in a tile.
    """

    vectors: Tensor
    ids: Tensor
    bounds: Tensor


def _arrange(vectors: Tensor, side: int, config: Config) -> _Side:
    samples, n = vectors.shape
    blocks, per_tile = -(-n // side), config.tile // side
    tiles = -(-blocks // per_tile)
    norms = torch.linalg.vector_norm(vectors, dim=0, dtype=torch.float64)
    norms = torch.nn.functional.pad(norms, (0, blocks * side - n)).view(blocks, side)
    norms, order = torch.linalg.vector_norm(norms, dim=1).sort(descending=True, stable=True)

    column = torch.arange(n, device=vectors.device)
    place = order.argsort()[column // side] * side + column % side
    depth = -(-samples // config.step) * config.step
    arranged = vectors.new_zeros(depth, tiles * config.tile)
    arranged[:samples].index_copy_(1, place, vectors)
    ids = torch.full((tiles * per_tile,), -1, dtype=torch.int32, device=vectors.device)
    ids[:blocks] = order.int()
    return _Side(arranged, ids, norms[::per_tile])


def _visiting_order(
    rows: _Side, cols: _Side, samples: int, block: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Tiles (int32, row tile * column tiles + column tile) by descending bound, and the bounds.

    A bound holds for scores as they are computed, rounding included: the sum of ``samples``
    products in float32 errs by at most samples * 2^-24 of the product of the norms, and the sum of
    squares over a block by its two sides; 2^-22 leaves a factor of four to tensor cores, which
    round coarsely. What underflows may round up by as little as the constants at the end.
    """
    bh, bw = block
    slack = 1 + (samples + bh + bw + 32) * 2.0**-22
    tiny = samples * 2.0**-125
    bounds = (rows.bounds[:, None] * cols.bounds).flatten() * slack + tiny
    if block != (1, 1):
        bounds += (bh * bw) ** 0.5 * 2.0**-74
        # The squares overflow long before the norms do.
        bounds[bounds >= 2.0**63] = torch.inf
    bounds, order = bounds.float().sort(descending=True, stable=True)
    return order.int(), bounds


def _keys(
    places: Tensor, rows: _Side, cols: _Side, tile: int, block: tuple[int, int], n_cols: int
) -> Tensor:
    """The keys of what the kernel appended: places are tile * scores a tile + score in the tile."""
    tile_rows, tile_cols = tile // block[0], tile // block[1]
    at, local = places // (tile_rows * tile_cols), places % (tile_rows * tile_cols)
    row = rows.ids[at // cols.bounds.numel() * tile_rows + local // tile_cols]
    col = cols.ids[at % cols.bounds.numel() * tile_cols + local % tile_cols]
    return row.long() * n_cols + col


def _absent(keys: Tensor, active: Tensor) -> Tensor:
    """Positions of the keys that are not among the sorted active ones."""
    if active.numel() == 0:
        return torch.arange(keys.numel(), device=keys.device)
    nearest = torch.searchsorted(active, keys).clamp_(max=active.numel() - 1)
    return (active[nearest] != keys).nonzero().squeeze(1)


def _best(keys: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the ``count`` best by descending score and ascending key, and the score (1,)
    and the key (1,) of the last of them."""
    threshold = scores.topk(count, sorted=False).values.min().view(1)
    above = (scores > threshold).nonzero().squeeze(1)
    ties = (scores == threshold).nonzero().squeeze(1)
    tied_keys, order = keys[ties].sort()
    taken = count - above.numel()
    return torch.cat([above, ties[order[:taken]]]), threshold, tied_keys[taken - 1 : taken]
