"""A sparse weight that a test knows inside out: its blocks, and the dense weight they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from dst import Change, Topology
from growth import Grid


def topology_of(grid: Grid, alive: str, *, spare: int = 3, seed: int = 0) -> Topology:
    """Blocks in scrambled slots, with ``spare`` free ones among them."""
    generator = torch.Generator().manual_seed(seed)
    count = {"none": 0, "one": 1, "some": max(1, grid.size // 3), "all": grid.size}[alive]
    keys = torch.randperm(grid.size, generator=generator)
    if alive == "some" and grid.n_rows > 1:
        keys = keys[keys // grid.n_cols % 2 == 1]  # every other row is empty
    wanted, other = keys[:count].sort().values, keys[count : count + 5].sort().values
    topology = Topology(grid, torch.cat([wanted, other]), wanted.numel() + 5 + spare)
    topology.edit(Change(other, torch.empty(0, dtype=torch.int64)))
    # Out and in again, a part at a time, so that slots do not follow the keys.
    half = wanted[wanted.numel() // 2 :]
    topology.edit(Change(half, torch.empty(0, dtype=torch.int64)))
    topology.edit(Change(wanted[: wanted.numel() // 2], half))
    topology.edit(Change(half[:0], wanted[: wanted.numel() // 2]))
    assert torch.equal(topology.keys(), wanted)
    return topology


class Case:
    """A topology with values and the dense weight that they stand for, cut up by plain loops.

    values: (capacity, bh, bw), NaN in the free slots. weight: (n_out, n_in), float64.
    """

    def __init__(self, topology: Topology, dtype: torch.dtype, seed: int = 0) -> None:
        self.topology, self.grid = topology, topology.grid
        self.n_in = self.grid.taps * self.grid.channels
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.zeros(self.grid.n_out, self.n_in, dtype=torch.float64)
        full = torch.randn(self.weight.shape, generator=generator, dtype=torch.float64).to(dtype)
        self.values = torch.full((topology.capacity, *self.grid.block), torch.nan, dtype=dtype)
        for slot, rows, columns in self.places():
            part = full[rows, columns]
            self.weight[rows, columns] = part.double()
            self.values[slot] = 0
            self.values[slot, : part.shape[0], : part.shape[1]] = part
        self.values.requires_grad_()

    def places(self) -> list[tuple[int, slice, slice]]:
        """(slot, rows, columns) of every alive block."""
        (bh, bw), across = self.grid.block, self.grid.n_cols // self.grid.taps
        found = []
        keys, slots = self.topology.keys().tolist(), self.topology.slots.tolist()
        for key, slot in zip(keys, slots, strict=True):
            row, (tap, col) = key // self.grid.n_cols, divmod(key % self.grid.n_cols, across)
            left = tap * self.grid.channels
            columns = slice(left + col * bw, left + min(col * bw + bw, self.grid.channels))
            found.append((slot, slice(row * bh, min(row * bh + bh, self.grid.n_out)), columns))
        return found

    def check_gradient(self, gradient: Tensor, tolerance: float) -> None:
        """values.grad against the dense gradient (n_out, n_in); exactly zero elsewhere."""
        assert self.values.grad is not None and self.values.grad.dtype == self.values.dtype
        expected = torch.zeros(self.values.shape, dtype=torch.float64)
        filled = torch.zeros(self.values.shape, dtype=torch.bool)
        for slot, rows, columns in self.places():
            part = gradient[rows, columns]
            expected[slot, : part.shape[0], : part.shape[1]] = part
            filled[slot, : part.shape[0], : part.shape[1]] = True
        actual = self.values.grad.double()
        assert (actual[~filled] == 0).all()
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
