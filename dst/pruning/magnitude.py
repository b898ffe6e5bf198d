"""Pruning by magnitude."""

from torch import Tensor

from dst.pruning.score import Score


class Magnitude(Score):
    """|w|."""

    def read(self, rows: slice) -> Tensor:
        return self.weights.values(rows).float().abs()
