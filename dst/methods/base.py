"""What a method is, and the two kinds of it: those that never change, and drop and grow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from dst.drop import Criterion
from dst.layers import SparseLayer
from dst.schedules import UpdateSchedule
from dst.seeding import generator
from dst.topology import Change
from growth import InputError, NoVectors, Pairs, Strategy


class Method(Protocol):
    """Decides how the topology of every layer changes; edits nothing itself."""

    @property
    def skips_step(self) -> bool:
        """Whether an update takes the place of the optimizer's step."""
        ...

    def due(self, step: int) -> bool:
        """Whether the topology is updated at this step; steps count from 1."""
        ...

    def recording(self, step: int) -> bool:
        """Whether (x, dz) of this step's layers must be recorded."""
        ...

    def plan(
        self, layers: Mapping[str, SparseLayer], records: Mapping[str, Pairs], step: int
    ) -> dict[str, Change]:
        """The change of every layer. Pure: the same arguments give the same plan."""
        ...

    def initial_blocks(
        self, layer: SparseLayer, name: str, slots: torch.Tensor, step: int
    ) -> torch.Tensor | float:
        """Values of blocks just grown into ``slots``: (n, bh, bw), or one number for all."""
        ...


@dataclass(frozen=True)
class Unchanging:
    """Neither drops nor grows: a dense network, or a sparse one of fixed topology."""

    skips_step: bool = False

    def due(self, step: int) -> bool:
        return False

    def recording(self, step: int) -> bool:
        return False

    def plan(
        self, layers: Mapping[str, SparseLayer], records: Mapping[str, Pairs], step: int
    ) -> dict[str, Change]:
        return {}

    def initial_blocks(
        self, layer: SparseLayer, name: str, slots: torch.Tensor, step: int
    ) -> torch.Tensor | float:
        return 0.0


GROWN_INITS = ("zero", "random")


@dataclass(frozen=True)
class DropGrow:
    """Drop a share of every layer's alive connections and grow as many.

    schedule: when, and which share: floor(share x alive blocks) of each layer, and never more than
    can grow. drop: the criterion. growth: the strategy, asked for exactly as many as were dropped.
    regrow: whether a connection dropped in this update may be grown again in it (RigL and SET: over
    everything not kept). keep_regrown: whether such a one goes on with its value and optimizer
    state, as in RigL's code, or starts afresh. grown_init: ``zero``, or ``random``: uniform within
    1 / sqrt(alive fan-in). skips_step: the update replaces the optimizer's step, as in RigL's
    algorithm 1.
    """

    schedule: UpdateSchedule
    drop: Criterion
    growth: Strategy
    seed: int = 0
    regrow: bool = True
    keep_regrown: bool = True
    grown_init: str = "zero"
    skips_step: bool = True

    def __post_init__(self) -> None:
        if self.grown_init not in GROWN_INITS:
            raise InputError(
                f"grown init {self.grown_init!r} is unknown: choose {', '.join(GROWN_INITS)}"
            )

    def due(self, step: int) -> bool:
        return self.schedule.due(step)

    def recording(self, step: int) -> bool:
        return self.growth.needs_pairs and self.schedule.recording(step)

    def plan(
        self, layers: Mapping[str, SparseLayer], records: Mapping[str, Pairs], step: int
    ) -> dict[str, Change]:
        share = self.schedule.fraction_at(step)
        return {
            name: self._plan_layer(name, layer, records.get(name), share, step)
            for name, layer in layers.items()
        }

    def _plan_layer(
        self, name: str, layer: SparseLayer, pairs: Pairs | None, share: float, step: int
    ) -> Change:
        topology = layer.topology
        grid, keys = topology.grid, topology.keys()
        count = int(share * topology.alive)
        if not self.regrow:
            count = min(count, grid.size - topology.alive)
        values = layer.values.detach()[topology.slots.long()]
        if not bool(values.isfinite().all()):
            raise InputError(
                f"the weights of layer {name!r} hold NaN or inf: restart from a checkpoint"
            )
        dropping = self.drop(values, count)
        keep = torch.ones(keys.numel(), dtype=torch.bool, device=keys.device)
        keep[dropping] = False
        dropped = keys[dropping]
        if pairs is None:
            if self.growth.needs_pairs:
                raise InputError(
                    f"layer {name!r} was not recorded for this update: no backward pass went "
                    "through it (a compiled forward does not see the recorder; a layer that is "
                    "not used must be kept dense)"
                )
            pairs = NoVectors(grid.taps * grid.channels, grid.n_out, grid.taps, keys.device)
        found = self.growth(
            pairs,
            count,
            keys[keep] if self.regrow else keys,
            block=grid.block,
            generator=generator(self.seed, name, step),
        )
        grown = (found.row * grid.n_cols + found.col).sort().values
        if self.keep_regrown:
            back = torch.isin(grown, dropped, assume_unique=True)
            dropped = dropped[~torch.isin(dropped, grown, assume_unique=True)]
            grown = grown[~back]
        return Change(dropped, grown, found.flops)

    def initial_blocks(
        self, layer: SparseLayer, name: str, slots: torch.Tensor, step: int
    ) -> torch.Tensor | float:
        if self.grown_init == "zero":
            return 0.0
        return layer.random_blocks(slots, generator(self.seed, f"{name}/grown", step))


class UpdateDefaults(NamedTuple):
    """The schedule that a method's paper sets, where the user leaves it open.

    interval: steps, as in ``"100"``, or epochs, as in ``"1ep"``. fraction, decay: see
    :class:`UpdateSchedule`. end: share of the run's steps.
    """

    interval: str
    fraction: float
    decay: str
    end: float


class MethodEntry(NamedTuple):
    """A method as the command line offers it.

    build: the paper's method for a schedule and a seed. summary: half a line for ``--help``.
    sparse: whether the model is made sparse at all. defaults: None where nothing is ever updated.
    growths: the strategies that make sense; a method with one of them has it fixed.
    """

    build: Callable[[UpdateSchedule, int], Method]
    summary: str
    sparse: bool = True
    defaults: UpdateDefaults | None = None
    growths: tuple[str, ...] = ()
