"""Training steps of a sparse network against its dense twin: images a second, and peak memory.

    python benchmarks/end_to_end.py        # some minutes

``mlp``: 784-4096-4096-10, density 0.05 in blocks of 32, first layer included, batch 256, SGD with
momentum. ``wrn``: WideResNet-28-10, density 0.1 in blocks of 16, 32 x 32 images. Times are medians
of steps in turns within one process; memory is the peak of the resident set beyond the imports and
a first small step, of processes of their own that make the network and train three steps, median ->
results/end_to_end.csv.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import record
import torch
from torch import nn

from dst.convert import sparsify
from dst.layers import SparseLinear
from dst.models import build
from growth.peak_memory import PeakMemory

STEPS = {"mlp": 15, "wrn": 3}
PEAKS = {"mlp": 5, "wrn": 1}
WAYS = ("sparse", "scattered", "dense")


def network(name: str, way: str) -> nn.Module:
    torch.manual_seed(0)
    compute = {"sparse": "auto", "scattered": "dense", "dense": "dense"}[way]
    if name == "mlp":

        def layer(n_in: int, n_out: int) -> nn.Module:
            if way == "dense":
                return nn.Linear(n_in, n_out)
            # Never dense, not even at first.
            generator = torch.Generator().manual_seed(n_in)
            how: dict[str, Any] = {"density": 0.05, "block": (32, 32), "compute": compute}
            return SparseLinear(n_in, n_out, generator=generator, **how)

        return nn.Sequential(
            *(layer(784, 4096), nn.ReLU(), layer(4096, 4096), nn.ReLU()), nn.Linear(4096, 10)
        )
    model = build("wrn-28-10", in_channels=3, image_size=32, classes=10)
    if way == "dense":
        return model
    return sparsify(model, density=0.1, block=(16, 16), compute=compute, seed=0)


def step_of(name: str, way: str, batch: int) -> Callable[[], float]:
    model = network(name, way).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    shape = (784,) if name == "mlp" else (3, 32, 32)
    images = torch.randn(batch, *shape, generator=generator)
    labels = torch.randint(10, (batch,), generator=generator)

    def step() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def peak(name: str, way: str, batch: int) -> float:
    """MB."""

    # What the libraries load and compile by their first calls is no one's activations.
    compute = {"sparse": "sparse", "scattered": "dense", "dense": "dense"}[way]
    for side in (16, 32):
        small = (
            nn.Linear(512, 512)
            if way == "dense"
            else SparseLinear(512, 512, density=0.5, block=(side, side), compute=compute)
        )
        optimizer = torch.optim.SGD(small.parameters(), 0.01, momentum=0.9)
        x = torch.randn(64, 512, requires_grad=True)
        small(x).square().mean().backward()
        optimizer.step()
    with PeakMemory(torch.device("cpu")) as used:
        step = step_of(name, way, batch)
        for _ in range(3):
            step()
    return float("nan") if used.bytes is None else used.bytes / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=tuple(STEPS), default=tuple(STEPS))
    parser.add_argument("--batch", type=int)
    options = parser.parse_args()
    for name in options.only:
        batch = options.batch or {"mlp": 256, "wrn": 16}[name]
        steps = {way: step_of(name, way, batch) for way in WAYS}
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        losses: dict[str, list[float]] = {way: [] for way in WAYS}
        for repeat in range(STEPS[name] + 1):
            for way, step in steps.items():
                start = time.perf_counter()
                losses[way].append(step())
                if repeat:
                    times[way].append(time.perf_counter() - start)
        apart = max(abs(a - b) for a, b in zip(losses["sparse"], losses["scattered"], strict=True))
        del steps
        for way in WAYS:
            # A new process for each: what the C library keeps for itself varies by a third.
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                peaks = [pool.apply(peak, (name, way, batch)) for _ in range(PEAKS[name])]
            used = statistics.median(peaks)
            seconds = statistics.median(times[way])
            row = {
                **{"network": name, "batch": batch, "way": way},
                **{"images/s": round(batch / seconds, 1), "ms": round(1e3 * seconds, 2)},
                "x dense": round(statistics.median(times["dense"]) / seconds, 2),
                **{"MB": round(used, 1), "threads": torch.get_num_threads()},
                "loss apart": f"{apart:.2g}" if way == "sparse" else "",
            }
            record.append("end_to_end", [row])
            print(row, flush=True)


if __name__ == "__main__":
    main()
