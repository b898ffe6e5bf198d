"""Which blocks of a weight are alive; the only place that changes it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from growth import Grid, InputError
from triton_kernels import Layout


class Search(NamedTuple):
    """How the new connections of one part of a layer were found.

    report: what the strategy says of its search. choice: what it decided once and is to be told at
    the next update; None where it decides nothing.
    """

    report: Mapping[str, str | float]
    choice: str | None = None


class Change(NamedTuple):
    """An edit of one layer's topology: sorted int64 keys row * n_cols + col, in blocks.

    A key in both is reset in place. flops: what finding it cost. searches: by the part's name.
    """

    dropped: Tensor
    grown: Tensor
    flops: int = 0
    searches: Mapping[str, Search] = MappingProxyType({})


class Topology(nn.Module):
    """The alive blocks of a weight of n_out rows and taps x channels columns.

    Kept sorted by row and, transposed, by column; each block knows its *slot*, its place in the
    layer's ``values``. An edit never moves a block to another slot.

    grid: sizes in blocks. capacity: number of slots. row_offsets, cols, slots and col_offsets,
    rows_t, slots_t: see :class:`triton_kernels.Layout`.
    """

    row_offsets: Tensor
    cols: Tensor
    slots: Tensor
    col_offsets: Tensor
    rows_t: Tensor
    slots_t: Tensor

    def __init__(self, grid: Grid, keys: Tensor, capacity: int | None = None) -> None:
        """keys: the alive blocks, 1-D integer, any order. capacity: as many as alive by default.

        Raises InputError on duplicate keys, keys out of range, or more keys than capacity.
        """
        super().__init__()
        keys = keys.to(torch.int64).sort().values
        self.grid = grid
        self.capacity = keys.numel() if capacity is None else capacity
        for name in ("row_offsets", "cols", "slots"):
            self.register_buffer(name, torch.empty(0, dtype=torch.int32))
        for name in ("col_offsets", "rows_t", "slots_t"):
            self.register_buffer(name, torch.empty(0, dtype=torch.int32), persistent=False)
        self._set(keys, torch.arange(keys.numel(), device=keys.device))

    @property
    def alive(self) -> int:
        """Number of alive blocks."""
        return self.cols.numel()

    @property
    def layout(self) -> Layout:
        """What the products take."""
        grid = self.grid
        return Layout(
            self.row_offsets,
            self.cols,
            self.slots,
            self.col_offsets,
            self.rows_t,
            self.slots_t,
            grid.n_out,
            grid.taps,
            grid.channels,
        )

    def rows(self) -> Tensor:
        """Block row of every alive block, int64 (alive,), in canonical order."""
        index = torch.arange(self.grid.n_rows, device=self.cols.device)
        return index.repeat_interleave(self.row_offsets.diff(), output_size=self.alive)

    def keys(self) -> Tensor:
        """Keys of the alive blocks, sorted, int64 (alive,)."""
        return self.rows() * self.grid.n_cols + self.cols

    def free_slots(self) -> Tensor:
        """Slots that hold no block, ascending, int64."""
        taken = torch.zeros(self.capacity, dtype=torch.int8, device=self.slots.device)
        taken[self.slots.long()] = 1
        # Not ``nonzero``, whose size a GPU would have to tell.
        return taken.sort(stable=True).indices[: self.capacity - self.alive]

    def sizes(self) -> Tensor:
        """Weights that each alive block really holds, without the padding; int64 (alive,)."""
        grid = self.grid
        heights = (grid.n_out - self.rows() * grid.block[0]).clamp_(max=grid.block[0])
        return heights * self._widths()

    def fan_in(self) -> Tensor:
        """Alive weights of every output, int64 (n_out,)."""
        per_row = torch.zeros(self.grid.n_rows, dtype=torch.int64, device=self.cols.device)
        per_row.index_add_(0, self.rows(), self._widths())
        return per_row.repeat_interleave(self.grid.block[0])[: self.grid.n_out]

    def _widths(self) -> Tensor:
        grid = self.grid
        at = self.cols.long() % (grid.n_cols // grid.taps) * grid.block[1]
        return (grid.channels - at).clamp_(max=grid.block[1])

    def find(self, keys: Tensor) -> Tensor:
        """Positions of ``keys`` among the alive blocks in canonical order.

        Raises InputError where one is not alive.
        """
        own = self.keys()
        at = torch.searchsorted(own, keys)
        if keys.numel() and (
            own.numel() == 0 or bool((own[at.clamp(max=own.numel() - 1)] != keys).any())
        ):
            raise InputError("a connection to drop is not alive")
        return at

    def valid(self, change: Change) -> Tensor:
        """Whether the keys of a change are such that :meth:`edit` takes it: a bool scalar on the
        topology's device, which is not waited for."""
        own = self.keys()
        dropped, grown = change.dropped.to(own.device), change.grown.to(own.device)
        if dropped.numel() > own.numel():
            return torch.zeros((), dtype=torch.bool, device=own.device)
        at = torch.searchsorted(own, dropped).clamp_(max=max(0, own.numel() - 1))
        keys, _ = self._changed(own, at, grown)
        return (
            (own[at] == dropped).all()
            & (dropped[1:] > dropped[:-1]).all()
            & (keys[1:] > keys[:-1]).all()
            & ((keys >= 0) & (keys < self.grid.size)).all()
        )

    def edit(self, change: Change, *, validated: bool = False) -> tuple[Tensor, Tensor]:
        """Drop and grow; returns (slots that hold grown blocks, slots that fell free), int64.

        Grown blocks, in key order, take the lowest slots among those dropped and those free. All
        slots returned must be reset by the caller. Raises InputError, and changes nothing, when a
        dropped block is not alive, a grown one is, keys repeat, or the capacity does not suffice.
        validated: ``valid`` said so already; a GPU is then not waited for.
        """
        keys, slots = self.keys(), self.slots.long()
        dropped, grown = change.dropped.to(keys.device), change.grown.to(keys.device)
        at = torch.searchsorted(keys, dropped) if validated else self.find(dropped)
        if not validated and at.unique().numel() != dropped.numel():
            raise InputError("a connection is dropped twice: keys must be unique")
        room = self._room(change)
        if room < 0:
            raise InputError(
                f"cannot grow {grown.numel()} blocks into {grown.numel() + room} free slots: "
                "resize the layer first"
            )
        pool = torch.cat([slots[at], self.free_slots()]).sort().values
        taken = pool[: grown.numel()]
        keys, order = self._changed(keys, at, grown)
        self._set(keys, torch.cat([slots, taken])[order], validated)
        return taken, pool[grown.numel() :]

    def _room(self, change: Change) -> int:
        """Slots left free by a change; below 0, those that are missing."""
        return self.capacity - self.alive + change.dropped.numel() - change.grown.numel()

    def _changed(self, keys: Tensor, dropped: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
        """Keys after a change, sorted, and where they stand in old keys + grown ones. dropped:
        positions. Of a size that is known beforehand, so that nothing is waited for."""
        # What is dropped sorts behind everything else, and is cut off.
        left = keys.index_fill(0, dropped, torch.iinfo(torch.int64).max)
        count = keys.numel() - dropped.numel() + grown.numel()
        keys, order = torch.cat([left, grown]).sort(stable=True)
        return keys[:count], order[:count]

    def resize(self, capacity: int) -> None:
        """Another number of slots. Blocks keep theirs if all fit, and else take the lowest in key
        order. Raises InputError for fewer slots than alive blocks."""
        if capacity < self.alive:
            raise InputError(f"capacity {capacity} is less than the {self.alive} alive blocks")
        keys, slots = self.keys(), self.slots.long()
        if self.alive and int(slots.max()) >= capacity:
            slots = torch.arange(self.alive, device=slots.device)
        self.capacity = capacity
        self._set(keys, slots)

    def _set(self, keys: Tensor, slots: Tensor, validated: bool = False) -> None:
        """keys: sorted. Rebuilds both orders, or raises InputError and changes nothing."""
        grid = self.grid
        if keys.numel() > self.capacity:
            raise InputError(f"{keys.numel()} alive blocks exceed the capacity {self.capacity}")
        if keys.numel() and not validated:
            if int(keys[0]) < 0 or int(keys[-1]) >= grid.size:
                raise InputError(
                    f"keys must lie in [0, {grid.size}) for {grid.n_rows} x {grid.n_cols} blocks, "
                    f"not {int(keys[0])}..{int(keys[-1])}"
                )
            if not bool((keys[1:] > keys[:-1]).all()):
                raise InputError("a connection is alive twice: keys must be unique")
        widest = max(grid.n_rows, grid.n_cols, self.capacity)
        dtype = torch.int32 if widest < 2**31 else torch.int64
        rows, cols = keys // grid.n_cols, keys % grid.n_cols
        transposed, by_column = (cols * grid.n_rows + rows).sort()
        self.row_offsets = _offsets(keys, grid.n_rows, grid.n_cols, dtype)
        self.cols, self.slots = cols.to(dtype), slots.to(dtype)
        self.col_offsets = _offsets(transposed, grid.n_cols, grid.n_rows, dtype)
        self.rows_t, self.slots_t = rows[by_column].to(dtype), self.slots[by_column]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Another topology of the same grid loads whatever its count, up to the capacity."""
        _, _, missing, _, errors = args
        try:
            offsets, cols, slots = (
                state_dict[prefix + name].to(self.cols.device, torch.int64)
                for name in ("row_offsets", "cols", "slots")
            )
        except KeyError as error:
            missing.append(error.args[0])
            return
        try:
            self._load(offsets, cols, slots)
        except InputError as error:
            errors.append(f"{prefix[:-1]}: {error}")

    def _load(self, offsets: Tensor, cols: Tensor, slots: Tensor) -> None:
        grid = self.grid
        if offsets.numel() != grid.n_rows + 1 or bool((offsets.diff() < 0).any()):
            raise InputError(f"the offsets are not those of {grid.n_rows} block rows")
        if (
            int(offsets[0]) != 0
            or int(offsets[-1]) != cols.numel()
            or cols.numel() != slots.numel()
        ):
            raise InputError("offsets, columns and slots do not belong together")
        if bool(((cols < 0) | (cols >= grid.n_cols)).any()):
            raise InputError(f"columns must lie in [0, {grid.n_cols})")
        if bool(((slots < 0) | (slots >= self.capacity)).any()) or slots.unique().numel() != len(
            slots
        ):
            raise InputError(f"slots must be unique and lie in [0, {self.capacity})")
        rows = torch.arange(grid.n_rows, device=cols.device).repeat_interleave(offsets.diff())
        self._set(rows * grid.n_cols + cols, slots)

    def extra_repr(self) -> str:
        grid = self.grid
        return (
            f"{self.alive} of {grid.n_rows} x {grid.n_cols} blocks of {grid.block}, "
            f"capacity {self.capacity}"
        )


def _offsets(keys: Tensor, count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Where each of ``count`` runs of ``width`` keys begins among sorted ones: (count + 1,)."""
    begins = torch.arange(count + 1, device=keys.device) * width
    return torch.searchsorted(keys, begins).to(dtype)
