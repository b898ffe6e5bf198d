"""Measures how the block-sparse kernels are best cut on the GPU at hand, and writes the table that
``triton_kernels/tuning.py`` then takes in place of its heuristics.

    python benchmarks/tune.py [--features 4096] [--density 0.1]

Every candidate is timed on a square layer with alive blocks drawn at random; among those whose
median is within one percent of the best, the one nearest to what is used now is kept. Some 2000
kernels are compiled.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from triton_kernels import block_sparse, tuning
from triton_kernels.tuning import Launch

BLOCKS = [(side, side) for side in block_sparse.SIDES]
DTYPES = (torch.bfloat16, torch.float32)
BATCHES = (64, 512, 4096)
REPEATS = 20


def candidates(kernel: str, block: tuple[int, int], batch: int) -> Iterator[Launch]:
    """Up to 105 that the kernel can run, with 16 to 128 sums a thread if the batch has so many."""
    most = max(16, tuning.power_of_two(batch))
    for tile_m, tile_k, warps, stages in itertools.product(
        (32, 64, 128, 256), (32, 64, 128, 256), (4, 8), (2, 3, 4, 5, 7)
    ):
        if kernel == "weight_gradient":
            possible, sums = block[1] <= tile_k and tile_m < 256, tile_k * block[0]
            enough = 16
        else:
            possible, sums = tile_k < 256, tile_m * block[kernel == "input_gradient"]
            enough = 16 if tile_m < most else 0
        if possible and tile_m <= most and enough <= sums / (32 * warps) <= 128:
            yield Launch(tile_m, tile_k, warps, stages)


def products(
    features: int, density: float, block: tuple[int, int], dtype: torch.dtype, batch: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """The three products of one layer, by the kernel's name."""
    n_rows, n_cols = -(-features // block[0]), -(-features // block[1])
    alive = torch.rand(n_rows, n_cols, device="cuda") < density
    slots = (alive.flatten().cumsum(0) - 1).view_as(alive).int()
    count = int(alive.sum())

    def order(alive: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
        offsets = torch.nn.functional.pad(alive.sum(1).cumsum(0), (1, 0)).int()
        return offsets, alive.nonzero()[:, 1].int(), slots[alive]

    rows, cols = order(alive, slots), order(alive.T, slots.T)
    values = torch.randn(count, *block, device="cuda", dtype=dtype)
    x, dy = torch.randn(2, batch, features, device="cuda", dtype=dtype)
    return {
        "forward": lambda: block_sparse.forward(x, values, *rows, features),
        "input_gradient": lambda: block_sparse.input_gradient(dy, values, *cols, features),
        "weight_gradient": lambda: block_sparse.weight_gradient(x, dy, *rows, count, block),
    }


def milliseconds(product: Callable[[], torch.Tensor]) -> float:
    """Median, between events on the device, the level-2 cache emptied before each."""
    flushed = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(REPEATS + 3):
        flushed.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        product()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def best(
    kernel: str,
    block: tuple[int, int],
    dtype: torch.dtype,
    batch: int,
    product: Callable[[], torch.Tensor],
) -> Launch:
    from triton.runtime.errors import OutOfResources

    device = torch.device("cuda", torch.cuda.current_device())
    usual = tuning.launch(kernel, block, dtype, batch, device)
    times = {usual: milliseconds(product)}
    for launch in candidates(kernel, block, batch):
        try:
            with tuning.overridden({kernel: launch}):
                times[launch] = milliseconds(product)
        except OutOfResources:
            continue
    good = [launch for launch, time in times.items() if time <= 1.01 * min(times.values())]

    def distance(launch: Launch) -> int:
        return sum(abs(a.bit_length() - b.bit_length()) for a, b in zip(launch, usual, strict=True))

    chosen = min(good, key=distance)
    print(
        f"{tuning.key(kernel, block, dtype)}, batch {batch}: {tuple(chosen)} "
        f"{times[chosen]:.3f} ms, before {tuple(usual)} {times[usual]:.3f} ms"
    )
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--density", type=float, default=0.1)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "there is no GPU to tune for: run this where torch.cuda.is_available()", file=sys.stderr
        )
        raise SystemExit(2)
    name = torch.cuda.get_device_name()
    table = tuning.read_table(name)
    for block, dtype, batch in itertools.product(BLOCKS, DTYPES, BATCHES):
        made = products(options.features, options.density, block, dtype, batch)
        for kernel, product in made.items():
            launch = best(kernel, block, dtype, batch, product)
            table.setdefault(tuning.key(kernel, block, dtype), {})[batch] = launch
        # What is found is kept, should the rest be interrupted.
        print(f"written: {tuning.write_table(name, table)}")


if __name__ == "__main__":
    main()
