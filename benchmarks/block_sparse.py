"""Sparse products against the dense ones of the same size, side by side in one process.

    python benchmarks/block_sparse.py                    # about an hour on two quiet cores
    python benchmarks/block_sparse.py --only square      # or another group, auto, page
    python benchmarks/block_sparse.py --device cuda --dtype bfloat16 --batches 4096

``ours`` never forms the weight; ``scattered`` is the other way that a layer may take; ``auto``
takes one of the two; ``dense`` is ``nn.Linear`` or ``nn.Conv2d``; ``bsr`` PyTorch's block-sparse
format, which has a forward product alone. ``forward``: without gradients. ``step``: forward, both
gradients and SGD. Medians of calls in turns, and half the distance between their quartiles ->
results/block_sparse.csv. What is measured while others have the processors is measured again.

``--only auto``: which way it would take in the rows of this machine, by what ``python -m
triton_kernels.calibrate`` last measured here, and at what cost. ``page``: the tables and the plots
of docs/products.md, of every machine that has rows.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import record
import torch
from pages import replaced
from quiet import undisturbed
from torch import Tensor, nn

from dst.layers import SparseConv2d, SparseLayer, SparseLinear
from triton_kernels import costs

NAME = "block_sparse"
DOCS = Path(__file__).resolve().parent.parent / "docs"
COLOURS = {
    **{1: "tab:blue", 4: "tab:cyan", 8: "tab:olive", 16: "tab:orange", 32: "tab:green"},
    **{64: "tab:red", 128: "tab:purple"},
}
REPEATS, MOST_SECONDS = 7, 6.0
# Density from which on `auto` may lose to a dense layer.
LEAST_DISPUTED = 0.2


class Case(NamedTuple):
    """A layer. size: of a convolution's maps, 0 for a linear layer; taps: of its kernel."""

    group: str
    name: str
    n_out: int
    n_in: int
    size: int = 0
    stride: int = 1

    def sparse(self, block: int, density: float, compute: str, **how: Any) -> SparseLayer:
        how |= {"block": (block, block), "compute": compute, "bias": False}
        if not self.size:
            return SparseLinear(self.n_in, self.n_out, density=density, **how)
        return SparseConv2d(
            self.n_in, self.n_out, 3, self.stride, padding=1, density=density, **how
        )

    def dense(self, **how: Any) -> nn.Module:
        if not self.size:
            return nn.Linear(self.n_in, self.n_out, bias=False, **how)
        return nn.Conv2d(self.n_in, self.n_out, 3, self.stride, padding=1, bias=False, **how)

    def input(self, batch: int, **how: Any) -> Tensor:
        shape = (batch, self.n_in, self.size, self.size) if self.size else (batch, self.n_in)
        return torch.randn(shape, **how)


CASES = (
    *(Case("square", f"{n} x {n}", n, n) for n in (1024, 2048, 4096)),
    *(Case("large", f"{n} x {n}", n, n) for n in (8192, 16384)),
    Case("batches", "2048 x 2048", 2048, 2048),
    Case("wrn", "WRN-28-10, 160 at 32", 160, 160, 32),
    Case("wrn", "WRN-28-10, 320 at 16", 320, 320, 16),
    Case("wrn", "WRN-28-10, 640 at 8", 640, 640, 8),
    Case("wrn", "WRN-28-10, 320 to 640", 640, 320, 16, 2),
    Case("alexnet", "AlexNet fc6", 4096, 9216),
    Case("vit", "ViT-B MLP", 3072, 768),
)


class Sweep(NamedTuple):
    """batches: samples; of a convolution, images; of ViT, tokens."""

    batches: tuple[int, ...]
    blocks: tuple[int, ...] = (1, 16, 32, 64, 128)
    densities: tuple[float, ...] = (0.9, 0.7, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)


GROUPS = {
    "square": Sweep((256,)),
    "batches": Sweep((64, 1024, 4096), (1, 32, 128), (0.5, 0.1, 0.05, 0.01)),
    "large": Sweep((128,), (1, 32, 128), (0.1, 0.05, 0.02, 0.01)),
    "alexnet": Sweep((128,), densities=(0.5, 0.1, 0.05, 0.01)),
    "vit": Sweep((197 * 4,)),
    "wrn": Sweep((32,), (16, 32), (0.5, 0.1, 0.05, 0.01)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    groups = (*GROUPS, "auto", "page")
    parser.add_argument("--only", nargs="+", choices=groups, default=groups)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batches", nargs="+", type=int, help="in place of each group's own")
    parser.add_argument("--blocks", nargs="+", type=int)
    parser.add_argument("--densities", nargs="+", type=float)
    options = parser.parse_args()
    how = {"device": torch.device(options.device), "dtype": getattr(torch, options.dtype)}
    for case in CASES:
        if case.group not in options.only:
            continue
        sweep = GROUPS[case.group]
        blocks, densities = (options.blocks or sweep.blocks, options.densities or sweep.densities)
        for batch in options.batches or sweep.batches:
            for rows in measure(case, batch, blocks, densities, how):
                record.append(NAME, rows)
    machines = _rows(options.device, options.dtype)
    if "auto" in options.only:
        auto(machines.get(record.circumstances()["hardware"], []))
    if "page" in options.only:
        page(machines)


def measure(
    case: Case,
    batch: int,
    blocks: Sequence[int],
    densities: Sequence[float],
    how: dict[str, Any],
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one kind of call at a time."""
    x = case.input(batch, **how)
    dy = torch.randn_like(case.dense(**how)(x))
    for block in blocks:
        if case.size and block == 1:
            continue  # a convolution of single weights is scattered in any case
        for density in densities:
            ours = case.sparse(block, density, "sparse", **how)
            keys = {"keys": ours.topology.keys()}
            scattered = case.sparse(block, density, "dense", **keys, **how)
            free = case.sparse(block, density, "auto", **keys, **how)
            layers: dict[str, nn.Module] = {"ours": ours, "scattered": scattered, "auto": free}
            layers["dense"] = case.dense(**how)
            calls = {
                "forward": {
                    name: _forward(layer, x) for name, layer in layers.items() if name != "auto"
                },
                "step": {name: _step(layer, x, dy) for name, layer in layers.items()},
            }
            if not case.size and block >= 16:
                calls["forward"]["bsr"] = _bsr(ours, x)
            for what, functions in calls.items():
                turns = partial(in_turns, functions, how["device"])
                times_of = undisturbed(turns, torch.get_num_threads())
                if times_of is None:
                    print("disturbed each time, no rows:", case.name, batch, block, density, what)
                    continue
                shape = ours.cost(*ours._rows(x))
                quartiles = {n: statistics.quantiles(times, n=4) for n, times in times_of.items()}
                yield [
                    {
                        **{"group": case.group, "layer": case.name, "batch": batch},
                        **{"n_out": shape.n_out, "n_in": shape.n_in, "taps": shape.taps},
                        **{"rows": shape.rows, "padded": shape.padded, "block": block},
                        **{"density": density, "what": what, "way": name},
                        **{"ms": round(1e3 * middle, 4), "+-": round(500 * (high - low), 4)},
                        **{"device": how["device"].type, "dtype": str(how["dtype"])[6:]},
                        "threads": torch.get_num_threads(),
                    }
                    for name, (low, middle, high) in quartiles.items()
                ]
            print(case.name, batch, block, density, flush=True)


def _forward(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            layer(x)

    return call


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    x = x.clone().requires_grad_()
    optimizer = torch.optim.SGD(layer.parameters(), 1e-6)

    def call() -> None:
        x.grad = None
        optimizer.zero_grad()
        layer(x).backward(dy)
        optimizer.step()

    return call


def _bsr(layer: SparseLayer, x: Tensor) -> Callable[[], None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = layer.dense_weight().detach().to_sparse_bsr(layer.topology.grid.block)

    def call() -> None:
        torch.nn.functional.linear(x, weight)

    return call


def in_turns(calls: dict[str, Callable[[], None]], device: torch.device) -> dict[str, list[float]]:
    """Seconds of each, so that all meet the same neighbours."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, repeat = time.perf_counter(), 0
    while repeat < 3 or (repeat <= REPEATS and time.perf_counter() - start < MOST_SECONDS):
        for name, call in calls.items():
            _wait(device)
            before = time.perf_counter()
            call()
            _wait(device)
            if repeat:  # the first one works out and allocates what is kept
                times[name].append(time.perf_counter() - before)
        repeat += 1
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rows(device: str, dtype: str) -> dict[str, list[dict[str, str]]]:
    """By hardware, the last measured first: with as many threads as here, by the PyTorch that was
    used last; of what was measured twice the later."""
    keys = ("layer", "batch", "block", "density", "what", "way")
    threads, kind = str(torch.get_num_threads()), device.split(":")[0]
    found: dict[str, dict[tuple[str, ...], dict[str, str]]] = {}
    with (record.RESULTS / f"{NAME}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["device"], row["dtype"], row["threads"]) == (kind, dtype, threads):
                own = found.setdefault(row["hardware"], {})
                own[tuple(row[key] for key in keys)] = row
    machines = {}
    for hardware, own in found.items():
        version = _last([*own.values()])["torch"]
        machines[hardware] = [row for row in own.values() if row["torch"] == version]
    # Of two on the same day, the one whose first row came later.
    later = reversed(machines.items())
    return dict(sorted(later, key=lambda one: _last(one[1])["date"], reverse=True))


def _last(rows: list[dict[str, str]]) -> dict[str, str]:
    return max(rows, key=lambda row: row["date"])


def _cost(row: dict[str, str]) -> costs.Layer:
    block = int(row["block"])
    sizes = (int(row[key]) for key in ("n_out", "n_in", "taps"))
    itemsize = getattr(torch, row["dtype"]).itemsize
    layer = costs.Layer(
        *sizes, (block, block), 0, int(row["rows"]), int(row["padded"]), itemsize, row["device"]
    )
    return layer._replace(alive=round(float(row["density"]) * layer.size))


def auto(rows: list[dict[str, str]]) -> None:
    """Prints how far ``auto``, and each of the two ways that it has, lies from dense."""
    steps = [row for row in rows if row["what"] == "step"]
    by_case: dict[tuple[str, ...], dict[str, float]] = {}
    for row in steps:
        key = tuple(row[k] for k in ("layer", "batch", "block", "density"))
        by_case.setdefault(key, {})[row["way"]] = float(row["ms"])
    print(f"{'layer':24} batch block density  dense/ours  dense/scattered  dense/auto")
    for row in steps:
        if row["way"] != "ours":
            continue
        key = tuple(row[k] for k in ("layer", "batch", "block", "density"))
        ms = by_case[key]
        way = "ours" if costs.choose(_cost(row)) == "sparse" else "scattered"
        shown = [ms["dense"] / ms[name] for name in ("ours", "scattered", way)]
        print(
            f"{key[0]:24} {key[1]:>5} {key[2]:>5} {key[3]:>7}"
            + "".join(f"{s:12.2f}" for s in shown)
        )


def page(machines: dict[str, list[dict[str, str]]]) -> None:
    if not machines:
        raise SystemExit("there are no rows of this device, dtype and number of threads")
    path = DOCS / "products.md"
    sections = []
    for hardware, rows in machines.items():
        name = re.sub("[^a-z0-9]+", "-", hardware.lower()).strip("-")
        picture = f"block-sparse-{name}.png"
        _plot(rows, DOCS / "images" / picture)
        steps = [row for row in rows if row["what"] == "step"]
        sections += [f"### {hardware}", _table(steps), _auto_table(steps)]
        sections.append(f"![time against density, {hardware}](images/{picture})")
    text = "\n\n".join(section for section in sections if section)
    path.write_text(replaced(path.read_text(), "products:steps", text))
    print(path)


def _place(layer: tuple[Any, ...]) -> tuple[Any, ...]:
    """By the layer's place among the cases, then by what else there is."""
    name, *others = layer
    return [case.name for case in CASES].index(name), *others


class _Line(NamedTuple):
    """Milliseconds of a layer's steps, by (way, density)."""

    name: str
    batch: int
    block: int
    ms: dict[tuple[str, float], float]


def _lines(steps: list[dict[str, str]]) -> list[_Line]:
    lines: dict[tuple[str, int, int], dict[tuple[str, float], float]] = {}
    for row in steps:
        line = lines.setdefault((row["layer"], int(row["batch"]), int(row["block"])), {})
        line[row["way"], float(row["density"])] = float(row["ms"])
    whole = {
        key: {(way, d): one for (way, d), one in ms.items() if {("dense", d), ("ours", d)} <= {*ms}}
        for key, ms in lines.items()
    }
    return [_Line(*key, ms) for key, ms in sorted(whole.items(), key=lambda line: _place(line[0]))]


def _table(steps: list[dict[str, str]]) -> str:
    """How many times faster than dense a step is, a line a layer and block."""
    lines = _lines(steps)
    densities = sorted({float(row["density"]) for row in steps}, reverse=True)
    text = _head(["layer", "batch", "block", "dense, ms", *(f"density {d:g}" for d in densities)])
    for layer, batch, block, ms in lines:
        dense = statistics.median(value for (way, _), value in ms.items() if way == "dense")
        ratios = (ms["dense", d] / ms["ours", d] if ("ours", d) in ms else None for d in densities)
        cells = ("" if r is None else f"{r:.0f}" if r > 10 else f"{r:.2g}" for r in ratios)
        text.append(f"| {layer} | {batch} | {block} | {dense:.1f} | {' | '.join(cells)} |")
    last = _last(steps)
    scattered = _against_dense(lines, "scattered")
    text += [
        "",
        f"{last['threads']} threads, PyTorch {last['torch']}, {last['date']}. Times of one step of "
        "training, each dense step beside its sparse one. With a scattered weight, which is "
        f"`dense` as a way to compute, it takes {statistics.median(scattered):.2f} times as long "
        f"as dense in the median, {max(scattered):.2f} at most.",
    ]
    return "\n".join(text)


def _auto_table(steps: list[dict[str, str]]) -> str:
    """How many times as long as dense a step takes where the two ways come near each other."""
    lines = _lines(steps)
    densities = sorted({d for line in lines for way, d in line.ms if way == "auto"}, reverse=True)
    densities = [d for d in densities if d >= LEAST_DISPUTED]
    if not densities:
        return ""
    text = _head(["layer", "batch", "block", *(f"density {d:g}" for d in densities)])
    for layer, batch, block, ms in lines:
        ratios = [ms["auto", d] / ms["dense", d] if ("auto", d) in ms else None for d in densities]
        if any(ratios):
            cells = ("" if r is None else f"{r:.2f}" for r in ratios)
            text.append(f"| {layer} | {batch} | {block} | {' | '.join(cells)} |")
    found = _against_dense(lines, "auto")
    return "\n".join(
        [
            f"What `auto` takes, as times of dense: {max(found):.2f} at most at all densities "
            f"above, {statistics.median(found):.2f} in the median. At the largest of them:",
            "",
            *text,
        ]
    )


def _head(names: list[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]


def _against_dense(lines: list[_Line], wanted: str) -> list[float]:
    """Times of a way as multiples of dense."""
    return [
        line.ms[way, d] / line.ms["dense", d]
        for line in lines
        for way, d in line.ms
        if way == wanted
    ]


def _plot(rows: list[dict[str, str]], path: Path) -> None:
    """Speed-up of a step over dense, against density, a panel a layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [row for row in rows if row["what"] == "step"]
    layers = sorted({(row["layer"], int(row["batch"])) for row in steps}, key=_place)
    across = 4
    figure, axes = plt.subplots(
        -(-len(layers) // across), across, figsize=(4 * across, 3.2 * -(-len(layers) // across))
    )
    for ax, (name, batch) in zip(axes.flat, layers, strict=False):
        own = [r for r in steps if (r["layer"], int(r["batch"])) == (name, batch)]
        for block in sorted({int(row["block"]) for row in own} & COLOURS.keys()):
            ms = {
                (row["way"], float(row["density"])): float(row["ms"])
                for row in own
                if int(row["block"]) == block
            }
            densities = sorted({d for _, d in ms})
            ratios = [ms["dense", d] / ms["ours", d] for d in densities]
            label = f"block {block}" if block > 1 else "single weights"
            ax.plot(densities, ratios, marker="o", ms=3, label=label, color=COLOURS[block])
        ax.plot(densities, [1 / d for d in densities], color="0.7", ls=":", label="1 / density")
        ax.axhline(1, color="0.5", lw=0.8)
        ax.set(xscale="log", yscale="log", title=f"{name}, batch {batch}")
        ax.set(xlabel="density", ylabel="dense time / sparse time")
        # 0.7 would lie on both its neighbours.
        ax.set_xticks(densities, ["" if d == 0.7 else f"{d:g}" for d in densities])
        ax.set_xticks([], minor=True)
    for ax in axes.flat[len(layers) :]:
        ax.set_axis_off()
    axes.flat[0].legend(fontsize=7)
    figure.suptitle(f"A training step (forward, both gradients, SGD) on {rows[0]['hardware']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    main()
