"""What a method is, and the two kinds of it: those that never change, and drop and grow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from dst.drop import Criterion
from dst.layers import SparseLayer
from dst.parts import Part, parts
from dst.ramp import DensityRamp
from dst.redistribute import REDISTRIBUTIONS, apportion, mean_weights
from dst.schedules import UpdateSchedule
from dst.seeding import generator
from dst.topology import Change, Search
from growth import InputError, Momentum, NoVectors, Observer, Pairs, Quality, Strategy, evaluate

# What growth keeps from step to step, by the part's name.
States = Mapping[str, Tensor]
# What growth decided once, by the part's name.
Choices = Mapping[str, str]
_NO_CHOICES: Choices = MappingProxyType({})


class Observed(NamedTuple):
    """What growth keeps after a step, and the FLOPs that keeping it cost."""

    states: dict[str, Tensor]
    flops: int


class Method(Protocol):
    """Decides how the topology of every layer changes; edits nothing itself."""

    @property
    def skips_step(self) -> bool:
        """Whether an update takes the place of the optimizer's step."""
        ...

    @property
    def observes(self) -> bool:
        """Whether ``observe`` must be shown every step that is recorded."""
        ...

    @property
    def average_decay(self) -> float:
        """What a step's vectors weigh less with every later step that is searched with them."""
        ...

    def due(self, step: int) -> bool:
        """Whether the topology is updated at this step; steps count from 1."""
        ...

    def recording(self, step: int) -> bool:
        """Whether (x, dz) of this step's layers must be recorded."""
        ...

    def observe(
        self, layers: Mapping[str, SparseLayer], records: Mapping[str, Pairs], states: States
    ) -> Observed:
        """What growth keeps after a step. Tensors in ``states`` may be overwritten."""
        ...

    def plan(
        self,
        layers: Mapping[str, SparseLayer],
        records: Mapping[str, Pairs],
        step: int,
        states: States,
        choices: Choices = _NO_CHOICES,
    ) -> dict[str, Change]:
        """The change of every layer. Pure: the same arguments give the same plan. choices: those
        of the plans so far."""
        ...

    def audit(
        self,
        layers: Mapping[str, SparseLayer],
        records: Mapping[str, Pairs],
        step: int,
        states: States,
        choices: Choices = _NO_CHOICES,
    ) -> dict[str, Quality]:
        """How good the searches of ``plan`` with the same arguments are, by the part's name."""
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
    observes: bool = False
    average_decay: ClassVar[float] = 1.0

    def due(self, step: int) -> bool:
        return False

    def recording(self, step: int) -> bool:
        return False

    def observe(
        self, layers: Mapping[str, SparseLayer], records: Mapping[str, Pairs], states: States
    ) -> Observed:
        return Observed({}, 0)

    def plan(
        self,
        layers: Mapping[str, SparseLayer],
        records: Mapping[str, Pairs],
        step: int,
        states: States,
        choices: Choices = _NO_CHOICES,
    ) -> dict[str, Change]:
        return {}

    def audit(
        self,
        layers: Mapping[str, SparseLayer],
        records: Mapping[str, Pairs],
        step: int,
        states: States,
        choices: Choices = _NO_CHOICES,
    ) -> dict[str, Quality]:
        return {}

    def initial_blocks(
        self, layer: SparseLayer, name: str, slots: torch.Tensor, step: int
    ) -> torch.Tensor | float:
        return 0.0


GROWN_INITS = ("zero", "random")


class _Budget(NamedTuple):
    """Blocks of one part to drop, and to grow."""

    dropped: int
    grown: int


class _Query(NamedTuple):
    """What is dropped from a part (keys), and what its growth is asked for."""

    dropped: Tensor
    pairs: Pairs
    wanted: int
    active: Tensor


@dataclass(frozen=True)
class DropGrow:
    """Drop a share of every layer's alive connections and grow as many.

    schedule: when, and which share: floor(share x alive blocks) of each layer, and never more than
    can grow. drop: the criterion. growth: the strategy, asked for exactly as many as were dropped.
    regrow: whether a connection dropped in this update may be grown again in it (RigL and SET: over
    everything not kept). keep_regrown: whether such a one goes on with its value and optimizer
    state, as in RigL's code, or starts afresh. grown_init: ``zero``, or ``random``: uniform within
    1 / sqrt(alive fan-in). skips_step: the update replaces the optimizer's step, as in RigL's
    algorithm 1. redistribute: ``none``: every layer grows as many as it drops; else what is grown
    goes to the layers in proportion to a mean over their alive connections (see
    ``dst.redistribute``). ramp: number of blocks alive after each update; None: constant.

    A layer whose rows are in groups (the heads of attention) is planned group by group, each like
    a layer by itself.
    """

    schedule: UpdateSchedule
    drop: Criterion
    growth: Strategy
    seed: int = 0
    regrow: bool = True
    keep_regrown: bool = True
    grown_init: str = "zero"
    skips_step: bool = True
    redistribute: str = "none"
    ramp: DensityRamp | None = None

    def __post_init__(self) -> None:
        for what, value, choices in (
            ("grown init", self.grown_init, GROWN_INITS),
            ("redistribution", self.redistribute, REDISTRIBUTIONS),
        ):
            if value not in choices:
                raise InputError(f"{what} {value!r} is unknown: choose {', '.join(choices)}")

    @property
    def observes(self) -> bool:
        return self.growth.observes

    @property
    def average_decay(self) -> float:
        return self.schedule.average_decay

    def due(self, step: int) -> bool:
        return self.schedule.due(step)

    def recording(self, step: int) -> bool:
        if self.growth.observes:
            return self.schedule.due(self.schedule.next_update(step))
        return self.growth.needs_pairs and self.schedule.recording(step)

    def observe(
        self, layers: Mapping[str, SparseLayer], records: Mapping[str, Pairs], states: States
    ) -> Observed:
        """The FLOPs are what ``growth`` says. Momentum takes a dense weight gradient, and the alive
        weights' own, which it contains, is counted once: with the step's 3 f_S they make the 2 f_S
        + f_D of Evci et al. 2020."""
        kept, flops = {}, 0
        growth = cast(Observer, self.growth)
        for part in parts(layers):
            pairs = part.pairs(_recorded(part.layer_name, records))
            kept[part.name] = growth.observe(pairs, states.get(part.name))
            flops += growth.observe_flops(pairs)
        if isinstance(growth, Momentum):
            for name, layer in layers.items():
                flops -= 2 * records[name].samples * layer.alive
        return Observed(kept, flops)

    def plan(
        self,
        layers: Mapping[str, SparseLayer],
        records: Mapping[str, Pairs],
        step: int,
        states: States,
        choices: Choices = _NO_CHOICES,
    ) -> dict[str, Change]:
        every = parts(layers)
        budgets = self._budgets(every, step, states)
        changes = [
            self._plan_part(part, self._query(part, budget, records), step, states, choices)
            for part, budget in zip(every, budgets, strict=True)
        ]
        planned = zip(every, changes, strict=True)
        return {
            name: _joined([change for _, change in group])
            for name, group in groupby(planned, key=lambda pair: pair[0].layer_name)
        }

    def audit(
        self,
        layers: Mapping[str, SparseLayer],
        records: Mapping[str, Pairs],
        step: int,
        states: States,
        choices: Choices = _NO_CHOICES,
    ) -> dict[str, Quality]:
        """Searches anew, with the same random draws."""
        every, found = parts(layers), {}
        for part, budget in zip(every, self._budgets(every, step, states), strict=True):
            query = self._query(part, budget, records)
            found[part.name] = evaluate(
                self.growth,
                query.pairs,
                query.wanted,
                query.active,
                block=part.grid.block,
                generator=generator(self.seed, part.name, step),
                state=self._state(part, states, choices),
            )
        return found

    def _state(self, part: Part, states: States, choices: Choices) -> Any:
        """What the strategy is told of the past: what it kept, or what it decided."""
        return states.get(part.name) if self.growth.observes else choices.get(part.name)

    def _budgets(self, every: list[Part], step: int, states: States) -> list[_Budget]:
        share = self.schedule.fraction_at(step)
        budgets = []
        for part, target in zip(every, self._targets(every, step), strict=True):
            exchanged = int(share * part.alive)
            if not self.regrow:
                exchanged = min(exchanged, part.grid.size - max(part.alive, target))
            dropped = min(part.alive, exchanged + max(0, part.alive - target))
            budgets.append(_Budget(dropped, target - part.alive + dropped))
        how = REDISTRIBUTIONS[self.redistribute]
        if how is None:
            return budgets
        weights = mean_weights(how, every, [states.get(part.name) for part in every])
        limits = [
            part.grid.size - part.alive + (budget.dropped if self.regrow else 0)
            for part, budget in zip(every, budgets, strict=True)
        ]
        grown = apportion(sum(budget.grown for budget in budgets), weights, limits)
        return [budget._replace(grown=n) for budget, n in zip(budgets, grown, strict=True)]

    def _targets(self, every: list[Part], step: int) -> list[int]:
        """Blocks alive in each part after this update, if nothing is redistributed."""
        if self.ramp is None:
            return [part.alive for part in every]
        sizes = [part.grid.size for part in every]
        if self.redistribute != "none":
            total = sum(self.ramp.at(name, step) for name in {part.layer_name for part in every})
            return apportion(total, [float(part.alive) for part in every], sizes)
        targets: list[int] = []
        for name, group in groupby(every, key=lambda part: part.layer_name):
            own = [part.grid.size for part in group]
            # The groups of one layer share its number equally.
            targets += apportion(self.ramp.at(name, step), [1.0] * len(own), own)
        return targets

    def _query(self, part: Part, budget: _Budget, records: Mapping[str, Pairs]) -> _Query:
        grid, keys = part.grid, part.keys()
        values = part.take(part.layer.values.detach())
        if not bool(values.isfinite().all()):
            raise InputError(
                f"the weights of layer {part.name!r} hold NaN or inf: restart from a checkpoint"
            )
        dropping = self.drop(values, budget.dropped)
        keep = torch.ones(keys.numel(), dtype=torch.bool, device=keys.device)
        keep[dropping] = False
        if self.growth.needs_pairs:
            pairs = part.pairs(_recorded(part.layer_name, records))
        else:
            pairs = NoVectors(grid.taps * grid.channels, grid.n_out, grid.taps, keys.device)
        active = keys[keep] if self.regrow else keys
        return _Query(keys[dropping], pairs, budget.grown, active)

    def _plan_part(
        self, part: Part, query: _Query, step: int, states: States, choices: Choices
    ) -> Change:
        grid, dropped = part.grid, query.dropped
        found = self.growth(
            query.pairs,
            query.wanted,
            query.active,
            block=grid.block,
            generator=generator(self.seed, part.name, step),
            state=self._state(part, states, choices),
        )
        grown = (found.row * grid.n_cols + found.col).sort().values
        if self.keep_regrown:
            back = torch.isin(grown, dropped, assume_unique=True)
            dropped = dropped[~torch.isin(dropped, grown, assume_unique=True)]
            grown = grown[~back]
        # What was decided where nothing is grown may not suit what is grown later.
        choice = found.state if query.wanted else None
        searches = {part.name: Search(found.report, choice)}
        return Change(dropped + part.offset, grown + part.offset, found.flops, searches)

    def initial_blocks(
        self, layer: SparseLayer, name: str, slots: torch.Tensor, step: int
    ) -> torch.Tensor | float:
        if self.grown_init == "zero":
            return 0.0
        return layer.random_blocks(slots, generator(self.seed, f"{name}/grown", step))


def _recorded(name: str, records: Mapping[str, Pairs]) -> Pairs:
    if name not in records:
        raise InputError(
            f"layer {name!r} was not recorded for this update: no backward pass went through it "
            "(a compiled forward does not see the recorder; a layer that is not used must be kept "
            "dense)"
        )
    return records[name]


def _joined(changes: list[Change]) -> Change:
    """Those of one layer's parts, in order."""
    if len(changes) == 1:
        return changes[0]
    dropped, grown, flops, searches = zip(*changes, strict=True)
    together = {name: search for own in searches for name, search in own.items()}
    return Change(torch.cat(dropped), torch.cat(grown), sum(flops), together)


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
    growths: the strategies that make sense, its own first.
    """

    build: Callable[[UpdateSchedule, int], Method]
    summary: str
    sparse: bool = True
    defaults: UpdateDefaults | None = None
    growths: tuple[str, ...] = ()
