"""What ``outer_topk`` computes, written plainly: dense, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def outer_scores(
    x: Tensor, dz: Tensor, block: tuple[int, int] = (1, 1), metric: str = "abs-ip"
) -> Tensor:
    """The score of every pair of blocks: float64 (n_rows, n_cols).

    x: (batch, n_in), dz: (batch, n_out). G = dz^T x; for ``abs-ip`` |G|, for ``ip`` G, and for a
    block other than (1, 1) the Frobenius norm of every block, edge blocks padded with zeros.
    """
    g = dz.double().T @ x.double()
    if block == (1, 1):
        return g.abs() if metric == "abs-ip" else g
    bh, bw = block
    g = torch.nn.functional.pad(g, (0, -g.shape[1] % bw, 0, -g.shape[0] % bh))
    blocks = g.view(g.shape[0] // bh, bh, g.shape[1] // bw, bw)
    return blocks.square().sum(dim=(1, 3)).sqrt()


def outer_topk(
    x: Tensor,
    dz: Tensor,
    count: int,
    active: Tensor,
    *,
    block: tuple[int, int] = (1, 1),
    metric: str = "abs-ip",
) -> tuple[Tensor, Tensor]:
    """The ``count`` best inactive pairs, among equal ones those of the lowest keys:
    (keys int64 ascending, scores float64)."""
    scores = outer_scores(x, dz, block, metric).flatten()
    keys = torch.arange(scores.numel(), device=scores.device)
    inactive = keys[~torch.isin(keys, active)]
    order = scores[inactive].argsort(descending=True, stable=True)[:count]
    chosen = inactive[order].sort().values
    return chosen, scores[chosen]
