"""What the cost model knows of a machine: measured there by ``python -m triton_kernels.calibrate``,
or else shipped, from another one. Nothing is measured here, so that a choice depends on a file
alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import tempfile
import warnings
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from triton_kernels import shipped

# Of what ``costs`` counts and of the kernels: one more whenever older figures are of no use.
MODEL = 3
# By the smaller side of blocks, for a GPU on which nothing was measured, as yet any: half of the
# density at which the rooflines of an H200 in half precision meet.
BREAK_EVEN = {1: 0.005, 16: 0.055, 32: 0.1, 64: 0.17, 128: 0.25}

# Whose figures serve the processors of makers without any.
DEFAULT_MAKER = next(iter(shipped.NS))

Sides = dict[int, tuple[float, ...]]


class OnCpu(NamedTuple):
    """ns: nanoseconds of the parts of a ``costs.Work``, by its form and side. own: whether they
    were measured on this machine."""

    ns: Mapping[str, Sides]
    own: bool


class OnGpu(NamedTuple):
    """break_even: highest density at which the sparse products are taken, by the smaller side of
    blocks. own: whether it was measured on this machine."""

    break_even: Mapping[int, float]
    own: bool


def on_cpu() -> OnCpu:
    """For as many threads as PyTorch has now."""
    return _on_cpu(folder(), torch.get_num_threads())


def on_gpu() -> OnGpu:
    """Of the current device."""
    return _on_gpu(folder(), torch.cuda.get_device_name() if torch.cuda.is_available() else "")


@functools.cache
def _on_cpu(where: Path, threads: int) -> OnCpu:
    found = _read(where, cpu(threads), _checked_ns)
    known = shipped.NS.get(maker(), shipped.NS[DEFAULT_MAKER])
    return OnCpu(known, False) if found is None else OnCpu({**known, **found}, True)


@functools.cache
def _on_gpu(where: Path, name: str) -> OnGpu:
    found = _read(where, gpu(name), _checked_break_even) if name else None
    if found is None:
        return OnGpu(BREAK_EVEN, False)
    return OnGpu({**BREAK_EVEN, **found}, True)


def cpu(threads: int) -> dict[str, Any]:
    """The machine that figures hold for, when PyTorch has so many threads."""
    return {
        **{"processor": _processor(), "threads": threads, "torch": torch.__version__},
        **{"numba": find_spec("numba") is not None, "model": MODEL},
    }


def gpu(name: str) -> dict[str, Any]:
    return {"processor": name, "torch": torch.__version__, "model": MODEL}


def folder() -> Path:
    """Of this user: ``$SPARSEGROW_CACHE``, or as the XDG directories have it."""
    return _folder(
        *(os.environ.get(name) for name in ("SPARSEGROW_CACHE", "XDG_CACHE_HOME", "HOME"))
    )


# Every step of a scattered layer asks.
@functools.cache
def _folder(own: str | None, caches: str | None, home: str | None) -> Path:
    if own:
        return Path(own)
    return Path(caches or os.path.expanduser("~/.cache")) / "sparsegrow"


def path_of(where: Path, machine: Mapping[str, Any]) -> Path:
    """A file a machine: a home may be shared by several."""
    key = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()
    return where / f"products-{key[:16]}.json"


def write(machine: Mapping[str, Any], figures: Mapping[str, Any]) -> Path:
    """Keep what was measured, ``{"ns": ...}`` or ``{"break_even": ...}``. Raises OSError."""
    path = path_of(folder(), machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.now(timezone.utc).date().isoformat()
    text = json.dumps({"machine": machine, "measured": date, **figures}, indent=1) + "\n"
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    _on_cpu.cache_clear()
    _on_gpu.cache_clear()
    return path


def _read(where: Path, machine: Mapping[str, Any], checked: Any) -> Any:
    """What was measured on it, or None; a warning where that cannot be used."""
    path = path_of(where, machine)
    try:
        with path.open(encoding="utf-8") as file:
            found = json.load(file)
        if found["machine"] != machine:
            raise ValueError("it is of another machine")
        return checked(found)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"{path} holds no figures of this machine ({error}), so that compute='auto' takes the "
            "shipped ones: delete it, or measure again with python -m triton_kernels.calibrate",
            stacklevel=2,
        )
        return None


def _checked_ns(found: Mapping[str, Any]) -> dict[str, Sides]:
    ns = {
        form: {int(side): tuple(map(_positive, each)) for side, each in sides.items()}
        for form, sides in found["ns"].items()
    }
    for form, sides in ns.items():
        parts = {
            len(each) for forms in shipped.NS.values() for each in forms.get(form, {}).values()
        }
        if not sides or {len(each) for each in sides.values()} != parts:
            raise ValueError(f"{form} has {sides}")
    return ns


def _checked_break_even(found: Mapping[str, Any]) -> dict[int, float]:
    return {int(side): _positive(density) for side, density in found["break_even"].items()}


def _positive(number: Any) -> float:
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{number} is neither a time nor a density")
    return float(number)


def maker() -> str:
    """Who made this processor, as /proc/cpuinfo has it; nothing where there is none."""
    return _cpuinfo("vendor_id")


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@functools.cache
def _cpuinfo(name: str) -> str:
    """Of the first processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
