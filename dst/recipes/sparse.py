"""Sparse training from scratch: build, make sparse, train while the topology changes."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from torch import nn

from dst.config import Config, parse_block, parse_interval, parse_skip
from dst.convert import density_ramp, sparsify
from dst.data import Dataset, steps_per_epoch
from dst.drop import CRITERIA
from dst.growing import growth_strategy
from dst.methods import METHODS, DropGrow, Method
from dst.recipes.fit import Fit
from dst.recipes.session import Session
from dst.recipes.setup import learning_rate, load_data, new_model, new_optimizer, new_scaler
from dst.report import Summary
from dst.schedules import UpdateSchedule
from dst.updater import TopologyUpdater
from growth import InputError

_log = logging.getLogger(__name__)


def sparse(session: Session) -> Summary:
    """``--method dense``, ``static`` and every drop/grow method."""
    config, device = session.config, session.device
    data = load_data(config)
    steps = steps_per_epoch(data.train, config.data.batch)
    total = steps * config.training.epochs
    rate = learning_rate(config, total)
    method = build_method(config, steps)
    torch.manual_seed(config.run.seed)
    ramps = isinstance(method, DropGrow)
    model = _model(config, data, device, ramps=ramps, weights=not session.resumes)
    method = _with_ramp(config, method, model, total)
    if config.training.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer, scaler = new_optimizer(config, model), new_scaler(config, device)
    updater = TopologyUpdater(
        model,
        optimizer,
        method,
        scaler=scaler if scaler.is_enabled() else None,
        audit=config.growth.audit,
    )
    fit = Fit(session, data, model, optimizer, scaler, updater, steps, total)
    resumed = session.restore()
    if resumed is not None:
        fit.load(*resumed)
    fit.run(rate)
    return fit.finish()


def build_method(config: Config, steps: int) -> Method:
    """The method of a config; what the user left open is the method's own. steps: per epoch."""
    entry, update = METHODS[config.method], config.update
    if entry.defaults is None:
        return entry.build(UpdateSchedule(1, 1, 1.0), config.run.seed)
    own = entry.defaults
    interval = parse_interval("update-interval", update.update_interval or own.interval, steps)
    total = steps * config.training.epochs
    end = own.end if update.update_end is None else update.update_end
    schedule = UpdateSchedule(
        interval,
        max(1, round(end * total)),
        own.fraction if update.update_fraction is None else update.update_fraction,
        update.update_decay or own.decay,
        update.update_average,
        # In low rank, the strategy decays by itself.
        1.0 if update.update_average_decay is None else update.update_average_decay,
    )
    if interval >= schedule.end:
        _log.warning(
            "the topology will never be updated: every %d steps, before step %d; lower "
            "--update-interval",
            interval,
            schedule.end,
        )
    method = entry.build(schedule, config.run.seed)
    assert isinstance(method, DropGrow)
    chosen: dict[str, Any] = {
        "regrow": update.regrow,
        "keep_regrown": update.keep_regrown,
        "grown_init": update.grown_init,
        "growth": growth_strategy(config),
    }
    if update.redistribute is not None:
        chosen["redistribute"] = update.redistribute
    if update.drop is not None:
        chosen["drop"] = CRITERIA[update.drop]
    if update.update_skips_step is not None:
        chosen["skips_step"] = update.update_skips_step
    if chosen.get("skips_step", method.skips_step) and interval == 1:
        raise InputError(
            "an update at every step that replaces the optimizer's step trains nothing: raise "
            "--update-interval or add --no-update-skips-step"
        )
    return dataclasses.replace(method, **chosen)


def _with_ramp(config: Config, method: Method, model: nn.Module, total: int) -> Method:
    """The method with the density ramp of a config, if there is one. total: steps of the run."""
    sparsity = config.sparsity
    if sparsity.density_start is None or not isinstance(method, DropGrow):
        return method
    last = method.schedule.last_update
    if last < 1:
        raise InputError(
            f"density-start {sparsity.density_start} needs updates to reach density "
            f"{sparsity.density}, and there are none: lower --update-interval"
        )
    end = last
    if sparsity.density_ramp_end is not None:
        end = min(last, max(1, round(sparsity.density_ramp_end * total)))
    ramp = density_ramp(
        model,
        to=sparsity.density,
        end=end,
        distribution=sparsity.distribution,
        shape=sparsity.density_ramp,
    )
    return dataclasses.replace(method, ramp=ramp)


def _model(
    config: Config, data: Dataset, device: torch.device, *, ramps: bool, weights: bool
) -> nn.Module:
    """Made sparse on the device, for which the products' way of computing is chosen. ramps: whether
    the method can lead one density to another."""
    model = new_model(config, data, device, weights=weights)
    if not METHODS[config.method].sparse:
        return model
    sparsity = config.sparsity
    start = sparsity.density_start if ramps else None
    return sparsify(
        model,
        density=sparsity.density if start is None else start,
        ramp_to=None if start is None else sparsity.density,
        distribution=sparsity.distribution,
        block=parse_block(sparsity.block),
        skip=parse_skip(sparsity.skip),
        init=sparsity.init,
        compute=sparsity.compute,
        seed=config.run.seed,
    )
