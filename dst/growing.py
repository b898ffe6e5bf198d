"""The growth strategy that the options of a run describe."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from dst.methods import entry_of
from growth import STRATEGIES, Averaged, InputError, Strategy

if TYPE_CHECKING:
    from dst.config import Config

# Options that are called otherwise than the strategy's own field.
_FIELDS = {"momentum": "decay"}
# Fields of GrowthConfig that are no strategy's.
_NOT_OPTIONS = {"strategy", "audit"}


def strategy_name(config: Config) -> str | None:
    """Of the strategy, the method's own by default; None for a method that grows nothing."""
    growths = entry_of(config.method).growths
    return (config.growth.strategy or growths[0]) if growths else None


def growth_strategy(config: Config) -> Strategy | None:
    """The strategy, with the options that were given; None for a method that grows nothing.

    Raises InputError for an option that the strategy does not have or that it refuses, and
    MissingLibraryError where it needs a library that is not there.
    """
    name = strategy_name(config)
    if name is None:
        return None
    own = fields_of(name)
    given = {
        option: value
        for option, value in dataclasses.asdict(config.growth).items()
        if option not in _NOT_OPTIONS and value is not None
    }
    for option in given:
        if _FIELDS.get(option, option) not in own:
            flag = option.replace("_", "-")
            able = ", ".join(n for n in STRATEGIES if _FIELDS.get(option, option) in fields_of(n))
            raise InputError(
                f"growth {name} has no {flag}, which is for {able}: leave --growth.{flag} away"
            )
    options: dict[str, Any] = {_FIELDS.get(option, option): v for option, v in given.items()}
    strategy: Strategy = STRATEGIES[name](**options)
    return _averaged(config, name, strategy)


def fields_of(name: str) -> dict[str, Any]:
    """The options of a strategy and their defaults."""
    return {field.name: field.default for field in dataclasses.fields(STRATEGIES[name])}


def _averaged(config: Config, name: str, strategy: Strategy) -> Strategy:
    update = config.update
    rank, decay = update.update_average_rank, update.update_average_decay
    if rank is None and decay is None:
        return strategy
    if strategy.observes or not strategy.needs_pairs:
        why = "averages by itself" if strategy.observes else "searches no vectors"
        raise InputError(
            f"growth {name} {why}: leave --update-average-rank and --update-average-decay away"
        )
    if rank is None:
        if update.update_average == 1:
            raise InputError(
                f"update-average-decay {decay} has nothing to decay: give --update-average=N or "
                "--update-average-rank=R as well"
            )
        return strategy
    if update.update_average > 1:
        raise InputError(
            "update-average-rank averages over every step: leave --update-average away"
        )
    return Averaged(strategy, rank) if decay is None else Averaged(strategy, rank, decay)


def check_blocks(strategy: Strategy, block: tuple[int, int]) -> None:
    """Raise InputError where it cannot search blocks of this size: it says so by itself, even
    when it is asked for nothing."""
    nothing = torch.zeros(1, 1)
    strategy((nothing, nothing), 0, torch.empty(0, dtype=torch.int64), block=block)
