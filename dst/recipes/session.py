"""What every recipe is handed: the config, the device, the run's folder and its tools."""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from dst import checkpoint, tracking
from dst.config import Config
from dst.errors import StoppedError
from dst.timing import Stopwatch
from growth import InputError

CHECKPOINT = "checkpoint.safetensors"


@dataclass
class Session:
    """One run in progress.

    folder: where the first worker writes; None on the others. checkpoint: the file to resume from,
    or None for a new run. clock: seconds by part, of all attempts of the run together.
    """

    config: Config
    device: torch.device
    folder: Path | None
    checkpoint: Path | None
    console: Console
    clock: Stopwatch = field(default_factory=Stopwatch)
    tracker: tracking.Tracker | None = None
    started: float = field(default_factory=time.perf_counter)
    starting: bool = True

    def started_up(self) -> None:
        """Training begins: what came before was the start-up. Nothing at a second call."""
        if self.starting:
            self.clock.add("start-up", time.perf_counter() - self.started)
            self.starting = False

    @property
    def resumes(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self.checkpoint is not None and os.path.exists(self.checkpoint)

    def to_device(self, images: Tensor) -> Tensor:
        """A batch, in the memory order that the run wants."""
        last = self.config.training.channels_last
        order = torch.channels_last if last else torch.preserve_format
        return images.to(self.device, non_blocking=True, memory_format=order)

    def autocast(self) -> torch.autocast:
        amp = self.config.training.amp
        dtype = torch.float16 if amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=amp != "off")

    def open_tracker(self, wandb_id: str | None = None) -> None:
        """Call once the recipe knows that nothing is wrong with its input."""
        if self.folder is None:
            return
        run = self.config.run
        wandb_run = tracking.start_wandb(
            run.wandb, run.wandb_project, self.folder, dataclasses.asdict(self.config), wandb_id
        )
        self.tracker = tracking.Tracker(self.folder, wandb_run)

    def log(self, kind: str, step: int, **values: Any) -> None:
        if self.tracker is not None:
            try:
                self.tracker.log(kind, step, **values)
            except OSError as error:
                raise self.disk_error("the metrics", error) from None

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write the checkpoint, with every random state; only the first worker does."""
        if self.folder is None or self.tracker is None:
            return
        tensors = {**tensors, "random/cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            **state,
            "seconds": self.clock.seconds,
            "metrics_bytes": self.tracker.position,
            "wandb_id": self.tracker.wandb_id,
        }
        try:
            checkpoint.save(self.folder / CHECKPOINT, tensors, state)
        except OSError as error:
            raise self.disk_error("the checkpoint", error) from None

    def restore(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and state of the checkpoint to resume from; None for a run that starts.

        A run that was stopped before its first checkpoint starts over.
        """
        if self.checkpoint is None or not self.resumes:
            self.open_tracker()
            if self.tracker is not None:
                self.tracker.rewind(0)
            return None
        tensors, state = checkpoint.load(self.checkpoint)
        self.open_tracker(state["wandb_id"])
        self.clock.seconds.update(state["seconds"])
        return tensors, state

    def go_on(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Call last, when everything else is loaded: forgets the metrics after the checkpoint, and
        restores the random state, from which building a model draws."""
        if self.tracker is not None:
            self.tracker.rewind(state["metrics_bytes"])
        torch.set_rng_state(tensors["random/cpu"])
        if self.device.type == "cuda":
            if "random/cuda" not in tensors:
                raise InputError("the checkpoint was made on a CPU: resume it with --device cpu")
            torch.cuda.set_rng_state(tensors["random/cuda"], self.device)

    def close(self, failed: bool = False) -> None:
        if self.tracker is not None:
            self.tracker.close(failed)
            self.tracker = None

    def disk_error(self, what: str, error: OSError) -> StoppedError:
        """The disk is full, or gone."""
        return StoppedError(
            f"cannot write {what} in {self.folder}: {error.strerror or error}; free some space, "
            f"then --resume {self.folder}{self.kept()}"
        )

    def kept(self) -> str:
        """What stands of the run so far, for the end of a message."""
        if self.folder is not None and (self.folder / CHECKPOINT).exists():
            return " (its last checkpoint is intact)"
        return ""
