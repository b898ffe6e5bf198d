"""Writes the results of docs/mam.md, and its plots, from the JSON files of the small sweeps.

python benchmarks/sweep.py sweeps/mam-small-*.yaml && python benchmarks/mam_page.py
"""

from __future__ import annotations

import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pages
import sweep
from matplotlib.figure import Figure
from results_figures import interval, shown

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGE, RESULTS, IMAGES = DOCS / "mam.md", DOCS / "results", DOCS / "images"
NETWORKS = {"mlp": "mlp-512-512", "alexnet": "alexnet-narrow", "vit": "vit-narrow"}
# Points of accuracy that may be lost, as in the thesis.
LOST = 0.03
# Tables 7.2 and 7.3 of the thesis, in percent: by epochs after the sum has vanished, of linear and
# of parabolic decay.
THESIS = {
    "mam": {1: (87.82, 88.87), 3: (88.26, 88.64), 5: (87.85, 88.95), 10: (87.76, 89.33),
            15: (88.38, 89.46)},
    "mac": {1: (88.99, 89.33), 3: (89.37, 89.75), 5: (89.42, 89.46), 10: (89.38, 89.53),
            15: (89.51, 89.79)},
}  # fmt: skip

Run = dict[str, Any]


def main() -> None:
    text = PAGE.read_text()
    for name, section in {
        "mam:curves": curves(),
        "mam:mac": put_back(),
        "mam:early": early(),
        "mam:speed": speed(),
    }.items():
        text = pages.replaced(text, name, section)
    PAGE.write_text(text)
    print(PAGE)


def read(name: str) -> tuple[list[Run], int]:
    """The runs of a sweep that are there, with their flags as a dict, and how many are missing."""
    jobs = sweep.read(ROOT / "sweeps" / f"{name}.yaml")
    runs = []
    for job in jobs:
        file = RESULTS / job.group / f"{job.name}.json"
        if file.is_file() and job.made(run := json.loads(file.read_text())):
            options = dict(flag[2:].split("=", 1) for flag in run["flags"])
            runs.append({**run, "options": options})
    return runs, len(jobs) - len(runs)


def grouped(runs: Iterable[Run], key: Callable[[Run], Any]) -> dict[Any, list[Run]]:
    groups: dict[Any, list[Run]] = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return dict(groups)


def curves() -> str:
    parts = []
    for short, network in NETWORKS.items():
        runs, missing = read(f"mam-small-{short}-curves")
        if missing:
            parts.append(f"*{network}: {missing} runs are missing.*")
        by_neuron = grouped(runs, lambda run: run["options"]["neuron"])
        if set(by_neuron) == {"mam", "mac"}:
            image = plot(short, network, by_neuron)
            parts += [f"![accuracy against kept weights of {network}](images/{image})"]
            parts += [kept_table(network, by_neuron)]
    return "\n\n".join(parts)


def accuracies(runs: list[Run]) -> dict[tuple[str, str], dict[float, list[float]]]:
    """By score and scope: by share kept, the accuracy of every seed."""
    found: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for line in run["curves"]:
            own = found[line["score"], line["scope"]]
            own[line["keep"]].append(line["test"]["accuracy"])
    return found


def plot(short: str, network: str, by_neuron: dict[str, list[Run]]) -> str:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for neuron, style in (("mam", "-"), ("mac", "--")):
        lines = accuracies(by_neuron[neuron])
        scores = list(dict.fromkeys(score for score, _ in lines))
        for axis, scope in zip(axes, ("local", "global"), strict=True):
            for colour, score in enumerate(scores):
                own = sorted(lines[score, scope].items())
                keeps = [keep for keep, _ in own]
                axis.plot(
                    keeps,
                    [statistics.mean(values) for _, values in own],
                    style,
                    color=f"C{colour}",
                    marker="." if neuron == "mam" else None,
                    linewidth=1.6 if neuron == "mam" else 1,
                    label=score if neuron == "mam" else None,
                )
            axis.set_xscale("log")
            axis.set_title(f"{network}, {scope}")
            axis.set_xlabel("share of the weights kept")
            axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy (solid: MAM, dashed: sum)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    name = f"mam-curves-{short}.png"
    figure.savefig(IMAGES / name, dpi=110)
    return name


def least_kept(shares: dict[float, list[float]]) -> float:
    """The smallest share, walking down, until more than LOST is lost of the mean accuracy."""
    whole, least = statistics.mean(shares[1]), 1.0
    for keep in sorted(shares, reverse=True):
        if statistics.mean(shares[keep]) < whole - LOST:
            break
        least = keep
    return least


def kept_table(network: str, by_neuron: dict[str, list[Run]]) -> str:
    mam, mac = accuracies(by_neuron["mam"]), accuracies(by_neuron["mac"])
    whole = {
        neuron: [run["phases"][0]["test"]["accuracy"] for run in runs]
        for neuron, runs in by_neuron.items()
    }
    rows = [
        f"Unpruned, {network}: MAM {percent(whole['mam'])}, sum {percent(whole['mac'])}. The "
        f"smallest share kept at which no more than {100 * LOST:.0f} points are lost:",
        "",
        "| score | MAM, local | MAM, global | sum, local | sum, global |",
        "|---|---|---|---|---|",
    ]
    for score in dict.fromkeys(score for score, _ in mam):
        cells = [
            f"{100 * least_kept(lines[score, scope]):g} %"
            for lines in (mam, mac)
            for scope in ("local", "global")
        ]
        rows.append(f"| {score} | {' | '.join(cells)} |")
    best = {
        neuron: min(least_kept(shares) for shares in lines.values())
        for neuron, lines in (("MAM", mam), ("sum", mac))
    }
    magnitude = min(least_kept(mac["magnitude", scope]) for scope in ("local", "global"))
    rows += [
        "",
        f"The best of MAM keeps 1/{magnitude / best['MAM']:.0f} of what the sum needs by magnitude "
        f"({100 * magnitude:g} %), and 1/{best['sum'] / best['MAM']:.0f} of what it needs by its "
        f"own best score ({100 * best['sum']:g} %).",
    ]
    return "\n".join(rows)


def put_back() -> str:
    mam, missing = read("mam-small-mac")
    sums, more = read("mam-small-sum")
    rows = [f"*{missing + more} runs are missing.*\n"] if missing + more else []
    rows += [
        "| trained as | pruned by | then | kept | after training | after pruning | fine-tuned |",
        "|---|---|---|---|---|---|---|",
    ]
    of_mam = grouped(mam, lambda run: (run["options"]["keep"], run["options"]["after-prune"]))
    of_sum = grouped(sums, lambda run: (run["options"]["keep"], run["options"]["prune-score"]))
    for (keep, after), runs in of_mam.items():
        then = {"mam": "MAM", "mac": "sum"}[after]
        rows.append(f"| MAM | gradient | {then} | {100 * float(keep):g} % | {phases(runs)} |")
    for (keep, score), runs in of_sum.items():
        rows.append(f"| sum | {score} | sum | {100 * float(keep):g} % | {phases(runs)} |")
    return "\n".join(rows)


def phases(runs: list[Run]) -> str:
    found = [[phase["test"]["accuracy"] for phase in run["phases"]] for run in runs]
    return " | ".join(percent(list(own)) for own in zip(*found, strict=True))


def early() -> str:
    runs, missing = read("mam-small-early")
    rows = [f"*{missing} runs are missing.*\n"] if missing else []
    by = grouped(
        runs,
        lambda run: (
            run["options"]["after-prune"],
            int(run["options"]["prune-after"]),
            run["options"]["beta-decay"],
        ),
    )
    for after, title in (("mam", "max and min kept (table 7.2)"), ("mac", "sum put back (7.3)")):
        rows += [
            f"**{title[0].upper()}{title[1:]}**\n",
            "| pruned after | linear | parabolic | thesis, linear | thesis, parabolic |",
            "|---|---|---|---|---|",
        ]
        for epochs, published in THESIS[after].items():
            cells = []
            for decay in ("linear", "parabolic"):
                own = by.get((after, epochs, decay), [])
                cells.append(percent([run["final"]["test_accuracy"] for run in own]) if own else "")
            cells += [f"{value:.2f} %" for value in published]
            rows.append(f"| {epochs} epoch{'s' * (epochs > 1)} | {' | '.join(cells)} |")
        rows.append("")
    whole = [run["phases"][0]["training_flops"] / run["final"]["training_flops"] for run in runs]
    if whole:
        rows.append(f"Before pruning: {100 * statistics.mean(whole):.1f} % of all training FLOPs.")
    return "\n".join(rows)


def speed() -> str:
    """From benchmarks/mam.py: the last row of each size, batch and direction."""
    with (ROOT / "benchmarks" / "results" / "mam.csv").open() as file:
        rows = {
            (int(r["n"]), int(r["batch"]), r["what"], r["way"]): r for r in csv.DictReader(file)
        }
    lines = [
        "| inputs, outputs | batch | | MAM | linear | naive MAM | MAM's memory | the naive's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (n, batch, what, way), own in rows.items():
        others = [rows.get((n, batch, what, other)) for other in ("linear", "naive")]
        if way != "mam" or batch not in (128, 512) or None in others:
            continue
        linear, naive = others
        lines.append(
            f"| {n} | {batch} | {what} | {_ms(own)} | {_ms(linear)} | {_ms(naive)} "
            f"| {_mb(own)} | {_mb(naive)} |"
        )
    last = list(rows.values())[-1]
    lines.append(
        f"\n{last['hardware']}, {last['threads']} threads, PyTorch {last['torch']}, "
        f"{last['date']}. Medians of calls in turns. Memory: the peak beside the results "
        "themselves. A naive form that would need more than there is was not run."
    )
    return "\n".join(lines)


def _ms(row: dict[str, str]) -> str:
    return f"{float(row['ms']):.3g} ms" if row["ms"] else "–"


def _mb(row: dict[str, str]) -> str:
    return f"{float(row['work MB']):.3g} MB" if row["work MB"] else "–"


def percent(values: list[float]) -> str:
    """Mean, and half of a 95 % interval where there are several seeds."""
    return f"{shown(interval([100 * value for value in values]))} %"


if __name__ == "__main__":
    main()
