"""What must hold of the searches, as measured: one row a claim, PASS or FAIL."""

from __future__ import annotations

import multiprocessing
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import growth_cells as cells
import growth_data as data
import numpy as np
import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

import growth
from growth import Connections, Pairs
from growth.connections import Block

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
# A call that takes longer is not repeated.
LONG_SECONDS = 6.0
# Relative distance from the threshold within which products are looked at in float64.
NEAR = 1e-4


def check(name: str, quick: bool) -> Iterator[Row]:
    for row in CLAIMS[name](quick):
        yield {"group": name, **row}


def _row(
    claim: str, value: float, unit: str, least: float | None, most: float | None, detail: str
) -> Row:
    if least is None and most is None:
        result, wanted = "info", "no claim"
    else:
        holds = value >= least if least is not None else value <= float(most or 0)
        result = "PASS" if holds else "FAIL"
        wanted = f"at least {least:g}" if least is not None else f"at most {most:g}"
    measured = f"{value:.3g} {unit}".strip()
    return {
        "result": result,
        "claim": claim,
        "measured": measured,
        "wanted": wanted,
        "detail": detail,
    }


def at_least(claim: str, value: float, unit: str, least: float, detail: str = "") -> Row:
    return _row(claim, value, unit, least, None, detail)


def at_most(claim: str, value: float, unit: str, most: float, detail: str = "") -> Row:
    return _row(claim, value, unit, None, most, detail)


def info(claim: str, value: float, unit: str, detail: str = "") -> Row:
    return _row(claim, value, unit, None, None, detail)


class _Query:
    """One search problem, and calls of searches on it."""

    def __init__(self, source: str, part: str, wanted: str, block: Block = (1, 1)) -> None:
        self.source, self.part, self.wanted, self.block = source, part, wanted, block
        self.pairs: Pairs = data.load(source, [part])[part]
        self.grid = growth.Grid.of(self.pairs.n_out, self.pairs.n_in, self.pairs.taps, block)
        self.count, self.active = cells.query(self.grid, wanted)

    def call(self, name: str) -> Callable[[], Connections]:
        return partial(cells.SEARCHES[name], self.pairs, self.count, self.active, self.block)

    def times(self, names: list[str], quick: bool) -> dict[str, cells.Timing]:
        cells.warm(names, self.source, self.block)
        return cells.interleaved({name: self.call(name) for name in names}, quick, LONG_SECONDS)

    def peak(self, name: str) -> float:
        """MB, in a process of its own."""
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            args = (self.source, self.part, self.block, self.wanted, name)
            peak = pool.apply(cells.peak, args)
        return float("nan") if peak is None else peak / 1e6

    def judge(self, best: Connections) -> cells.Judge:
        return cells.Judge(self.pairs, self.grid, best)


def _seconds(times: dict[str, cells.Timing]) -> str:
    return ", ".join(f"{name} {timing.seconds:.3g} s" for name, timing in times.items())


def exact(quick: bool) -> Iterator[Row]:
    n = "2048" if quick else "16384"
    query = _Query("synth", n, "0.1 %")
    names = ["exact", "dense", "dense + np.partition", "dense + torch.topk"]
    times = query.times(names, quick)
    own, detail = times["exact"], _seconds(times)
    what = f"exact, synth, n = {n}, K = .1 %"
    for name, least in (("dense + np.partition", 10), ("dense + torch.topk", 40)):
        ratio = times[name].seconds / own.seconds
        yield at_least(f"{what}: faster than {name}", ratio, "x", least, detail)
    mine, its = query.peak("exact"), query.peak("dense + np.partition")
    yield at_least(
        f"{what}: less memory than dense + np.partition",
        its / mine,
        "x",
        30,
        f"{mine:.0f} MB, {its:.0f} MB",
    )
    differing, farthest = against_float64(query.pairs, query.active, own.first)
    yield at_most(
        f"{what}: a connection other than in float64 lies how far from the threshold",
        farthest,
        "relative",
        1e-6,
        f"{differing} of {query.count} differ",
    )


def against_float64(pairs: Pairs, active: Tensor, found: Connections) -> tuple[int, float]:
    """(how many connections differ from those by products in float64, and how far from the
    threshold the farthest of them lies, relative to it). Holds no G: single precision decides of
    what lies far from the threshold."""
    x, dz = pairs.vectors()

    def scores(keys: Tensor) -> Tensor:
        rows, cols = dz[:, keys // pairs.n_in], x[:, keys % pairs.n_in]
        return (rows.double() * cols.double()).sum(0).abs()

    threshold = float(found.score.min())
    sure, near = [], []
    for start in range(0, pairs.n_out, 256):
        tile = pairs.products(start, min(start + 256, pairs.n_out)).abs_().flatten()
        at = (tile >= threshold * (1 - NEAR)).nonzero().squeeze(1)
        high = tile[at] > threshold * (1 + NEAR)
        keys = at + start * pairs.n_in
        free = ~torch.isin(keys, active, assume_unique=True)
        sure.append(keys[free & high])
        near.append(keys[free & ~high])
    certain, open_ = torch.cat(sure), torch.cat(near)
    of_open, order = scores(open_).sort(descending=True)
    missing = found.row.numel() - certain.numel()
    right = torch.cat([certain, open_[order[:missing]]])
    both, times = torch.cat([right, found.row * pairs.n_in + found.col]).unique(return_counts=True)
    differing = both[times == 1]
    if not differing.numel():
        return 0, 0.0
    least = float(of_open[missing - 1])
    return differing.numel() // 2, float((scores(differing) - least).abs().max()) / least


def lowrank(quick: bool) -> Iterator[Row]:
    n = "2048" if quick else "16384"
    query = _Query("synth", n, "0.1 %")
    times = query.times(["dense", "exact", "lowrank"], quick)
    own = times["lowrank"]
    recall, mass = query.judge(times["exact"].first)(own.first)
    what, detail = f"lowrank, synth, n = {n}, K = .1 %", f"{_seconds(times)}; {own.first.report}"
    yield at_least(f"{what}: recall", recall, "", 0.95, detail)
    yield at_least(f"{what}: mass", mass, "", 0.99)
    faster = times["dense"].seconds / own.seconds
    yield at_least(f"{what}: faster than plain streaming", faster, "x", 3, detail)
    faster = times["exact"].seconds / own.seconds
    yield info(f"{what}: faster than exact", faster, "x", detail)

    query = _Query("iid", n, "0.1 %")
    times = query.times(["exact", "lowrank"], quick)
    own = times["lowrank"]
    recall, _ = query.judge(times["exact"].first)(own.first)
    what, detail = f"lowrank, iid, n = {n}, K = .1 %", f"{_seconds(times)}; {own.first.report}"
    yield at_least(f"{what}: recall", recall, "", 0.95, detail)
    longer = own.seconds / times["exact"].seconds
    yield at_most(f"{what}: time of exact", longer, "x", 1.5, detail)


def widths(quick: bool) -> Iterator[Row]:
    sizes = [1024, 2048] if quick else [1 << k for k in range(12, 17)]
    queries = {str(n): _Query("synth", str(n), "16 n") for n in sizes}
    cells.warm(["lowrank"], "synth", (1, 1))
    calls = {n: query.call("lowrank") for n, query in queries.items()}
    times = cells.interleaved(calls, quick, LONG_SECONDS)
    peaks = {n: query.peak("lowrank") for n, query in queries.items()}
    seconds = [timing.seconds for timing in times.values()]
    last = str(sizes[-1])
    what = f"lowrank, synth, K = 16 n, n = {sizes[0]} to {last}"
    by_width = ", ".join(f"{n}: {peak:.0f} MB" for n, peak in peaks.items())
    yield at_most(f"{what}: exponent of time", _exponent(sizes, seconds), "", 1.2, _seconds(times))
    exponent = _exponent(sizes, list(peaks.values()))
    yield at_most(f"{what}: exponent of memory", exponent, "", 1.0, by_width)
    how = str(times[last].first.report)
    yield at_most(f"lowrank, synth, K = 16 n, n = {last}: time", seconds[-1], "s", 2, how)
    yield at_most(f"lowrank, synth, K = 16 n, n = {last}: memory", peaks[last], "MB", 500)


def _exponent(sizes: list[int], values: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def blocks(quick: bool) -> Iterator[Row]:
    n = "2048" if quick else "8192"
    for wanted in ("0.1 %", "1 %", "3 %"):
        query = _Query("synth", n, wanted, (32, 32))
        names = ["blocks tiles", "blocks gram", "exact", "lowrank unchecked 24", "lowrank"]
        times = query.times(names, quick)
        detail = _seconds(times)
        what = f"blocks 32 x 32, synth, n = {n}, K = {wanted} of them"
        judge = query.judge(times["exact"].first)
        tiles = times["blocks tiles"].seconds
        yield at_least(f"{what}: exact", tiles / times["exact"].seconds, "x tiles", 2.5, detail)
        for name, claimed in (("lowrank unchecked 24", wanted != "3 %"), ("lowrank", False)):
            own = times[name]
            recall, mass = judge(own.first)
            measured = ("", "x tiles", 9, tiles / own.seconds), (" recall", "", 0.97, recall)
            for of, unit, least, value in (*measured, (" mass", "", 0.999, mass)):
                claim, how = f"{what}: {name}{of}", f"{detail}; {own.first.report}"
                yield (
                    at_least(claim, value, unit, least, how)
                    if claimed
                    else info(claim, value, unit, how)
                )


def convolution(quick: bool) -> Iterator[Row]:
    query = _Query("conv", "wrn-28-5", "1 %")
    pairs = query.pairs
    assert isinstance(pairs, growth.ConvPairs)
    size = (pairs.n_out, pairs.x.shape[1], *pairs.kernel_size)

    def dense() -> Tensor:
        # Keys in the library's own order of columns: it takes as long.
        scores = conv2d_weight(pairs.x, size, pairs.dz, padding=pairs.padding).abs_().flatten()
        scores[query.active] = -1
        values = scores.numpy()
        at = values.size - query.count
        return torch.from_numpy(np.flatnonzero(values >= np.partition(values, at)[at]))

    cells.warm(["exact"], "conv", (1, 1))
    calls: dict[str, Callable[[], Any]] = {"exact": query.call("exact"), "conv2d_weight": dense}
    times = cells.interleaved(calls, quick, LONG_SECONDS)
    ratio = times["exact"].seconds / times["conv2d_weight"].seconds
    what = "exact, 320 -> 320 channels, 3 x 3, maps of 8 x 8, batch 128"
    yield at_most(f"{what}: time of conv2d_weight + selection", ratio, "x", 1.2, _seconds(times))
    yield at_most(f"{what}: memory", query.peak("exact"), "MB", 300)


IMPORT = """
import sys, time
for name in {without}: sys.modules[name] = None
import torch
start = time.perf_counter()
import growth
print(time.perf_counter() - start)
found = growth.Auto()((torch.randn(8, 64), torch.randn(8, 64)), 5, torch.arange(0))
assert found.row.numel() == 5
"""
OPTIONAL = ("faiss", "nmslib", "numba", "matplotlib", "scipy", "triton", "wandb")


def imports(quick: bool) -> Iterator[Row]:
    def took(without: tuple[str, ...]) -> float:
        command = [sys.executable, "-c", IMPORT.format(without=without)]
        times = [
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            for _ in range(1 if quick else 5)
        ]
        return statistics.median(map(float, times))

    yield at_most("import growth, beyond torch", took(()), "s", 0.3)
    claim = f"import growth without {', '.join(OPTIONAL)}"
    yield at_most(claim, took(OPTIONAL), "s", 0.3, "and Auto searches")


CLAIMS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "imports": imports,
    "exact": exact,
    "lowrank": lowrank,
    "widths": widths,
    "blocks": blocks,
    "convolution": convolution,
}
