"""A run from its config to its report."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from dst import tracking
from dst.config import Config, check, to_json
from dst.distributed import rank
from dst.errors import StoppedError
from dst.recipes import RECIPES
from dst.recipes.session import CHECKPOINT, Session
from dst.report import Summary
from growth import InputError


def run(config: Config) -> Summary:
    """Train as ``config`` says, into a folder of its own; returns the final figures.

    The folder, ``<out>/<name>``, gets ``config.json``, ``metrics.jsonl``, the checkpoint and
    ``report.md`` with its plots. Under ``torchrun`` every process calls this; the first one writes.

    Raises InputError for a config that cannot be, StoppedError when the run cannot go on.
    """
    check(config)
    device = _device(config.run.device)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    joined = _join_workers(device)
    folder: Path | None = None
    session: Session | None = None
    try:
        chief = rank() == 0
        resume = None if config.run.resume is None else Path(config.run.resume)
        if chief:
            folder = _open_folder(config) if resume is None else _existing_folder(resume)
        session = Session(
            config=config,
            device=device,
            folder=folder,
            checkpoint=None if resume is None else resume / CHECKPOINT,
            console=Console(quiet=not chief, stderr=False),
        )
        return RECIPES[config.method](session)
    except KeyboardInterrupt:
        kept = config.run.resume or folder
        how = f"; go on with --resume {kept}" if kept else ""
        raise StoppedError(f"stopped{how}") from None
    except BaseException:
        if folder is not None and config.run.resume is None and _is_untouched(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if session is not None:
            session.close(failed=sys.exc_info()[0] is not None)
        if joined:
            dist.destroy_process_group()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} is unknown: choose auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r} is not there: PyTorch sees no GPU; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise InputError(f"device cuda:{index} is not there: {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def _join_workers(device: torch.device) -> bool:
    """Join the process group that ``torchrun`` describes; False outside of it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return False
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except ValueError as error:
        raise InputError(f"RANK and WORLD_SIZE are set, but {error}: use torchrun") from None
    return True


def _open_folder(config: Config) -> Path:
    """Make the run's folder and write its config; never touches a folder that is there."""
    out = Path(config.run.out)
    unnamed = f"{config.method}-{config.model}-{config.data.data}-{config.run.seed}"
    # timm:NAME and folder:PATH hold what no folder's name should.
    base = config.run.name or re.sub(r"[^\w.-]+", "-", unnamed)
    if config.run.name is not None and Path(base).name != base:
        raise InputError(f"name {base!r} must be a folder's name; --out says where it stands")
    try:
        out.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            folder = out / (base if config.run.name is not None else f"{base}-{number}")
            try:
                folder.mkdir()
                break
            except FileExistsError:
                if config.run.name is not None:
                    raise InputError(
                        f"{folder} is there already: continue it by --resume {folder}, or choose "
                        "another --name"
                    ) from None
                number += 1
        own = dataclasses.replace(config.run, name=folder.name, resume=None, config=None)
        (folder / "config.json").write_text(to_json(dataclasses.replace(config, run=own)))
    except OSError as error:
        raise InputError(f"cannot make the run's folder in {out}: {error.strerror}") from None
    logging.getLogger(__name__).info("run folder %s", folder)
    return folder


def _existing_folder(folder: Path) -> Path:
    if not os.path.isfile(folder / "config.json"):
        raise InputError(f"{folder} is not the folder of a run: it has no config.json")
    return folder


def _is_untouched(folder: Path) -> bool:
    """Whether a run that failed left nothing worth keeping: no metrics, no checkpoint."""
    metrics = folder / tracking.METRICS
    kept = metrics.exists() and metrics.stat().st_size > 0
    return not kept and not (folder / CHECKPOINT).exists()
