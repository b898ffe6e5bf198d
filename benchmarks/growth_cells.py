"""What is measured of a search, and all the searches that are measured, by name."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import growth_data
import numpy as np
import torch
from torch import Tensor

import growth
from growth import Connections, Pairs
from growth.connections import Block
from growth.peak_memory import PeakMemory
from growth.rescore import scores_at

Search = Callable[[Pairs, int, Tensor, Block], Connections]

# How many connections are searched: so many an input neuron, or a share of all there are.
WANTED: dict[str, Callable[[growth.Grid], int]] = {
    "16 n": lambda grid: 16 * grid.n_cols,
    "0.1 %": lambda grid: grid.size // 1000,
    "1 %": lambda grid: grid.size // 100,
    "3 %": lambda grid: grid.size * 3 // 100,
}
# And how many are active, for each that is searched: an update that replaces a fifth.
ACTIVE = 4

# A search that takes longer is timed once, by its first call.
LONG_SECONDS = 2.0
# Repetitions of the others, as many as fit into the time.
LEAST, MOST, BUDGET_SECONDS = 3, 7, 1.0


def query(grid: growth.Grid, wanted: str) -> tuple[int, Tensor]:
    """How many to search, and the active keys."""
    count = max(1, WANTED[wanted](grid))
    generator = torch.Generator().manual_seed(1)
    active = torch.randint(grid.size, (ACTIVE * count,), generator=generator)
    return count, active.unique()


def by_partition(pairs: Pairs, count: int, active: Tensor, block: Block) -> Connections:
    """The whole gradient, and NumPy's partition of it."""
    scores = pairs.products(0, pairs.n_out).abs_().flatten()
    scores[active] = -1
    values = scores.numpy()
    at = values.size - count
    keys = torch.from_numpy(np.flatnonzero(values >= np.partition(values, at)[at]))[:count]
    return Connections(keys // pairs.n_in, keys % pairs.n_in, scores[keys])


def by_topk(pairs: Pairs, count: int, active: Tensor, block: Block) -> Connections:
    """The whole gradient, and PyTorch's top-k of it."""
    scores = pairs.products(0, pairs.n_out).abs_().flatten()
    scores[active] = -1
    keys = scores.topk(count, sorted=False).indices.sort().values
    return Connections(keys // pairs.n_in, keys % pairs.n_in, scores[keys])


def _strategy(
    name: str, *args: Any, pairs: Pairs, count: int, active: Tensor, block: Block, **options: Any
) -> Connections:
    strategy = growth.STRATEGIES[name](*args, **options)
    state = strategy.observe(pairs, None) if strategy.observes else None
    generator = torch.Generator().manual_seed(0)
    found: Connections = strategy(
        pairs, count, active, block=block, generator=generator, state=state
    )
    return found


def of(name: str, **options: Any) -> Search:
    """A growth strategy, from an observed step where it needs one."""
    search = partial(_strategy, name, **options)
    return lambda pairs, count, active, block: search(
        pairs=pairs, count=count, active=active, block=block
    )


# Copies of the whole gradient that are held at the peak, of those that hold it.
HOLD_ALL = {"dense + torch.topk": 5, "dense + np.partition": 2, "momentum": 1}


def _settings(
    label: str, name: str, option: str, values: tuple[float, ...], **options: Any
) -> dict[str, Search]:
    """One search a value of an option."""
    return {
        f"{label} {value:g}".replace(" 0.", " ."): of(name, **{option: value}, **options)
        for value in values
    }


MAIN: dict[str, Search] = {
    "dense + torch.topk": by_topk,
    "dense + np.partition": by_partition,
    "dense": of("dense"),
    "exact": of("exact"),
    "lowrank": of("lowrank"),
    "auto": of("auto"),
}
OTHERS: dict[str, Search] = {
    "averaged": of("averaged"),
    "momentum": of("momentum"),
    "random": of("random"),
    "gse uniform": of("gse"),
    "gse norm": of("gse", sampling="norm"),
    "gse sign": of("gse", sampling="sign"),
    "subblock .35": of("subblock"),
}
LIBRARIES: dict[str, Search] = {
    "faiss range": of("faiss", index="range"),
    **_settings("faiss flat", "faiss", "k_similar", (0.02, 0.125)),
    "faiss ivf .05": of("faiss", index="ivf", k_similar=0.05),
    "faiss hnsw .02": of("faiss", index="hnsw", k_similar=0.02),
    "faiss lsh bits 2": of("faiss", index="lsh", k_similar=0.05),
    "nmslib hnsw .02": of("nmslib", k_similar=0.02),
    "nmslib brute-force .02": of("nmslib", k_similar=0.02, index="brute-force"),
}
# At one width: what each method's settings do for recall, and at what cost.
SETTINGS: dict[str, Search] = {
    **_settings("lowrank unchecked", "lowrank", "rank", (2, 4, 8, 16, 32, 64), recall=0.0),
    **_settings("subblock", "subblock", "share", (0.1, 0.2, 0.5, 0.7)),
    **_settings("gse uniform x", "gse", "subset", (4, 16)),
    **_settings("gse norm x", "gse", "subset", (4, 16), sampling="norm"),
    **_settings("gse sign x", "gse", "subset", (4, 16), sampling="sign"),
    **_settings("faiss flat", "faiss", "k_similar", (0.05, 0.2)),
    **_settings("faiss flat ip", "faiss", "k_similar", (0.125,), metric="ip"),
    **_settings("faiss flat l2", "faiss", "k_similar", (0.125,), metric="l2"),
    **_settings("faiss ivf nprobe", "faiss", "nprobe", (0.1, 0.5), index="ivf", k_similar=0.05),
    **_settings("faiss hnsw", "faiss", "k_similar", (0.05, 0.125), index="hnsw"),
    **_settings("faiss lsh bits", "faiss", "bits", (0.5, 1, 4, 8), index="lsh", k_similar=0.05),
    "faiss lsh bits 8, .125": of("faiss", bits=8, index="lsh", k_similar=0.125),
    **_settings("nmslib hnsw", "nmslib", "k_similar", (0.05, 0.125)),
}
BLOCKS: dict[str, Search] = {
    "blocks tiles": of("blocks", way="tiles"),
    "blocks gram": of("blocks", way="gram"),
    "exact": of("exact"),
    "lowrank": of("lowrank"),
    "lowrank unchecked 24": of("lowrank", rank=24, recall=0.0, candidates=1.5),
    "auto": of("auto"),
}
CONVOLUTIONS: dict[str, Search] = {
    "dense + np.partition": by_partition,
    "exact": of("exact"),
    "lowrank": of("lowrank"),
    "auto": of("auto"),
    "pool": of("pool"),
    "subblock .35": of("subblock"),
    "gse norm": of("gse", sampling="norm"),
    "random": of("random"),
}
SEARCHES = {**MAIN, **OTHERS, **LIBRARIES, **SETTINGS, **BLOCKS, **CONVOLUTIONS}


class Cell(NamedTuple):
    """One row: what is searched, by whom."""

    source: str
    part: str
    block: Block
    wanted: str
    search: str


class Timing(NamedTuple):
    """seconds: median. first: what the first call found. memory: its peak, bytes."""

    seconds: float
    repeats: int
    first: Connections
    memory: int | None


def interleaved(
    calls: dict[str, Callable[[], Any]], quick: bool = False, long: float = LONG_SECONDS
) -> dict[str, Timing]:
    """Times of each, in turns, so that all meet the same neighbours. What has to be loaded and
    compiled is to be there already: the first call tells the peak of memory. long: a call that
    takes so many seconds is not repeated."""
    first = {name: timed(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(1 if quick else MOST):
        for name, call in calls.items():
            own = times[name]
            wanted = repeat < LEAST or sum(own) < BUDGET_SECONDS
            if first[name].seconds < long and wanted:
                start = time.perf_counter()
                call()
                own.append(time.perf_counter() - start)
    return {
        name: timing._replace(seconds=statistics.median(own), repeats=len(own)) if own else timing
        for (name, timing), own in zip(first.items(), times.values(), strict=True)
    }


def timed(call: Callable[[], Any]) -> Timing:
    with PeakMemory(torch.device("cpu")) as peak:
        start = time.perf_counter()
        found = call()
        seconds = time.perf_counter() - start
    return Timing(seconds, 1, found, peak.bytes)


def warm(names: list[str], source: str, block: Block) -> None:
    """Load and compile what these searches need, on something small."""
    small = growth_data.small(source)
    grid = growth.Grid.of(small.n_out, small.n_in, small.taps, block)
    count, active = query(grid, "0.1 %")
    for name in names:
        SEARCHES[name](small, count, active, block)


def peak(source: str, part: str, block: Block, wanted: str, name: str) -> int | None:
    """Bytes that one search takes at its peak, for a process of its own."""
    pairs = growth_data.load(source, [part])[part]
    warm([name], source, block)
    grid = growth.Grid.of(pairs.n_out, pairs.n_in, pairs.taps, block)
    count, active = query(grid, wanted)
    return timed(partial(SEARCHES[name], pairs, count, active, block)).memory


class Judge:
    """Recall and mass of what searches found, of one query."""

    def __init__(self, pairs: Pairs, grid: growth.Grid, best: Connections) -> None:
        self.pairs, self.grid = pairs, grid
        self.keys = self._keys(best)
        self.scores = scores_at(pairs, grid, self.keys).double()

    def _keys(self, found: Connections) -> Tensor:
        return found.row * self.grid.n_cols + found.col

    def __call__(self, found: Connections) -> tuple[float, float]:
        """(share of the best that was found, sum of their scores over that of the best)."""
        keys = self._keys(found)
        same = torch.isin(keys, self.keys, assume_unique=True)
        others = scores_at(self.pairs, self.grid, keys[~same]).double()
        # One that ties with the last of the best is as good; rounding may tell them apart.
        ties = int((others >= self.scores.min() * (1 - 1e-6)).sum())
        known = self.scores[torch.searchsorted(self.keys, keys[same])]
        mass = float(known.sum() + others.sum()) / max(float(self.scores.sum()), 1e-300)
        return (known.numel() + ties) / keys.numel(), mass


def measure(
    pairs: Pairs, source: str, part: str, block: Block, wanted: str, names: list[str], quick: bool
) -> list[dict[str, Any]]:
    """A row for each search, all of one query."""
    grid = growth.Grid.of(pairs.n_out, pairs.n_in, pairs.taps, block)
    count, active = query(grid, wanted)
    judge = Judge(pairs, grid, growth.Exact()(pairs, count, active, block=block))
    calls = {name: partial(SEARCHES[name], pairs, count, active, block) for name in names}
    rows = []
    for name, timing in interleaved(calls, quick).items():
        recall, mass = judge(timing.first)
        memory = timing.memory
        rows.append(
            {
                **Cell(source, part, block, wanted, name)._asdict(),
                "n_out": pairs.n_out,
                "n_in": pairs.n_in,
                "samples": pairs.samples,
                "count": count,
                "active": active.numel(),
                "seconds": f"{timing.seconds:.4g}",
                "repeats": timing.repeats,
                "MB": "" if memory is None else f"{memory / 1e6:.1f}",
                "recall": f"{recall:.4f}",
                "mass": f"{mass:.4f}",
                "GFLOP": f"{timing.first.flops / 1e9:.4g}",
                "report": json.dumps(dict(timing.first.report)),
                "note": "",
            }
        )
    return rows
