"""The metrics of a run: JSON lines in its folder, and Weights & Biases if asked for."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any, cast

from growth import InputError, MissingLibraryError

METRICS = "metrics.jsonl"
# What a line is of, where that is more than its kind.
_NAMES = ("phase", "score", "scope", "keep")


class Tracker:
    """Appends one JSON object a line to ``metrics.jsonl``; mirrors numbers to W&B.

    Every line has a ``kind``: ``update`` (a topology update), ``audit`` (of its searches),
    ``epoch``, ``phase`` (of a recipe), ``curve`` (accuracy after pruning) or ``final``; what
    depends on the clock, or is measured of memory, stands under ``time``, so that the rest of two
    equal runs is equal.
    """

    def __init__(self, folder: Path, wandb_run: Any | None = None) -> None:
        self.path = folder / METRICS
        self._wandb = wandb_run
        # Unbuffered: what could not be written must not be tried again on closing.
        self._file = self.path.open("ab", buffering=0)

    @property
    def position(self) -> int:
        """Bytes written so far; a checkpoint keeps it."""
        return self._file.tell()

    @property
    def wandb_id(self) -> str | None:
        return None if self._wandb is None else self._wandb.id

    def rewind(self, position: int) -> None:
        """Forget what an interrupted run wrote after its last checkpoint."""
        if position > self.path.stat().st_size:
            raise InputError(
                f"{self.path} is shorter than at the checkpoint: restore it, or start the run anew"
            )
        self._file.truncate(position)
        self._file.seek(position)

    def log(self, kind: str, step: int, **values: Any) -> None:
        line = json.dumps(_without_nan({"kind": kind, "step": step, **values}), allow_nan=False)
        data = line.encode() + b"\n"
        if self._file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._wandb is not None:
            # Several of a kind at one step are told apart by what they are of.
            parts = [kind, *(str(values[name]) for name in _NAMES if name in values)]
            prefix = "/".join(parts)
            flat = {f"{prefix}/{name}": value for name, value in _flatten(values).items()}
            if kind == "final":
                self._wandb.summary.update(flat)
            else:
                self._wandb.log(flat, step=step)

    def close(self, failed: bool = False) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))


def read(folder: Path) -> list[dict[str, Any]]:
    """Every line of a run's metrics."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def start_wandb(
    mode: str, project: str, folder: Path, config: dict[str, Any], run_id: str | None
) -> Any | None:
    """A W&B run, or None. ``auto`` is online under a sweep agent and off otherwise; an own
    WANDB_MODE in the environment wins there."""
    if mode == "auto":
        if "WANDB_SWEEP_ID" not in os.environ:
            return None
        mode = os.environ.get("WANDB_MODE", "online")
    if mode == "off":
        return None
    try:
        import wandb
    except ImportError as error:
        raise MissingLibraryError("wandb", "wandb", f"--wandb {mode}") from error
    try:
        return wandb.init(
            project=project,
            name=folder.name,
            dir=str(folder),
            config=config,
            mode=cast(Any, mode),
            id=run_id,
            resume="allow",
        )
    except wandb.errors.Error as error:
        words = " ".join(str(error).split())
        raise InputError(
            f"W&B did not start ({words}): run wandb login, or --wandb=offline"
        ) from None


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}/"))
        elif isinstance(value, int | float):
            flat[f"{prefix}{name}"] = value
    return flat
