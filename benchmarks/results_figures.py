"""Figures of runs over seeds, and tables of them, as the results page shows them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from scipy import stats

Runs = dict[str, dict[int, dict[str, Any]]]  # variant -> seed -> what its file holds

VERDICTS = ("beats", "loses to", "not told apart from")


def accuracy(run: dict[str, Any]) -> float:
    return 100 * run["final"]["test_accuracy"]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval; that of one value is infinite."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("inf")
    error = statistics.stdev(values) / len(values) ** 0.5
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * error


def difference(runs: Runs, variant: str, base: str) -> tuple[float, float] | None:
    """Paired difference to ``base`` over the seeds that both have."""
    both = sorted(runs[variant].keys() & runs[base].keys())
    if not both or variant == base:
        return None
    return interval([accuracy(runs[variant][s]) - accuracy(runs[base][s]) for s in both])


def shown(value: tuple[float, float] | None, sign: str = "") -> str:
    if value is None:
        return "–"
    mean, half = value
    return f"{mean:{sign}.2f} ± {half:.2f}" if half != float("inf") else f"{mean:{sign}.2f}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figures(runs: dict[int, dict[str, Any]]) -> list[str]:
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


def verdict(over: tuple[float, float]) -> str:
    """A paired difference and half of its interval -> one of VERDICTS."""
    mean, half = over
    return VERDICTS[0] if mean > half else VERDICTS[1] if -mean > half else VERDICTS[2]
