"""Writes docs/results.md and its plots from the JSON files below docs/results."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import experiments
import results_thesis
from matplotlib.figure import Figure
from results_figures import (
    VERDICTS,
    Runs,
    accuracy,
    difference,
    figures,
    interval,
    shown,
    table,
    verdict,
)

DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULTS, IMAGES = DOCS / "results", DOCS / "images"
PAGE = DOCS / "results.md"


def write() -> None:
    """Raises nothing for missing runs: what is not there yet is said to be missing."""
    read = {name: _read(group) for name, group in experiments.GROUPS.items()}
    own = {"thesis", "thesis-indexes", "growth-mlp"}
    parts = [_head(read), _in_short({name: runs for name, runs in read.items() if name not in own})]
    for name, group in experiments.GROUPS.items():
        if name not in own:
            parts.append(_compared(group, read[name]))
    if "growth-mlp" in read:
        parts.append(_strategies(experiments.GROUPS["growth-mlp"], read["growth-mlp"]))
    if "thesis" in read:
        parts.append(results_thesis.section(read["thesis"], read.get("thesis-indexes", {})))
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
            over = difference(runs, variant, f"static-{density}") if density else None
            if over is not None:
                finals = [run["final"] for run in seeds.values()]
                share = [f["training_flops"] / f["dense_training_flops"] for f in finals]
                tallies.setdefault(method, []).append(
                    (verdict(over), over[0], statistics.fmean(share))
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
        "each method where it was run:\n\n" + table(header, rows)
    )


def _compared(group: experiments.Group, runs: Runs) -> str:
    rows = []
    for variant, seeds in runs.items():
        if not seeds:
            continue
        method, _, density = variant.partition("-")
        over = None if not density else difference(runs, variant, f"static-{density}")
        rows.append(
            [
                density or "1",
                _label(method),
                shown(interval([accuracy(run) for run in seeds.values()])),
                shown(over, "+"),
                *figures(seeds),
            ]
        )
    header = [
        "density", "method", "test accuracy, %", "over static", "training FLOPs", "CPU time",
        "wall time", "growth",
    ]  # fmt: skip
    parts = [f"## {group.title}", _command(group), table(header, rows), _verdicts(runs)]
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
            over = difference(runs, variant, f"static-{density}") if own == density else None
            if over is None:
                continue
            groups[verdict(over)].append(_label(method))
        said = [f"{verb} static: {_and(who)}" for verb, who in groups.items() if who]
        if said:
            lines.append(f"- density {density}: {'; '.join(said)}.")
    return "\n".join(lines)


def _and(names: list[str]) -> str:
    """Set apart, because a name may hold a comma."""
    return ", ".join(f"*{name}*" for name in names)


def _plot(group: experiments.Group, runs: Runs) -> str:
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axis = figure.subplots()
    methods = dict.fromkeys(v.partition("-")[0] for v in runs if "-" in v)
    for at, method in enumerate(methods):
        points = [
            (float(v.partition("-")[2]), *interval([accuracy(r) for r in seeds.values()]))
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
        mean, half = interval([accuracy(run) for run in runs["dense"].values()])
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


def _strategies(group: experiments.Group, runs: Runs) -> str:
    """One row a growth strategy, all against the static network and against the exact search."""
    rows = []
    for variant, seeds in runs.items():
        if seeds:
            label = experiments.STRATEGIES[variant][0] if variant != "static" else "static"
            rows.append(
                [
                    label,
                    shown(interval([accuracy(run) for run in seeds.values()])),
                    shown(difference(runs, variant, "static"), "+"),
                    shown(difference(runs, variant, "exact"), "+"),
                    *figures(seeds),
                ]
            )
    header = [
        "growth", "test accuracy, %", "over static", "over exact", "training FLOPs", "CPU time",
        "wall time", "growth",
    ]  # fmt: skip
    return "\n\n".join(
        [
            f"## {group.title}",
            f"`python train.py {' '.join(group.flags)} --method=similarity --growth=G`, "
            f"{group.seeds} seeds: what an approximate search loses, and what looking at many "
            "steps wins. Searches that find the same connections train the same network; at this "
            "width none of them saves time ([growth](growth.md) measures that).",
            table(header, rows),
        ]
    )
