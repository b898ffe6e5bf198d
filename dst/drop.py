"""Which connections to drop: one function a criterion.

Each takes the alive blocks (alive, bh, bw) in canonical order and a count, and returns exactly
that many positions, ascending. Ties go to the lowest key.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from growth.select import select_smallest


def block_norms(values: Tensor) -> Tensor:
    """|w| of single weights, or the Frobenius norm of every block: (n,) of (n, bh, bw)."""
    return values.abs().view(-1) if values.shape[1:].numel() == 1 else values.flatten(1).norm(dim=1)


def magnitude(values: Tensor, count: int) -> Tensor:
    """The smallest |w|, or the smallest Frobenius norm of a block (RigL; most later SET)."""
    return select_smallest(block_norms(values), count)


def signed_magnitude(values: Tensor, count: int) -> Tensor:
    """SET as published: the positive weights closest to zero and the negative ones closest to
    zero, in equal shares of each; exact zeros, the closest of both, go first.

    The sign of a block is that of its sum.
    """
    norms = block_norms(values)
    signs = values.flatten(1).sum(1).sign()
    zero = norms == 0
    signs = torch.where((signs == 0) & ~zero, torch.ones_like(signs), signs)
    dropped = [zero.nonzero().squeeze(1)[:count]]
    left = count - dropped[0].numel()
    positive, negative = (signs > 0).nonzero().squeeze(1), (signs < 0).nonzero().squeeze(1)
    if left:
        of_positive = round(left * positive.numel() / (positive.numel() + negative.numel()))
        for side, share in ((positive, of_positive), (negative, left - of_positive)):
            dropped.append(side[select_smallest(norms[side], share)])
    return torch.cat(dropped).sort().values


Criterion = Callable[[Tensor, int], Tensor]

CRITERIA: dict[str, Criterion] = {
    "magnitude": magnitude,
    "signed-magnitude": signed_magnitude,
}
