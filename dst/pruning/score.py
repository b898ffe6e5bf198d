"""What a pruning score is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dst.pruning.weights import Weights


class Call(NamedTuple):
    """One use of a linear layer in the forward pass of a batch.

    x: (samples, positions, n_in), and dz: (samples, positions, n_out), the gradient of the
    samples' losses by the outputs, where the score needs it. dtype: what the layer computed in.
    """

    x: Tensor
    dz: Tensor | None
    dtype: torch.dtype


class Score:
    """How much each weight of one layer is worth. Read a tile at a time, as often as one likes.

    needs: what it is shown of the layer while the model runs over the pruning set: ``nothing``,
    and then it takes convolutions as well, the ``inputs``, or the ``gradients`` besides.
    samples: of the pruning set so far.
    """

    needs: ClassVar[str] = "nothing"

    def __init__(self, weights: Weights, seed: int) -> None:
        self.weights, self.seed, self.samples = weights, seed, 0

    def add(self, calls: Sequence[Call]) -> None:
        """All uses of the layer in one batch."""
        raise NotImplementedError

    def read(self, rows: slice) -> Tensor:
        """Of the weights of these rows, in the order of their keys: float32 (n,), a new tensor, at
        least 0; the larger the better."""
        raise NotImplementedError
