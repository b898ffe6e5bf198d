"""Pruning at random."""

import torch
from torch import Tensor

from dst.pruning.score import Score
from dst.seeding import generator


class Random(Score):
    """Uniform numbers, drawn for (seed, layer name) on the CPU, so that devices agree."""

    def read(self, rows: slice) -> Tensor:
        span = self.weights.span(rows)
        # A stream a tile: any tile can be read again without those before it.
        own = generator(self.seed, f"prune {self.weights.name}", rows.start)
        return torch.rand(span.stop - span.start, generator=own).to(self.weights.device)
