"""The weights that a pruning chooses from, read a tile of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dst.layers import SparseConv2d, SparseLayer
from triton_kernels import Layout

# Weights in a tile, which stays in a cache and has rows enough for a fast product.
TILE = 1 << 18


class Weights:
    """All weights of a dense layer, or the alive ones of a sparse one, in the order of their keys.

    A key is row * n_cols + col, as in a topology of single weights; columns of a convolution run
    over (kh, kw, C). size: how many there are. ``rows`` below is a slice of whole rows.
    """

    def __init__(self, name: str, layer: nn.Module, n_rows: int, n_cols: int, size: int) -> None:
        self.name, self.layer = name, layer
        self.n_rows, self.n_cols, self.size = n_rows, n_cols, size

    @property
    def total(self) -> int:
        """How many a dense layer has."""
        return self.n_rows * self.n_cols

    @property
    def device(self) -> torch.device:
        return self.values(slice(0, 0)).device

    @property
    def is_convolution(self) -> bool:
        return isinstance(self.layer, nn.Conv2d | SparseConv2d)

    def tiles(self) -> Iterator[slice]:
        """Consecutive rows, of about ``TILE`` weights; the same ones at every reading."""
        step = max(1, TILE * self.n_rows // max(1, self.size))
        for start in range(0, self.n_rows, step):
            yield slice(start, min(start + step, self.n_rows))

    def span(self, rows: slice) -> slice:
        """Where those of some rows stand among all."""
        raise NotImplementedError

    def values(self, rows: slice) -> Tensor:
        """1-D, in the layer's dtype."""
        raise NotImplementedError

    def keys(self, rows: slice) -> Tensor:
        """1-D, int64, ascending."""
        raise NotImplementedError


class DenseWeights(Weights):
    """Of ``nn.Linear``, ``nn.Conv2d`` and ``MAMLinear``."""

    def __init__(self, name: str, layer: nn.Linear | nn.Conv2d) -> None:
        self.weight = layer.weight.detach()
        n_rows, size = self.weight.shape[0], self.weight.numel()
        super().__init__(name, layer, n_rows, size // n_rows, size)

    def span(self, rows: slice) -> slice:
        return slice(rows.start * self.n_cols, rows.stop * self.n_cols)

    def values(self, rows: slice) -> Tensor:
        tile = self.weight[rows]
        return (tile.permute(0, 2, 3, 1) if tile.dim() == 4 else tile).reshape(-1)

    def keys(self, rows: slice) -> Tensor:
        span = self.span(rows)
        return torch.arange(span.start, span.stop, device=self.weight.device)


class SparseWeights(Weights):
    """Of the sparse layers, whose blocks are single weights."""

    def __init__(self, name: str, layer: SparseLayer) -> None:
        topology = layer.topology
        self.weight, self.layout = layer.values.detach(), topology.layout
        self._ends: list[int] = topology.row_offsets.tolist()
        super().__init__(name, layer, topology.grid.n_rows, topology.grid.n_cols, topology.alive)

    def span(self, rows: slice) -> slice:
        return slice(self._ends[rows.start], self._ends[rows.stop])

    def values(self, rows: slice) -> Tensor:
        return self.weight.view(-1)[self.layout.slots[self.span(rows)].long()]

    def keys(self, rows: slice) -> Tensor:
        own = self.layout_of(rows)
        row = torch.arange(rows.start, rows.stop, device=self.weight.device)
        row = row.repeat_interleave(own.row_offsets.diff(), output_size=own.cols.numel())
        return row * self.n_cols + own.cols

    def layout_of(self, rows: slice) -> Layout:
        """Of these rows as a matrix of their own, its values in the order of the keys; without the
        transposed order."""
        span = self.span(rows)
        offsets = self.layout.row_offsets[rows.start : rows.stop + 1]
        slots = torch.arange(span.stop - span.start, dtype=offsets.dtype, device=offsets.device)
        return self.layout._replace(
            row_offsets=offsets - span.start,
            cols=self.layout.cols[span],
            slots=slots,
            n_out=rows.stop - rows.start,
        )


def weights_of(name: str, layer: nn.Module) -> Weights:
    if isinstance(layer, SparseLayer):
        return SparseWeights(name, layer)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return DenseWeights(name, layer)
