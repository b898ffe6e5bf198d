"""Runs a method's plan on the layers of a model and on the optimizer's state."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dst.distributed import ReducedPairs, check_agreement, everywhere, world_size
from dst.layers import SparseLayer, sparse_layers
from dst.methods.base import Method, Unchanging
from dst.optimizer_state import reset_slots, resize
from dst.topology import Change, Search
from growth import InputError, JoinedPairs, Pairs, Quality, Recorder


class Update(NamedTuple):
    """One topology update. grown: blocks newly grown in each layer. seconds: wall time of the
    search and of the edits. flops: of the search. resized: whether the values of some layer were
    reallocated; DistributedDataParallel must then be put around the model anew. searches: how
    growth searched, by the name of a layer or of one of its groups."""

    step: int
    grown: dict[str, int]
    search_seconds: float
    apply_seconds: float
    flops: int
    resized: bool = False
    searches: Mapping[str, Search] = MappingProxyType({})


class Audit(NamedTuple):
    """How good the searches of one update were, by the name of a layer or of one of its groups.
    seconds: wall time of finding out."""

    step: int
    quality: dict[str, Quality]
    seconds: float


@dataclass
class _Explored:
    """Every key that was ever alive in a layer, sorted."""

    keys: Tensor = field(repr=False)

    def add(self, keys: Tensor) -> None:
        self.keys = torch.cat([self.keys, keys]).unique()


def _inner(model: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile`` and the data-parallel wrappers make of it, so that
    its layers have the same names, and so the same random streams, with and without them."""
    while True:
        if isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


class TopologyUpdater:
    """Keeps the topology of a model changing while anybody's loop trains it.

        updater = TopologyUpdater(model, optimizer, method)
        ...
        loss.backward()
        if not updater.step():
            optimizer.step()

    Call ``step`` once for every optimizer step, after the backward passes of all its
    micro-batches. It returns True where the update takes the place of the optimizer's step (RigL).
    Recording is switched on by itself before the forward passes whose vectors the next update
    needs; a model compiled by ``torch.compile`` must be run eagerly while ``recording`` is true.

    With a ``GradScaler``, pass it, and guard both of its calls:

        if not updater.step():
            scaler.step(optimizer)
            scaler.update()

    (With ``scaler.unscale_``, for clipping, ``scaler.update()`` stands outside of the guard.)
    A step whose gradients hold inf or NaN, which the scaler skips, skips its update as well.

    audit: at every so many updates the growth strategy is compared with the exact search, layer by
    layer; ``audited`` is what came out at last. It takes the time of both searches and changes
    nothing. 0: never.

    Raises InputError when the method updates and the model has no sparse layer, or when the
    optimizer does not hold the layers' values (it was built before ``sparsify``).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        method: Method,
        *,
        scaler: GradScaler | None = None,
        audit: int = 0,
    ) -> None:
        model = _inner(model)
        self.layers: dict[str, SparseLayer] = sparse_layers(model)
        if not self.layers and not isinstance(method, Unchanging):
            raise InputError(
                f"{type(model).__name__} has no sparse layer to update: call sparsify on it first"
            )
        self.optimizer, self.method, self.audit = optimizer, method, audit
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, layer in self.layers.items():
            if id(layer.values) not in held:
                raise InputError(
                    f"the optimizer does not hold the values of layer {name!r}: build it after "
                    "sparsify"
                )
        scale = None if scaler is None else scaler.get_scale
        self._recorder = Recorder(model, self.layers, loss_scale=scale)
        # What earlier steps recorded that is searched together with what is to come.
        self._earlier: list[dict[str, Pairs]] = []
        self.steps = 0
        self.updates = 0
        self.skipped = 0
        self.last: Update | None = None
        self.audited: Audit | None = None
        # What growth decided once, and goes by from then on.
        self.choices: dict[str, str] = {}
        # What the method keeps from step to step, what that cost so far, and how long it took in
        # the last step.
        self.states: dict[str, Tensor] = {}
        self.observed_flops = 0
        self.observe_seconds = 0.0
        self._explored = {
            name: _Explored(layer.topology.keys()) for name, layer in self.layers.items()
        }
        self._arm()

    @property
    def recording(self) -> bool:
        """Whether the coming forward passes are recorded."""
        return self._recorder.recording

    @property
    def holds_records(self) -> bool:
        """Whether vectors of past steps wait for the next update; no checkpoint keeps them."""
        return bool(self._earlier) or not self._recorder.empty

    def step(self) -> bool:
        """Count a step and update the topology where one is due; see the class."""
        self.steps += 1
        due, observes = self.method.due(self.steps), self.method.observes and self.recording
        updated, self.observe_seconds = False, 0.0
        if due or observes:
            start = time.perf_counter()
            records = self._records()
            self._check_recorded(records)
            finite = self._all_finite(records)
            if observes and finite:
                self._observe(records)
                self.observe_seconds = time.perf_counter() - start
                start = time.perf_counter()
            if due and finite:
                self._update(records, start)
                updated = True
            self.skipped += due and not finite
            self._forget_records()
        elif not self._recorder.empty:
            self._earlier.append(self._recorder.records())
            self._recorder.clear()
        self._arm()
        return updated and self.method.skips_step

    def explored(self) -> dict[str, float]:
        """Share of each layer's connections that were ever alive, in blocks: R_s of in-time
        over-parameterisation (Liu et al. 2021)."""
        return {
            name: self._explored[name].keys.numel() / layer.topology.grid.size
            for name, layer in self.layers.items()
        }

    def explored_share(self) -> float:
        """R_s over all sparse layers together."""
        ever = sum(explored.keys.numel() for explored in self._explored.values())
        return ever / max(1, sum(layer.topology.grid.size for layer in self.layers.values()))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model and the optimizer."""
        if self.holds_records:
            raise RuntimeError("vectors of past steps wait for an update: save after it")
        return {
            "steps": self.steps,
            "updates": self.updates,
            "skipped": self.skipped,
            "observed_flops": self.observed_flops,
            "explored": {name: explored.keys for name, explored in self._explored.items()},
            "states": dict(self.states),
            "choices": dict(self.choices),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the model first."""
        if set(state["explored"]) != set(self.layers):
            raise InputError(
                "the checkpoint's sparse layers are not those of this model: "
                f"{sorted(set(state['explored']) ^ set(self.layers))} differ"
            )
        self.steps, self.skipped = int(state["steps"]), int(state["skipped"])
        self.updates = int(state["updates"])
        self.observed_flops = int(state["observed_flops"])
        self.choices = dict(state["choices"])
        self.states = {name: kept.to(self._device) for name, kept in state["states"].items()}
        for name, keys in state["explored"].items():
            device = self.layers[name].topology.cols.device
            self._explored[name] = _Explored(keys.to(device, torch.int64))
        self._forget_records()
        self._arm()

    def _arm(self) -> None:
        if self.method.recording(self.steps + 1):
            self._recorder.start()
        else:
            self._recorder.stop()
            # Nothing is searched any more (or nothing is observed): let go of what was kept.
            self.states = {}

    def _forget_records(self) -> None:
        self._earlier.clear()
        self._recorder.clear()

    def _records(self) -> dict[str, Pairs]:
        records = _joined([*self._earlier, self._recorder.records()], self.method.average_decay)
        if world_size() == 1:
            return records
        return {name: ReducedPairs(pairs) for name, pairs in records.items()}

    def _check_recorded(self, records: dict[str, Pairs]) -> None:
        """A worker that raised alone later on would leave the others waiting for it."""
        if world_size() == 1 or not self.method.recording(self.steps):
            return
        missing = sorted(set(self.layers) - set(records))
        if not everywhere(not missing, self._device):
            raise InputError(
                f"some worker did not record every sparse layer (missing here: {missing}): a layer "
                "that the forward of one worker does not use must be kept dense"
            )

    @property
    def _device(self) -> torch.device:
        return next(iter(self.layers.values())).values.device

    def _all_finite(self, records: dict[str, Pairs]) -> bool:
        device = next(iter(self.layers.values())).values.device
        # Of all parameters: a GradScaler skips the step for any one of them.
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
        finite = all(bool(g.isfinite().all()) for g in gradients if g is not None)
        return everywhere(finite, device) and all(p.is_finite() for p in records.values())

    def _observe(self, records: dict[str, Pairs]) -> None:
        observed = self.method.observe(self.layers, records, self.states)
        self.states = observed.states
        self.observed_flops += observed.flops

    def _update(self, records: dict[str, Pairs], start: float) -> None:
        changes = self.method.plan(self.layers, records, self.steps, self.states, self.choices)
        searched = time.perf_counter()
        check_agreement(changes, self._device)
        self.updates += 1
        searches = {k: v for change in changes.values() for k, v in change.searches.items()}
        for name, search in searches.items():
            if search.choice is not None:
                self.choices[name] = search.choice
        agreed = time.perf_counter()
        self._audit(records)
        audited = time.perf_counter()
        self._check_valid(changes)
        resized = [self._apply(name, change) for name, change in changes.items()]
        self.last = Update(
            self.steps,
            {name: change.grown.numel() for name, change in changes.items()},
            searched - start,
            time.perf_counter() - audited + agreed - searched,
            sum(change.flops for change in changes.values()),
            any(resized),
            searches,
        )

    def _audit(self, records: dict[str, Pairs]) -> None:
        if self.audit == 0 or self.updates % self.audit:
            return
        start = time.perf_counter()
        quality = self.method.audit(self.layers, records, self.steps, self.states, self.choices)
        self.audited = Audit(self.steps, quality, time.perf_counter() - start)

    def _check_valid(self, changes: Mapping[str, Change]) -> None:
        """Before any layer is changed, and with one look at the device for all of them."""
        valid = [self.layers[name].topology.valid(change) for name, change in changes.items()]
        if not valid or bool(torch.stack(valid).all()):
            return
        for (name, change), fine in zip(changes.items(), valid, strict=True):
            if not bool(fine):
                self.layers[name].topology.edit(change)  # says why not, and changes nothing

    @torch.no_grad()
    def _apply(self, name: str, change: Change) -> bool:
        """Returns whether the layer's values were reallocated."""
        layer = self.layers[name]
        capacity = layer.topology.capacity
        alive = layer.topology.alive - change.dropped.numel() + change.grown.numel()
        if alive > capacity:
            resize(layer, self.optimizer, alive)
        taken, freed = layer.topology.edit(change, validated=True)
        slots = torch.cat([taken, freed])
        layer.values[freed] = 0
        layer.values[taken] = self.method.initial_blocks(layer, name, taken, self.steps)
        if layer.values.grad is not None:
            # The gradient in these slots is that of the connections that were dropped.
            layer.values.grad[slots] = 0
        reset_slots(self.optimizer, layer.values, slots)
        self._explored[name].add(change.grown.to(layer.topology.cols.device))
        # Free slots are kept for what may grow again, unless they are more than the alive ones.
        if 2 * alive < layer.topology.capacity:
            resize(layer, self.optimizer, alive)
        return layer.topology.capacity != capacity


def _joined(steps: Sequence[Mapping[str, Pairs]], decay: float) -> dict[str, Pairs]:
    """The vectors of every layer over several steps, whose gradients decay from step to step."""
    joined: dict[str, Pairs] = {}
    for name in dict.fromkeys(name for step in steps for name in step):
        own = [step[name] for step in steps if name in step]
        joined[name] = own[0] if len(own) == 1 else JoinedPairs(own, decay)
    return joined
