"""The nanoseconds of ``triton_kernels/costs.py``, measured on this machine.

What they choose depends on their ratios alone. Each is measured as the searches use it; a candidate
of a scan costs what is left of its time when its products and its sorting are subtracted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import growth_cells as cells
import growth_data as data
import numpy as np
import torch

import growth
from growth.active import ActiveKeys
from growth.gram import gram_factors
from growth.running_top import RunningTop
from growth.scan import TILE_COLS, TILE_ROWS, column_norms, scan
from triton_kernels import costs

REPEATS = 9
SAMPLES = data.BATCH


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    repeats = 1 if quick else REPEATS
    found = {**_of_tiles(repeats), **_of_active_keys(repeats), **_of_rescoring(repeats)}
    found["NS_PER_SORTED"] = _sorting(repeats)
    found["NS_OF_DECOMPOSITION"] = _decomposition(repeats)
    found["NS_PER_CANDIDATE"] = _candidates(repeats, found)
    found["GRAM_OVERHEAD"] = _gram_overhead(repeats, found)
    for name, here in found.items():
        there = getattr(costs, name)
        yield {
            "constant": name,
            "here": f"{here:.3g}",
            "in costs.py": f"{there:g}",
            "ratio": f"{here / there:.2f}",
        }


def _ns(call: Callable[[], Any], repeats: int) -> float:
    """Median, after a call that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times[1:])


def _of_tiles(repeats: int) -> dict[str, float]:
    dz, x = torch.randn(TILE_ROWS, SAMPLES), torch.randn(TILE_COLS, SAMPLES)
    tile, mask = torch.empty(TILE_ROWS, TILE_COLS), np.empty((TILE_ROWS, TILE_COLS), bool)
    values = torch.randn(TILE_ROWS, TILE_COLS).numpy()

    def compare() -> None:
        np.abs(values, out=values)
        np.greater_equal(values, 4.0, out=mask)
        np.flatnonzero(mask)

    product = _ns(lambda: torch.mm(dz, x.T, out=tile), 10 * repeats)
    return {
        "NS_PER_FLOP": product / (2 * SAMPLES * tile.numel()),
        "NS_PER_SCORE": _ns(compare, 10 * repeats) / tile.numel(),
    }


def _of_active_keys(repeats: int) -> dict[str, float]:
    size, few, many, questions = 1 << 26, 1 << 10, 1 << 20, 1 << 20
    random = np.random.default_rng(0)
    keys = [np.unique(random.integers(0, size, n)) for n in (few, many)]
    # As many questions as make a bitmap pay; and none, so that it does not.
    bitmaps = [_ns(partial(ActiveKeys, own, size, 1 << 40), repeats) for own in keys]
    asked = random.integers(0, size, questions)
    by_search = ActiveKeys(keys[1], size, 0)
    return {
        "NS_PER_BIT": bitmaps[0] / size,
        "NS_PER_SET_BIT": (bitmaps[1] - bitmaps[0]) / (keys[1].size - keys[0].size),
        "NS_PER_LOOKUP": _ns(lambda: by_search.absent(asked), repeats) / questions,
    }


def _of_rescoring(repeats: int) -> dict[str, float]:
    """Of the best pairs, which lie together: random ones take longer."""
    n, short = 8192, 16
    took = {}
    for samples in (short, SAMPLES):
        pairs = growth.LinearPairs(*data.drawn("synth", n, samples))
        found = growth.Exact()(pairs, n * n // 500, torch.empty(0, dtype=torch.int64))
        call = partial(pairs.products_at, found.row, found.col)
        took[samples] = _ns(call, repeats) / found.row.numel()
    per_flop = (took[SAMPLES] - took[short]) / (SAMPLES - short)
    return {
        "NS_PER_RESCORED": took[short] - short * per_flop,
        "NS_PER_RESCORED_FLOP": per_flop,
    }


def _sorting(repeats: int) -> float:
    """Beside the copy, which costs about a nanosecond a number."""
    n, depth = 16384, 16
    vectors, _ = data.drawn("synth", n, depth)

    def sort() -> None:
        order = np.argsort(-column_norms(vectors), kind="stable")
        vectors.T.contiguous().index_select(0, torch.from_numpy(order))

    return _ns(sort, repeats) / n - depth


def _decomposition(repeats: int) -> float:
    x, dz = data.drawn("synth", 256)
    return _ns(lambda: gram_factors(x, dz, SAMPLES // 2), repeats)


def _candidates(repeats: int, found: dict[str, float]) -> float:
    n = 8192
    x, dz = data.drawn("synth", n)
    count = n * n // 1000
    nothing = np.empty(0, np.int64)
    computed = 0.0

    def search() -> None:
        nonlocal computed
        top = RunningTop(count)
        computed = scan(x, dz, top, ActiveKeys(nothing, n * n, 0)).share
        top.result()

    took = _ns(search, repeats)
    products = computed * n * n * (2 * SAMPLES * found["NS_PER_FLOP"] + found["NS_PER_SCORE"])
    sorting = 2 * n * (found["NS_PER_SORTED"] + SAMPLES)
    return (took - products - sorting) / (3 * count)


def _gram_overhead(repeats: int, found: dict[str, float]) -> float:
    n, block = 8192, (32, 32)
    pairs = growth.LinearPairs(*data.drawn("synth", n))
    count, active = cells.query(growth.Grid.of(n, n, 1, block), "1 %")
    search = growth.Blocks(way="gram")
    took = _ns(lambda: search(pairs, count, active, block=block), repeats)
    of_blocks = (n // block[0]) * (n // block[1])
    flops = 2 * SAMPLES * SAMPLES * 2 * n + SAMPLES * SAMPLES * of_blocks
    return (took - of_blocks * found["NS_PER_SCORE"]) / (flops * found["NS_PER_FLOP"])
