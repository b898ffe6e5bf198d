"""Pruning by the probability of selection (Nikiforos 2024, equation 4.7)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dst.pruning.score import Call, Score
from dst.pruning.weights import SparseWeights, Weights
from dst.pruning.winning import winners_of

# Outputs whose winners are looked for at a time.
_OUTPUTS = 1 << 20


class Selection(Score):
    """The share of the samples for which the weight was the arg-max or the arg-min, or both, which
    counts once. Every position of an input with positions is a sample.

    Of an ordinary layer, what max and min over its products would select.
    """

    needs = "inputs"

    def __init__(self, weights: Weights, seed: int) -> None:
        super().__init__(weights, seed)
        self._counts = torch.zeros(weights.size, dtype=torch.int32, device=weights.device)
        self._seen = 0

    def add(self, calls: Sequence[Call]) -> None:
        for call in calls:
            x = call.x.flatten(0, 1)
            self._seen += len(x)
            for part in x.split(max(1, _OUTPUTS // self.weights.n_rows)):
                self._count(part.to(call.dtype))

    def _count(self, x: Tensor) -> None:
        arg_max, arg_min = winners_of(self.weights, x)
        for arg, counts in (
            (arg_max, arg_max >= 0),
            (arg_min, (arg_min >= 0) & (arg_min != arg_max)),
        ):
            at = arg.long()
            if not isinstance(self.weights, SparseWeights):
                at += torch.arange(at.shape[1], device=at.device) * self.weights.n_cols
            self._counts.index_add_(0, at.clamp_(min=0).flatten(), counts.int().flatten())

    def read(self, rows: slice) -> Tensor:
        return self._counts[self.weights.span(rows)] / max(1, self._seen)


class MagnitudeSelection(Selection):
    """|w| times the share of the samples that selected it."""

    def read(self, rows: slice) -> Tensor:
        return super().read(rows) * self.weights.values(rows).float().abs()
