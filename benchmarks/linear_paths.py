"""Where the sparse path of a linear layer beats the scattered dense one: one full training step
(forward and both gradients), medians of interleaved runs, as a ratio within one process.

    python benchmarks/linear_paths.py

``triton_kernels/costs.py`` takes its break-even density from ``results/linear_paths.csv``.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import record
import torch

from dst import SparseLinear

REPEATS = 15
SIZES = (512, 2048)
BATCHES = (64, 256)
DENSITIES = (0.02, 0.05, 0.1, 0.2)
BLOCKS = (1, 16, 32)


def step_of(layer: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(dy)

    return step


def measure(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median milliseconds of each, interleaved so that all meet the same neighbours."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(REPEATS + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    rows = []
    for n in SIZES:
        for batch in BATCHES:
            x, dy = torch.randn(batch, n, requires_grad=True), torch.randn(batch, n)
            for block in BLOCKS:
                for density in DENSITIES:
                    layer = SparseLinear(n, n, bias=False, density=density, block=(block, block))
                    steps = {"nn.Linear": step_of(torch.nn.Linear(n, n, bias=False), x, dy)}
                    for compute in ("dense", "sparse"):
                        twin = SparseLinear(
                            n,
                            n,
                            bias=False,
                            keys=layer.topology.keys(),
                            block=(block, block),
                            compute=compute,
                        )
                        steps[compute] = step_of(twin, x, dy)
                    ms = measure(steps)
                    row = {"n": n, "batch": batch, "block": block, "density": density}
                    row.update({f"{name} ms": round(value, 3) for name, value in ms.items()})
                    row["sparse/scattered"] = round(ms["sparse"] / ms["dense"], 3)
                    row["threads"] = torch.get_num_threads()
                    rows.append(row)
                    print(row, flush=True)
    print(record.append("linear_paths", rows))


if __name__ == "__main__":
    main()
