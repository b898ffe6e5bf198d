"""What is planned by itself: a layer, or each of its groups of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dst.layers import SparseLayer
from growth import Grid, Pairs, RowPairs


class Part(NamedTuple):
    """A range of block rows of a sparse layer, with a budget of its own.

    name: the layer's, and ``layer[i]`` for the i-th of several. first_row, first_alive: where its
    rows stand in the layer, and its alive blocks in canonical order. grid: its own.
    """

    name: str
    layer_name: str
    layer: SparseLayer
    first_row: int
    first_alive: int
    alive: int
    grid: Grid

    @property
    def offset(self) -> int:
        """What its keys are less than the layer's."""
        return self.first_row * self.grid.n_cols

    @property
    def _range(self) -> slice:
        return slice(self.first_alive, self.first_alive + self.alive)

    def keys(self) -> Tensor:
        """Of its alive blocks, sorted, int64 (alive,), counted from its own first row."""
        # Not out of the whole layer's: that would build them anew for every group.
        topology, n_rows = self.layer.topology, self.grid.n_rows
        counts = topology.row_offsets[self.first_row : self.first_row + n_rows + 1].diff()
        rows = torch.arange(n_rows, device=counts.device)
        rows = rows.repeat_interleave(counts, output_size=self.alive)
        return rows * self.grid.n_cols + topology.cols[self._range]

    def take(self, values: Tensor) -> Tensor:
        """Its blocks (alive, bh, bw) of ``values`` (capacity, bh, bw), in canonical order."""
        return values[self.layer.topology.slots[self._range].long()]

    def pairs(self, whole: Pairs) -> Pairs:
        """Its share of the layer's vectors."""
        if self.layer.row_groups == 1:
            return whole
        start = self.first_row * self.grid.block[0]
        return RowPairs(whole, start, start + self.grid.n_out)


def parts(layers: Mapping[str, SparseLayer]) -> list[Part]:
    """The parts of all layers, in order."""
    found = []
    for name, layer in layers.items():
        topology, groups = layer.topology, layer.row_groups
        grid = topology.grid
        if groups == 1:
            found.append(Part(name, name, layer, 0, 0, topology.alive, grid))
            continue
        rows = grid.n_rows // groups
        starts = topology.row_offsets[::rows].tolist()
        own = grid._replace(n_rows=rows, n_out=grid.n_out // groups)
        for i in range(groups):
            alive = starts[i + 1] - starts[i]
            found.append(Part(f"{name}[{i}]", name, layer, i * rows, starts[i], alive, own))
    return found
