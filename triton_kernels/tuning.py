"""How block kernels are cut into programs: a table measured on the GPU at hand, else heuristics.

There is no autotuner: it would stall whenever a layer's shape is new. ``benchmarks/tune.py``
measures a table, ``tuned/<device>.json``; :func:`overridden` sets one kernel by hand.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

TABLES = Path(__file__).parent / "tuned"
# What every GPU with tensor cores has, where a device does not say.
SHARED_BYTES = 64 << 10


class Launch(NamedTuple):
    """tile_m: samples (positions, of a convolution) that a program of a product takes; in a weight
    gradient, that one step takes.
    tile_k: inputs that one step of a product takes, several blocks or a part of one; in a weight
    gradient, that a program takes, whole blocks of one row.
    num_warps, num_stages: warps of a program, stages of its software pipeline.
    All but the last are powers of two.
    """

    tile_m: int
    tile_k: int
    num_warps: int
    num_stages: int


_overrides: dict[str, Launch] = {}


@contextmanager
def overridden(launches: Mapping[str, Launch]) -> Iterator[None]:
    """Inside, the kernels of these names are launched so, in every thread: autograd has its own."""
    before = dict(_overrides)
    _overrides.update(launches)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def launch(
    kernel: str, block: tuple[int, int], dtype: torch.dtype, batch: int, device: torch.device
) -> Launch:
    """kernel: ``forward``, ``input_gradient`` or ``weight_gradient``, or one of these after a
    prefix and an underscore, such as ``conv_forward``. batch: samples or positions.

    Raises ValueError when an override or a table holds what the kernel cannot run.
    """
    if kernel in _overrides:
        return checked(kernel, block, _overrides[kernel])
    # Batches of one power of two are cut alike, so that few of them reach the table.
    return _launch(kernel, block, dtype, power_of_two(batch), device)


@functools.cache
def _launch(
    kernel: str, block: tuple[int, int], dtype: torch.dtype, batch: int, device: torch.device
) -> Launch:
    name, shared_bytes = _facts(device)
    table = read_table(name).get(key(kernel, block, dtype))
    if table:
        nearest = min(table, key=lambda tuned: abs(tuned.bit_length() - batch.bit_length()))
        return checked(kernel, block, table[nearest])
    return heuristic(kernel, block, dtype, batch, shared_bytes)


def heuristic(
    kernel: str,
    block: tuple[int, int],
    dtype: torch.dtype,
    batch: int,
    shared_bytes: int = SHARED_BYTES,
) -> Launch:
    """As large as keeps a program free of spills, and no larger than the batch.

    shared_bytes: of shared memory that a program may have.
    """
    # Exact float32 has no tensor cores, and a longer step would be unrolled into more registers.
    half = dtype != torch.float32
    samples = max(16, power_of_two(batch))
    if kernel.endswith("weight_gradient"):
        tile_m = min(samples, 64 if half else 16)
        tile_k = max(block[1], 128 if half else 64)
        warps = 8 if tile_k * block[0] > 128 * 64 else 4
        step = tile_m * (tile_k + block[0]) * dtype.itemsize
        stages = max(2, min(4 if warps == 4 else 3, shared_bytes // step))
        return Launch(tile_m, tile_k, warps, stages)
    side_out = block[1] if kernel.endswith("input_gradient") else block[0]
    tile_m = min(samples, 128 if half else 64)
    tile_k = 64 if half else 32
    # A convolution needs registers for its positions and taps beside the sums.
    most = 64 * 64 if kernel.startswith("conv_") else 128 * 64
    warps = 8 if tile_m * side_out > most else 4
    step = (tile_m + side_out) * tile_k * dtype.itemsize
    # Which block comes next is itself loaded, and every second stage goes to that: five stages hold
    # up to three steps, and should leave room for another program.
    return Launch(tile_m, tile_k, warps, 5 if 4 * step <= shared_bytes else 3)


def checked(kernel: str, block: tuple[int, int], chosen: Launch) -> Launch:
    """The same launch, or ValueError when this kernel cannot run with it."""
    tile_m, tile_k, num_warps, num_stages = chosen
    least = block[1] if kernel.endswith("weight_gradient") else 16
    if (
        tile_m < 16
        or tile_k < least
        or num_stages < 1
        or any(n < 1 or n & (n - 1) for n in (tile_m, tile_k, num_warps))
    ):
        raise ValueError(
            f"{kernel} of {block[0]}x{block[1]} blocks cannot run with {chosen}: tile_m from 16, "
            f"tile_k from {least} and num_warps must be powers of two, num_stages positive"
        )
    return chosen


def power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def key(kernel: str, block: tuple[int, int], dtype: torch.dtype) -> str:
    """What a table files its launches under, such as ``forward 32x32 bfloat16``."""
    return f"{kernel} {block[0]}x{block[1]} {str(dtype).removeprefix('torch.')}"


def table_path(device_name: str) -> Path:
    return TABLES / (re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json")


def read_table(device_name: str) -> dict[str, dict[int, Launch]]:
    """{key: {batch: launch}}, as tuned on a GPU of this name; empty where nobody did.

    Raises ValueError when the file is damaged.
    """
    path = table_path(device_name)
    if not device_name or not path.is_file():
        return {}
    try:
        return {
            name: {int(batch): Launch(*map(int, numbers)) for batch, numbers in by_batch.items()}
            for name, by_batch in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a table of launches ({error}): delete it, or measure it again with "
            "benchmarks/tune.py"
        ) from error


def write_table(device_name: str, table: Mapping[str, Mapping[int, Launch]]) -> Path:
    """One line a key, so that tables can be read and compared; returns the file."""
    path = table_path(device_name)
    path.parent.mkdir(exist_ok=True)
    lines = [f"  {json.dumps(name)}: {json.dumps(by)}" for name, by in sorted(table.items())]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    _launch.cache_clear()
    return path


@functools.cache
def _facts(device: torch.device) -> tuple[str, int]:
    """Name, and bytes of shared memory of a program; the interpreter's device has no name."""
    if device.type != "cuda":
        return "", SHARED_BYTES
    properties = torch.cuda.get_device_properties(device)
    return properties.name, getattr(
        properties, "shared_memory_per_block_optin", properties.shared_memory_per_block
    )
