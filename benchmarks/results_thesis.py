"""The tables of Palaj's thesis on the results page, at the scale of a CPU."""

from __future__ import annotations

import experiments
from results_figures import Runs, accuracy, difference, figures, interval, shown, table, verdict

Row = tuple[str, str, str, str, str]  # variant, K, k_similar, bits, the thesis' accuracy

# Validation accuracies of WideResNet-28-5 on CIFAR-100; one run each.
_DENSE = ("dense", "", "", "", "74.83")
_STATIC = ("static", "", "", "", "69.94")


def _searched(table: str, exact: dict[str, str], indexes: dict[str, dict[str, str]]) -> list[Row]:
    """accuracies by K, and by k_similar and K."""
    rows = [(f"{table}-{share}", share, "all", "", said) for share, said in exact.items()]
    rows += [
        (f"{table}-faiss{k}-{share}", share, k, "", said)
        for k, of_share in indexes.items()
        for share, said in of_share.items()
    ]
    return [_DENSE, _STATIC, *rows]


def _hashed(density: str, accuracies: dict[str, dict[str, str]]) -> list[Row]:
    return [
        (f"lsh-{density}-{share}-{bits}", share, "0.15", bits, said)
        for share, of_bits in accuracies.items()
        for bits, said in of_bits.items()
    ]


TABLES: dict[str, tuple[str, list[Row]]] = {
    "3.1": (
        "|inner product|, updates at every step",
        _searched(
            "step-abs-ip",
            {"0.01": "72.68", "0.05": "72.01", "0.1": "71.17"},
            {
                "0.15": {"0.01": "73.65", "0.05": "72.13", "0.1": "70.59"},
                "0.125": {"0.01": "72.53", "0.05": "73.28", "0.1": "68.21"},
            },
        ),
    ),
    "3.2": (
        "Euclidean distance, updates at every step",
        _searched(
            "step-l2",
            {"0.01": "67.53", "0.05": "66.70", "0.1": "55.63"},
            {
                "0.15": {"0.01": "68.73", "0.05": "69.68", "0.1": "65.35"},
                "0.2": {"0.01": "68.95", "0.05": "67.59", "0.1": "64.17"},
            },
        ),
    ),
    "3.3": (
        "|inner product|, updates after every epoch",
        _searched(
            "epoch-abs-ip",
            {"0.01": "71.92", "0.05": "–", "0.1": "–"},
            {
                "0.15": {"0.01": "71.99", "0.05": "73.04", "0.1": "71.08"},
                "0.125": {"0.01": "71.91", "0.05": "72.01", "0.1": "69.90"},
            },
        ),
    ),
    "3.4": (
        "LSH, |inner product|, updates at every step, density 0.2",
        [
            _DENSE,
            _STATIC,
            *_hashed(
                "0.2",
                {
                    "0.05": {
                        "0.5": "72.46", "1": "72.8", "1.5": "72", "2": "72.21", "4": "72.1",
                        "8": "71.48",
                    }
                },
            ),
        ],
    ),
    "3.5": (
        "LSH, |inner product|, updates at every step, density 0.1",
        [
            _DENSE,
            ("static-0.1", "", "", "", "65.92"),
            *_hashed(
                "0.1",
                {
                    "0.01": {"0.5": "67.65", "1": "69.5", "1.5": "70.02", "2": "69.73"},
                    "0.025": {"0.5": "68.39", "1": "68.12", "1.5": "68.85", "2": "68.44"},
                },
            ),
        ],
    ),
}  # fmt: skip


def section(exact: Runs, indexes: Runs) -> str:
    """exact: the runs that search by brute force; indexes: those that search by faiss."""
    group = experiments.GROUPS["thesis"]
    runs = {**exact, **indexes}
    parts = [
        f"## {group.title}",
        'The protocol of Palaj (2023), "Sparse neural network training from scratch": density '
        "0.2 (table 3.5: 0.1) in every convolution and linear layer, batch 256, a fixed share K of "
        "the live connections replaced with no decay. It trained WideResNet-28-5 on CIFAR-100 for "
        "70 epochs, 13,720 updates at one a step; these runs make 112 steps. `python train.py "
        f"--preset=similarity-step {' '.join(group.flags)}` and `--preset=similarity-epoch`: "
        f"{group.seeds} seeds where the search is exact (k = all), {_seeds(indexes)} with faiss "
        "(`--growth=faiss --growth.k-similar=k`, and `--growth.index=lsh --growth.bits=b` for "
        "hashes of b times the vectors' length). *Over static* compares the same seeds. The "
        "thesis' figures are those of its own network and data, one run each: the order of rows "
        "compares, the numbers do not.",
    ]
    for number, (title, rows) in TABLES.items():
        lines = [_line(runs, row) for row in rows if runs.get(row[0])]
        header = [
            "", "K", "k", "bits", "test accuracy, %", "over static", "the thesis, %", "CPU time",
            "wall time", "growth",
        ]  # fmt: skip
        parts += [f"### Table {number}: {title}", table(header, lines)]
    parts.append(_verdicts(exact))
    return "\n\n".join(parts)


def _line(runs: Runs, row: Row) -> list[str]:
    variant, share, k, bits, said = row
    seeds = runs[variant]
    base = "static-0.1" if variant.startswith("lsh-0.1") else "static"
    name = variant.partition("-")[0] if not share else "similarity"
    return [
        name,
        share,
        k,
        bits,
        shown(interval([accuracy(run) for run in seeds.values()])),
        "–" if name in ("dense", "static") else shown(difference(runs, variant, base), "+"),
        said,
        *figures(seeds)[1:],
    ]


def _seeds(runs: Runs) -> str:
    most = max((len(seeds) for seeds in runs.values()), default=0)
    return f"{most} seed{'s' * (most != 1)}"


def _verdicts(runs: Runs) -> str:
    """Of the runs of several seeds."""
    said = []
    for number, (_, rows) in TABLES.items():
        for variant, share, *_ in rows:
            over = difference(runs, variant, "static") if share and variant in runs else None
            if over is not None:
                said.append(f"- Table {number}, K = {share}, exact: {verdict(over)} static.")
    return "\n".join(said)
