"""Writes docs/results.md and its plots from the JSON files below docs/results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import experiments
from matplotlib.figure import Figure
from scipy import stats

DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULTS, IMAGES = DOCS / "results", DOCS / "images"
PAGE = DOCS / "results.md"

VERDICTS = ("beats", "loses to", "not told apart from")

Runs = dict[str, dict[int, dict[str, Any]]]  # variant -> seed -> what its file holds

# Validation accuracies of the thesis' tables 3.1 to 3.3, WideResNet-28-5 on CIFAR-100 at 80 %.
THESIS = {
    "dense": "74.83",
    "static": "69.94",
    "step-abs-ip-0.01": "72.68",
    "step-abs-ip-0.05": "72.01",
    "step-abs-ip-0.1": "71.17",
    "step-l2-0.01": "67.53",
    "step-l2-0.05": "66.70",
    "step-l2-0.1": "55.63",
    "epoch-abs-ip-0.01": "71.92",
}


def write() -> None:
    """Raises nothing for missing runs: what is not there yet is said to be missing."""
    read = {name: _read(group) for name, group in experiments.GROUPS.items()}
    compared = {name: runs for name, runs in read.items() if name != "thesis"}
    parts = [_head(read), _in_short(compared)]
    for name, group in experiments.GROUPS.items():
        parts.append(
            _thesis(group, read[name]) if name == "thesis" else _compared(group, read[name])
        )
    PAGE.write_text("\n\n".join(parts) + "\n")
    print(PAGE)


def _read(group: experiments.Group) -> Runs:
    runs: Runs = {variant: {} for variant in group.variants}
    for job in experiments.jobs([group.name]):
        file = RESULTS / job.group / f"{job.name}.json"
        if file.exists() and job.made(run := json.loads(file.read_text())):
            runs[job.variant][job.seed] = run
    return runs


def _head(read: dict[str, Runs]) -> str:
    every = [r for runs in read.values() for seeds in runs.values() for r in seeds.values()]
    wanted = len(experiments.jobs(list(experiments.GROUPS)))
    hardware = ", ".join(sorted({run["hardware"] for run in every}))
    torch = ", ".join(sorted({run["torch"] for run in every}))
    dates = sorted({run["date"] for run in every})
    lines = [
        "# Results",
        "",
        "What the methods of this toolkit reach on the data that needs no download, made by one "
        "command:",
        "",
        "    python benchmarks/results.py",
        "",
        "It leaves [a JSON file a run](results), skips what is done, continues what was cut off, "
        "and writes this page.",
        "",
        f"{len(every)} runs on {hardware}, a thread each and two side by side, PyTorch {torch}, "
        f"{' to '.join(dict.fromkeys([dates[0], dates[-1]]))}."
        if every
        else "No run is done yet.",
    ]
    if every and len(every) < wanted:
        lines.append(f"{wanted - len(every)} runs are still missing.")
    lines += [
        "",
        "- Each method runs with its own paper's schedule ([methods](methods.md)) where the "
        "group's command names no other; ERK, the same data, split, weights and batches for one "
        "seed.",
        "- ± is half of a 95 % interval (Student's t over the seeds). *Over static* is the "
        "difference to the static network of the same seed, paired; a method *beats* static where "
        "that interval lies above zero. With 3 seeds it is wide: what is not shown may still be. "
        "Every group makes up to fifteen such comparisons, each at 95 % by itself: a single "
        "narrow one may be luck.",
        "- *Similarity, RigL's schedule* finds what RigL finds: it differs in that the optimizer "
        "steps at an update as well. *Over 10 steps* searches the vectors of ten steps together.",
        "- Training FLOPs count the search, as a share of the dense network's "
        "([formulas](methods.md#flops)). For SNFS they are the papers' 2 f_S + f_D.",
        "- CPU time is that of the run's one thread, reading the data included; both times are "
        "medians over the seeds, on a machine that was busy with other work for a part of them: "
        "they compare roughly, and only inside a table. Growth is its share of the wall time: "
        "search and edits are in it, recording is not.",
        "- These are small networks on small data, chosen so that everyone can repeat them in an "
        "hour or two. They order the methods here; they say nothing of ImageNet.",
    ]
    return "\n".join(lines)


def _in_short(read: dict[str, Runs]) -> str:
    """Over all groups and densities: how often each method beats static, and by how much."""
    tallies: dict[str, list[tuple[str, float, float]]] = {}
    for runs in read.values():
        for variant, seeds in runs.items():
            method, _, density = variant.partition("-")
            over = _over(runs, variant, f"static-{density}") if density else None
            if over is not None:
                finals = [run["final"] for run in seeds.values()]
                share = [f["training_flops"] / f["dense_training_flops"] for f in finals]
                tallies.setdefault(method, []).append(
                    (_verdict(over), over[0], statistics.fmean(share))
                )
    rows = [
        [
            _label(method),
            *(f"{sum(v == verdict for v, _, _ in tally)} of {len(tally)}" for verdict in VERDICTS),
            f"{statistics.fmean(gain for _, gain, _ in tally):+.2f}",
            f"{statistics.fmean(share for _, _, share in tally):.3f}",
        ]
        for method, tally in tallies.items()
    ]
    header = ["", *(f"{verb} static" for verb in VERDICTS), "mean difference", "training FLOPs"]
    return (
        "## What beats static, and what does not\n\nOver the networks, data and densities below, "
        "each method where it was run:\n\n" + _table(header, rows)
    )


def _accuracy(run: dict[str, Any]) -> float:
    return 100 * run["final"]["test_accuracy"]


def _interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval; that of one value is infinite."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("inf")
    error = statistics.stdev(values) / len(values) ** 0.5
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * error


def _over(runs: Runs, variant: str, base: str) -> tuple[float, float] | None:
    """Paired difference to ``base`` over the seeds that both have."""
    both = sorted(runs[variant].keys() & runs[base].keys())
    if not both or variant == base:
        return None
    return _interval([_accuracy(runs[variant][s]) - _accuracy(runs[base][s]) for s in both])


def _shown(value: tuple[float, float] | None, sign: str = "") -> str:
    if value is None:
        return "–"
    mean, half = value
    return f"{mean:{sign}.2f} ± {half:.2f}" if half != float("inf") else f"{mean:{sign}.2f}"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figures(runs: dict[int, dict[str, Any]]) -> list[str]:
    finals = [run["final"] for run in runs.values()]
    flops = statistics.fmean(f["training_flops"] / f["dense_training_flops"] for f in finals)
    seconds = [run["cpu_seconds"] for run in runs.values() if run["cpu_seconds"] is not None]
    wall = statistics.median(f["wall_seconds"] for f in finals)
    growth = statistics.median(f["growth_seconds"] / f["wall_seconds"] for f in finals)
    return [
        f"{flops:.3f}",
        f"{statistics.median(seconds):.0f} s" if seconds else "–",
        f"{wall:.0f} s",
        f"{growth:.1%}",
    ]


def _compared(group: experiments.Group, runs: Runs) -> str:
    rows = []
    for variant, seeds in runs.items():
        if not seeds:
            continue
        method, _, density = variant.partition("-")
        over = None if not density else _over(runs, variant, f"static-{density}")
        rows.append(
            [
                density or "1",
                _label(method),
                _shown(_interval([_accuracy(run) for run in seeds.values()])),
                _shown(over, "+"),
                *_figures(seeds),
            ]
        )
    header = [
        "density", "method", "test accuracy, %", "over static", "training FLOPs", "CPU time",
        "wall time", "growth",
    ]  # fmt: skip
    parts = [f"## {group.title}", _command(group), _table(header, rows), _verdicts(runs)]
    densities = {variant.partition("-")[2] for variant in runs} - {""}
    if len(densities) > 1 and rows:
        parts.append(f"![accuracy against density](images/{_plot(group, runs)})")
    return "\n\n".join(parts)


def _label(method: str) -> str:
    return experiments.FURTHER[method][0] if method in experiments.FURTHER else method


def _command(group: experiments.Group) -> str:
    return f"`python train.py {' '.join(group.flags)} --method=M --density=D`, {group.seeds} seeds."


def _verdicts(runs: Runs) -> str:
    """What beats static, and what does not, one line a density."""
    lines = []
    for density in dict.fromkeys(v.partition("-")[2] for v in runs if "-" in v):
        groups: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
        for variant in runs:
            method, _, own = variant.partition("-")
            over = _over(runs, variant, f"static-{density}") if own == density else None
            if over is None:
                continue
            groups[_verdict(over)].append(_label(method))
        said = [f"{verb} static: {_and(who)}" for verb, who in groups.items() if who]
        if said:
            lines.append(f"- density {density}: {'; '.join(said)}.")
    return "\n".join(lines)


def _verdict(over: tuple[float, float]) -> str:
    """A paired difference and half of its interval -> one of VERDICTS."""
    mean, half = over
    return VERDICTS[0] if mean > half else VERDICTS[1] if -mean > half else VERDICTS[2]


def _and(names: list[str]) -> str:
    """Set apart, because a name may hold a comma."""
    return ", ".join(f"*{name}*" for name in names)


def _plot(group: experiments.Group, runs: Runs) -> str:
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axis = figure.subplots()
    methods = dict.fromkeys(v.partition("-")[0] for v in runs if "-" in v)
    for at, method in enumerate(methods):
        points = [
            (float(v.partition("-")[2]), *_interval([_accuracy(r) for r in seeds.values()]))
            for v, seeds in runs.items()
            if v.startswith(f"{method}-") and seeds
        ]
        if not points:
            continue
        density, mean, half = zip(*points, strict=True)
        half = [0 if h == float("inf") else h for h in half]
        # Side by side, so that the bars do not hide each other.
        shifted = [d * 1.02 ** (at - len(methods) / 2) for d in density]
        axis.errorbar(
            shifted, mean, half, marker="o", markersize=4, capsize=3, label=_label(method)
        )
    if runs["dense"]:
        mean, half = _interval([_accuracy(run) for run in runs["dense"].values()])
        axis.axhline(mean, color="0.4", linewidth=1, label="dense")
        if half != float("inf"):
            axis.axhspan(mean - half, mean + half, color="0.85")
    axis.set_xscale("log")
    ticks = sorted({float(v.partition("-")[2]) for v in runs if "-" in v})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("density")
    axis.set_ylabel("test accuracy, % (bars: 95 % interval)")
    axis.set_title(group.title)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    IMAGES.mkdir(exist_ok=True)
    name = f"results-{group.name}.png"
    figure.savefig(IMAGES / name, dpi=110)
    return name


def _thesis(group: experiments.Group, runs: Runs) -> str:
    """Tables 3.1 to 3.3 of Palaj's thesis, the rows that search by brute force."""
    titles = {
        "step-abs-ip": "Table 3.1: |inner product|, updates at every step",
        "step-l2": "Table 3.2: Euclidean distance, updates at every step",
        "epoch-abs-ip": "Table 3.3: |inner product|, updates after every epoch",
    }
    header = [
        "", "K", "test accuracy, %", "over static", "the thesis, %", "CPU time", "wall time",
        "growth",
    ]  # fmt: skip
    parts = [
        f"## {group.title}",
        "The protocol of Palaj (2023), \"Sparse neural network training from scratch\": density "
        "0.2 in every convolution and linear layer, batch 256, a fixed share K of the live "
        "connections replaced with no decay, here by exact (brute-force) search. It trained "
        "WideResNet-28-5 on CIFAR-100 for 70 epochs, 13,720 updates at one a step; these runs make "
        f"112 steps. `python train.py --preset=similarity-step {' '.join(group.flags)}` and "
        f"`--preset=similarity-epoch`, {group.seeds} seeds. The thesis' figures are those of "
        "its own network and data, one run each: the order of rows compares, the numbers do not.",
    ]  # fmt: skip
    for table, title in titles.items():
        rows = []
        for variant, seeds in runs.items():
            kind, _, share = variant.rpartition("-")
            if seeds and (kind == table or variant in ("dense", "static")):
                accuracy = _interval([_accuracy(run) for run in seeds.values()])
                rows.append(
                    [
                        variant if not kind else "similarity",
                        share if kind else "",
                        _shown(accuracy),
                        "–" if variant == "dense" else _shown(_over(runs, variant, "static"), "+"),
                        THESIS.get(variant, "–"),
                        *_figures(seeds)[1:],
                    ]
                )
        parts += [f"### {title}", _table(header, rows)]
    said = []
    for table, title in titles.items():
        for variant in runs:
            over = _over(runs, variant, "static") if variant.startswith(f"{table}-") else None
            if over is not None:
                share = variant.rpartition("-")[2]
                said.append(f"{title.split(':')[0]}, K = {share}: {_verdict(over)} static")
    parts.append("\n".join(f"- {line}." for line in said))
    return "\n\n".join(parts)
