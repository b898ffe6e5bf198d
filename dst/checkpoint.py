"""One file that continues a run bit for bit: tensors as safetensors, all else as JSON in its
header. Nothing is pickled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from growth import InputError

# Raise it whenever a run that was saved before could not go on.
FORMAT = "sparsegrow-checkpoint-5"


def save(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write under a temporary name, flush to disk, then rename: a crash or a full disk leaves the
    checkpoint that was there. Raises OSError."""
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(state, allow_nan=False)
    temporary = path.with_name(f".{path.name}.writing")
    header = {"format": FORMAT, "state": text, "sha256": _digest(own, text)}
    try:
        save_file(own, temporary, metadata=header)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise
        raise OSError(str(error)) from error


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of a checkpoint that :func:`save` wrote, checked by its digest.

    Raises InputError for a file that is missing, truncated, foreign or damaged.
    """
    # Unlike Path.is_file, False where the folder may not be entered.
    if not os.path.isfile(path):
        raise InputError(f"no checkpoint at {path}: the run was stopped before its first")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the checkpoint {path} is truncated, damaged or not one at all ({error}): restore it "
            "from a copy or start the run anew"
        ) from None
    if header.get("format") != FORMAT:
        raise InputError(
            f"{path} is a safetensors file, but not a checkpoint of this version (format "
            f"{header.get('format')!r}, expected {FORMAT!r})"
        )
    text = header.get("state", "")
    if header.get("sha256") != _digest(tensors, text):
        raise InputError(
            f"the checkpoint {path} is damaged: its digest does not match its content; restore it "
            "from a copy or start the run anew"
        )
    return tensors, json.loads(text)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def split_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by ``index/name``, and what is not a tensor."""
    state = optimizer.state_dict()
    tensors, rest = {}, {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{name}"] = value
            else:
                rest[f"{index}/{name}"] = value
    return tensors, {"state": rest, "param_groups": state["param_groups"]}


def join_optimizer(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Load what :func:`split_optimizer` gave. Raises InputError where it does not fit."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *rest["state"].items()]:
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = value
    try:
        optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
    except (ValueError, KeyError) as error:
        raise InputError(f"the checkpoint's optimizer does not fit this run: {error}") from None
