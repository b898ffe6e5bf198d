"""The exact search as a Triton kernel, where the vectors are on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from growth.connections import Connections, Grid
from growth.errors import InputError
from growth.pairs import Pairs
from triton_kernels.outer_topk import METRICS, search, supports
from triton_kernels.require import interpreting, require_triton


def on_gpu(pairs: Pairs, grid: Grid, count: int, active: Tensor, metric: str) -> Connections | None:
    """The best ``count``, by ``triton_kernels.outer_topk``; None where there is no kernel for the
    device, the metric, the precision or the block, or no triton."""
    if not (pairs.device.type == "cuda" or interpreting()) or not pairs.has_vectors:
        return None
    # A block that lay across two taps would not be one of ours.
    whole_taps = grid.taps == 1 or grid.channels % grid.block[1] == 0
    if metric not in METRICS or not supports(grid.block) or not whole_taps:
        return None
    try:
        require_triton("the search on a GPU")
    except ImportError:
        return None
    x, dz = pairs.vectors()
    if x.dtype == torch.float64:
        return None
    try:
        found = search(x, dz, count, active.to(x.device), block=grid.block, metric=metric)
    except ValueError as error:
        raise InputError(f"{error}") from None
    row, col = found.keys // grid.n_cols, found.keys % grid.n_cols
    report = {"search": "kernel", "launches": found.launches}
    return Connections(row, col, found.scores, found.flops, report)
