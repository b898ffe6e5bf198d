"""What it saves to prepare the next batch while a step runs: in a thread, or in loader processes.

    python benchmarks/loader.py

Milliseconds from one step to the next, loading included: medians over an epoch in which the ways
take turns. The thread is not in ``dst.data``: it is kept here, with what it gave.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import record
import torch
import torch.nn.functional as F

import dst
from dst.data import Batch, Dataset, load, train_loader
from dst.models import build

RUNS = (("wrn-16-1", "mnist-5k", "shift"), ("mlp-300-100", "strokes", "none"))
# Steps of a turn, and how many of the first ones do not count, because what was prepared for them
# lay there while the others had their turns.
TURN, SKIPPED = 8, 3


def ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches; the next one is prepared by a thread, which ends with this generator."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


def turn(model: torch.nn.Module, batches: Iterator[Batch]) -> list[float]:
    """Milliseconds of each step that counts."""
    times = []
    for _ in range(TURN):
        start = time.perf_counter()
        images, labels = next(batches)
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= 0.01 * parameter.grad
        times.append(1e3 * (time.perf_counter() - start))
    return times[SKIPPED:]


def loaders(data: Dataset, augment: str) -> dict[str, Iterator[Batch]]:
    def batches(workers: int) -> Iterator[Batch]:
        return train_loader(
            data.train,
            data,
            batch=64,
            epoch=0,
            start=0,
            seed=0,
            augment=augment,
            workers=workers,
        )

    return {
        # Batches that lie there already, which no way of loading can beat.
        "ready": iter(list(batches(0))),
        "in the step": batches(0),
        "a thread": ahead(batches(0)),
        "1 process": batches(1),
    }


def main() -> None:
    rows = []
    for name, data_name, augment in RUNS:
        data = load(data_name, data_dir="data")
        model = build(
            name, in_channels=data.in_channels, image_size=data.image_size, classes=data.classes
        )
        model = dst.sparsify(model, density=0.1)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ways = loaders(data, augment)
            times: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(min(20, len(data.train) // 64 // TURN)):
                for way, batches in ways.items():
                    times[way] += turn(model, batches)
            medians = {f"{way} ms": round(statistics.median(t), 2) for way, t in times.items()}
            row = {"model": name, "data": data_name, "threads": threads, **medians}
            print(row, flush=True)
            rows.append(row)
    print(record.append("loader", rows))


if __name__ == "__main__":
    main()
