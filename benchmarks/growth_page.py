"""The tables and plots of docs/growth.md, from the rows that benchmarks/growth.py has measured.

What stands between ``<!-- growth:NAME -->`` and ``<!-- /growth:NAME -->`` is written here; all else
on the page is left as it is. Rows count that were measured on the hardware, and with the number of
threads, of the last one; of a cell that was measured twice, the later.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pages import replaced

DOCS = Path(__file__).resolve().parent.parent / "docs"
Row = dict[str, str]

# The widest recorded layer, 2048 x 2048.
RECORDED = ("mlp", "4")
EXACT = ("dense", "exact")
# The columns of the tables over widths.
MAIN = ("dense + torch.topk", "dense + np.partition", "dense", "exact", "lowrank")
# Lines of the plot over widths: (search, what it is called, colour, style).
LINES = (
    ("dense + torch.topk", "whole G, torch.topk", "0.25", ":"),
    ("dense + np.partition", "whole G, np.partition", "0.25", "--"),
    ("dense", "dense: G in tiles", "0.25", "-"),
    ("exact", "exact", "tab:blue", "-"),
    ("lowrank", "lowrank", "tab:red", "-"),
    ("auto", "auto", "tab:orange", "--"),
    ("subblock .35", "subblock .35", "tab:olive", "-"),
    ("gse norm", "gse norm", "tab:cyan", "-"),
    ("random", "random", "0.7", "-"),
    ("faiss range", "faiss range_search", "tab:green", "-"),
    ("faiss flat .125", "faiss flat, k = .125 n", "tab:green", "--"),
    ("faiss hnsw .02", "faiss HNSW, k = .02 n", "tab:green", ":"),
    ("nmslib hnsw .02", "nmslib HNSW, k = .02 n", "tab:purple", ":"),
)
# Families of the plot of recall: (how their names begin, what they are called, colour, marker).
FAMILIES = (
    ("dense + ", "whole G: topk, partition", "0.25", "s"),
    ("dense", "dense: G in tiles", "0.25", "o"),
    ("exact", "exact", "tab:blue", "o"),
    ("lowrank unchecked", "lowrank unchecked: rank 2 … 64", "salmon", "."),
    ("lowrank", "lowrank, recall promised", "tab:red", "o"),
    ("subblock", "subblock: share .1 … .7", "tab:olive", "v"),
    ("gse uniform", "gse uniform: subset 1, 4, 16", "lightskyblue", "^"),
    ("gse norm", "gse norm: subset 1, 4, 16", "tab:cyan", "^"),
    ("gse sign", "gse sign: subset 1, 4, 16", "teal", "^"),
    ("random", "random", "0.7", "o"),
    ("faiss range", "faiss range_search", "tab:green", "*"),
    ("faiss flat .", "faiss flat: k = .02 … .2 n", "tab:green", "P"),
    ("faiss flat ip", "faiss flat, ip: k = .125 n", "yellowgreen", "P"),
    ("faiss flat l2", "faiss flat, l2: k = .125 n", "darkkhaki", "P"),
    ("faiss ivf", "faiss IVF: nprobe .1, .25, .5", "tab:brown", "X"),
    ("faiss hnsw", "faiss HNSW: k = .02 … .125 n", "tab:purple", "d"),
    ("nmslib hnsw", "nmslib HNSW: k = .02 … .125 n", "tab:pink", "d"),
    ("faiss lsh bits", "faiss LSH: bits .5 … 8", "tab:orange", "p"),
)


def write(results: Path, docs: Path = DOCS) -> None:
    """Bring the page up to what lies in ``results``."""
    rows = {name: _rows(results / f"{name}.csv") for name in FILES}
    states = {row["code"] for row in rows["growth"]}
    if len(states) > 1:
        print(f"rows of {len(states)} states of growth/: without --only page all are of one")
    (docs / "images").mkdir(exist_ok=True)
    page = docs / "growth.md"
    text = page.read_text()
    for name, (file, section) in SECTIONS.items():
        if rows[file]:
            text = replaced(text, f"growth:{name}", section(rows[file]))
    page.write_text(text)
    print(page)
    if rows["growth"]:
        for name, plot in PLOTS.items():
            print(_saved(plot(rows["growth"]), docs / "images" / name))


def _rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    same = ("hardware", "threads", "torch")
    rows = [row for row in rows if all(row[key] == rows[-1][key] for key in same)]
    what = ("source", "part", "block", "wanted", "search", "group", "claim", "constant")
    return list({tuple(row.get(key) for key in what): row for row in rows}.values())


class _Table:
    """Cells of the searches by (source, part, block, wanted, search)."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self.by_cell = {self._key(row): row for row in self.rows}

    @staticmethod
    def _key(row: Row) -> tuple[str, ...]:
        return row["source"], row["part"], row["block"], row["wanted"], row["search"]

    def get(
        self, source: str, part: Any, wanted: str, search: str, block: str = "(1, 1)"
    ) -> Row | None:
        """None where it was not measured, or skipped."""
        row = self.by_cell.get((source, str(part), block, wanted, search))
        return row if row and row["seconds"] else None

    def parts(self, source: str, block: str = "(1, 1)") -> list[str]:
        found = {r["part"] for r in self.rows if r["source"] == source and r["block"] == block}
        return sorted(found, key=lambda part: (not part.isdecimal(), part.zfill(8)))


def _markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _seconds(row: Row | None) -> str:
    return _short(float(row["seconds"])) if row else "–"


def _short(value: float) -> str:
    """Three digits at most, without a leading zero."""
    text = f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.3g}"
    return text[1:] if text.startswith("0.") else text


def _share(text: str) -> str:
    value = f"{float(text):.3f}"
    return value[1:] if value.startswith("0") else "1" if value == "1.000" else value


def _cost(row: Row | None) -> str:
    return f"{_seconds(row)} / {_short(float(row['MB']))}" if row and row["MB"] else _seconds(row)


def _quality(row: Row | None) -> str:
    return f"{_share(row['recall'])} / {_share(row['mass'])}" if row else "–"


def _ratio(row: Row | None, other: Row | None) -> str:
    """How many times as fast as the other."""
    return _short(float(other["seconds"]) / float(row["seconds"])) if row and other else "–"


def _circumstances(rows: list[Row]) -> str:
    last = rows[-1]
    dates = sorted({row["date"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    threads = "one thread" if last["threads"] == "1" else f"{last['threads']} threads"
    return (
        f"Measured on {threads} of {last['hardware']}, PyTorch {last['torch']}, {when}: medians of "
        "calls in turns, seconds / MB; memory is the peak beyond the vectors themselves."
    )


def _over_widths(wanted: str) -> Callable[[list[Row]], str]:
    def section(rows: list[Row]) -> str:
        table = _Table(rows)
        parts = [p for p in table.parts("synth") if table.get("synth", p, wanted, "exact")]
        body = []
        for n in parts:
            own = [table.get("synth", n, wanted, search) for search in MAIN]
            chosen = _chosen(table.get("synth", n, wanted, "auto"))
            body.append([n, *map(_cost, own), _quality(own[-1]), chosen])
        head = ["n", *MAIN, "lowrank: recall / mass", "auto chooses"]
        text = _markdown(head, body)
        if wanted == "16 n" and parts[-1:] == ["65536"]:
            wide = [n for n in parts if int(n) >= 4096]
            exponents = [
                f"`{search}` {_exponent(table, wide, wanted, search):.2f}"
                for search in MAIN
                if all(table.get("synth", n, wanted, search) for n in wide)
            ]
            text += f"\n\nExponents of time from n = 4096 on: {', '.join(exponents)}."
        return text

    return section


def _exponent(table: _Table, parts: list[str], wanted: str, search: str) -> float:
    cells = [table.get("synth", n, wanted, search) for n in parts]
    seconds = [float(cell["seconds"]) for cell in cells if cell]
    return float(np.polyfit(np.log([int(n) for n in parts]), np.log(seconds), 1)[0])


def _chosen(row: Row | None) -> str:
    return str(json.loads(row["report"]).get("growth", "–")) if row else "–"


def _by_data(rows: list[Row]) -> str:
    table, body = _Table(rows), []
    for source in ("synth", "synth-flat", "iid", "mlp"):
        for part in table.parts(source):
            if source != "mlp" and int(part) not in (2048, 8192, 32768):
                continue
            own = {s: table.get(source, part, "0.1 %", s) for s in (*EXACT, "lowrank", "auto")}
            exact, lowrank = own["exact"], own["lowrank"]
            if exact is None or lowrank is None:
                continue
            size = exact["n_out"] if source != "mlp" else f"{exact['n_in']} -> {exact['n_out']}"
            computed = json.loads(exact["report"]).get("computed")
            rank = json.loads(lowrank["report"]).get("rank", 0)
            body.append(
                [
                    source,
                    size,
                    _seconds(own["dense"]),
                    _seconds(exact),
                    f"{computed:.0%}" if computed is not None else "–",
                    _seconds(lowrank),
                    f"{rank:g}" if rank else "exact",
                    _quality(lowrank),
                    _chosen(own["auto"]),
                ]
            )
    head = ["data", "n", "dense", "exact", "of G computed", "lowrank", "rank"]
    return _markdown([*head, "recall / mass", "auto chooses"], body)


def _indexes(rows: list[Row]) -> str:
    table, body = _Table(rows), []
    where = [(*RECORDED, "0.1 %")]
    where += [("synth", str(n), "16 n") for n in (2048, 8192, 32768)]
    where = [at for at in where if table.get(*at, "dense")]
    names = [
        row["search"] for row in rows if row["search"].split()[0] in ("exact", "faiss", "nmslib")
    ]
    for name in dict.fromkeys(names):
        own = [table.get(*at, name) for at in where]
        streamed = [table.get(*at, "dense") for at in where]
        # Of the settings of each index, the plot tells.
        if any(own[1:]) or name.startswith(("faiss flat ip", "faiss flat l2")):
            cells = [
                f"{_quality(a)} / {_ratio(a, b)}" if a else "–"
                for a, b in zip(own, streamed, strict=True)
            ]
            body.append([name, *cells])
    head = [f"{source}, {_width(part)}, K = {wanted}" for source, part, wanted in where]
    return _markdown(["search", *head], body)


def _width(part: str) -> str:
    """The recorded layer has a name in place of a width."""
    return part if len(part) > 2 else "2048"


def _verdict(rows: list[Row]) -> str:
    """Whether any index reached a recall of .95 faster than the exact searches. A search of all
    pairs above a threshold is none."""
    table = _Table(rows)
    indexes = [r for r in rows if r["search"].split()[0] in ("faiss", "nmslib") and r["seconds"]]
    ratios: dict[str, list[float]] = {"range": [], "index": []}
    faster = []
    for row in indexes:
        at = row["source"], row["part"], row["wanted"]
        exact = [float(e["seconds"]) for s in EXACT if (e := table.get(*at, s))]
        if float(row["recall"]) < 0.95 or not exact:
            continue
        slower = float(row["seconds"]) / min(exact)
        kind = "range" if row["search"] == "faiss range" else "index"
        ratios[kind].append(slower)
        if slower < 1 and kind == "index":
            faster.append(f"{row['search']} on {row['source']}, n = {row['n_in']}")
    if not ratios["index"]:
        return ""
    tried = sum(row["search"] != "faiss range" for row in indexes)
    text = (
        f"Of {tried} searches by an index, over all widths, data and settings, "
        f"{len(ratios['index'])} reached a recall of .95. "
    )
    none = f"None of them was faster than the exact search: they took {_span(ratios['index'])}."
    text += f"Faster than the exact search: {'; '.join(faster)}." if faster else none
    if ratios["range"]:
        text += f" faiss' `range_search`, which is exact, took {_span(ratios['range'])}."
    return text


def _span(ratios: list[float]) -> str:
    return f"{min(ratios):.1f} to {max(ratios):.1f} times as long"


def _sampling(rows: list[Row]) -> str:
    table, body = _Table(rows), []
    at = [RECORDED, ("synth", "4096")]
    names = ["random"]
    for sampling in ("uniform", "norm", "sign"):
        names += [f"gse {sampling}", f"gse {sampling} x 16"]
    for name in (*names, "subblock .2", "subblock .35"):
        own = [table.get(*where, "0.1 %", name) for where in at]
        if any(own):
            exact = [table.get(*where, "0.1 %", "exact") for where in at]
            pairs = zip(own, exact, strict=True)
            body.append([name, *(f"{_quality(a)} / {_ratio(a, b)}" for a, b in pairs)])
    return _markdown(["search", *(f"{source}, {_width(part)}" for source, part in at)], body)


def _blocks(rows: list[Row]) -> str:
    table, body = _Table(rows), []
    block = "(32, 32)"
    for part in table.parts("synth", block):
        for wanted in ("0.1 %", "1 %", "3 %"):
            own = {
                s: table.get("synth", part, wanted, s, block)
                for s in ("blocks tiles", "blocks gram", "lowrank", "lowrank unchecked 24", "auto")
            }
            cells = [_cost(own[s]) for s in ("blocks tiles", "blocks gram", "lowrank")]
            checked = _quality(own["lowrank"])
            loose = own["lowrank unchecked 24"]
            chosen = _chosen(own["auto"])
            body.append([part, wanted, *cells, checked, _cost(loose), _quality(loose), chosen])
    head = ["n", "K of the blocks", "tiles", "gram", "lowrank", "recall / mass", "unchecked"]
    return _markdown([*head, "recall / mass", "auto chooses"], body)


def _convolutions(rows: list[Row]) -> str:
    table, body = _Table(rows), []
    names = ("dense + np.partition", "exact", "pool", "subblock .35", "gse norm")
    for source, wanted in (("conv", "0.1 %"), ("conv", "1 %"), ("wrn", "1 %")):
        for part in table.parts(source):
            own = [table.get(source, part, wanted, name) for name in names]
            exact = own[1]
            if exact is None:
                continue
            what = "drawn" if source == "conv" else "recorded"
            label = f"{exact['n_out']} x {exact['n_in']}, {exact['samples']} positions, {what}"
            body.append([label, wanted, *map(_cost, own[:2])])
            body[-1] += [f"{_cost(row)}, {_quality(row)}" for row in own[2:]]
    head = ["layer", "K", *names[:2]]
    return _markdown([*head, *(f"{name}, recall / mass" for name in names[2:])], body)


def _auto(rows: list[Row]) -> str:
    table, losses = _Table(rows), []
    for row in rows:
        if row["search"] != "auto" or not row["seconds"]:
            continue
        at = row["source"], row["part"], row["wanted"]
        exact = "blocks gram" if row["block"] != "(1, 1)" else "exact"
        own = {
            "exact": table.get(*at, exact, row["block"]),
            "dense": table.get(*at, "dense", row["block"])
            or table.get(*at, "blocks tiles", row["block"]),
            "lowrank": table.get(*at, "lowrank", row["block"]),
        }
        chosen = own[_chosen(row).split(":")[0]]
        if chosen:
            best = min(float(other["seconds"]) for other in own.values() if other)
            losses.append((float(chosen["seconds"]) / best, " ".join(at)))
    if not losses:
        return ""
    right = sum(loss < 1.1 for loss, _ in losses)
    worst, where = max(losses)
    return (
        f"On the {len(losses)} queries measured here, what it chose was the fastest of `dense`, "
        f"`exact` and `lowrank`, or within 10 % of it, in {right}; it took "
        f"{statistics.mean(loss for loss, _ in losses):.2f} times the fastest's time on average, "
        f"and {worst:.2f} times at worst ({where})."
    )


def _claims(rows: list[Row]) -> str:
    claimed = [row for row in rows if row["result"] != "info"]
    body = [[row["claim"], row["measured"], row["wanted"], row["result"]] for row in claimed]
    return _markdown(["", "measured", "wanted", ""], body)


def _constants(rows: list[Row]) -> str:
    body = [[f"`{row['constant']}`", row["in costs.py"], row["here"]] for row in rows]
    return _markdown(["constant", "in costs.py", "measured"], body)


FILES = ("growth", "growth_claims", "growth_constants")
SECTIONS: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "circumstances": ("growth", _circumstances),
    "share": ("growth", _over_widths("0.1 %")),
    "linear": ("growth", _over_widths("16 n")),
    "data": ("growth", _by_data),
    "verdict": ("growth", _verdict),
    "indexes": ("growth", _indexes),
    "sampling": ("growth", _sampling),
    "blocks": ("growth", _blocks),
    "convolutions": ("growth", _convolutions),
    "auto": ("growth", _auto),
    "claims": ("growth_claims", _claims),
    "constants": ("growth_constants", _constants),
}


def _saved(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path


def _cost_against_width(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    table = _Table(rows)
    widths = table.parts("synth")
    for search, label, colour, style in LINES:
        own = [row for n in widths if (row := table.get("synth", n, "16 n", search))]
        at = [int(row["part"]) for row in own]
        options = {"color": colour, "linestyle": style, "marker": ".", "label": label}
        axes[0].plot(at, [float(row["seconds"]) for row in own], **options)
        axes[1].plot(at, [max(0.1, float(row["MB"] or "nan")) for row in own], **options)
    for axis, what in zip(
        axes, ("seconds a search", "peak memory beyond the vectors, MB"), strict=True
    ):
        _logarithmic(axis, widths)
        axis.set_ylabel(what)
    figure.suptitle("K = 16 n of n x n, synthetic vectors of a batch of 128")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    return figure


def _logarithmic(axis: Axes, widths: list[str]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks([int(n) for n in widths], widths, rotation=45, fontsize=8)
    axis.minorticks_off()
    axis.set_xlabel("inputs = outputs = n")
    axis.grid(alpha=0.3)


def _recall_against_cost(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    panels = (RECORDED, ("synth", "4096"))
    for axis, (source, part) in zip(axes, panels, strict=True):
        own = [
            row
            for row in rows
            if (row["source"], row["part"], row["wanted"], row["block"])
            == (source, part, "0.1 %", "(1, 1)")
        ]
        for family, members in _families(own).items():
            _, label, colour, marker = family
            points = sorted((float(row["recall"]), float(row["seconds"])) for row in members)
            recalls, seconds = zip(*points, strict=True)
            axis.plot(seconds, recalls, color=colour, marker=marker, label=label, linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlabel("seconds a search")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("recall of the exact best")
    axes[0].set_title("recorded layer, 2048 x 2048, K = .1 %")
    axes[1].set_title("synthetic, 4096 x 4096, K = .1 %")
    entries = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries[label] = handle
    labels = [label for _, label, _, _ in FAMILIES if label in entries]
    handles = [entries[label] for label in labels]
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    return figure


def _families(rows: list[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    for family in FAMILIES:
        for row in rows:
            known = any(row in members for members in found.values())
            if row["search"].startswith(family[0]) and row["seconds"] and not known:
                found.setdefault(family, []).append(row)
    return found


PLOTS: dict[str, Callable[[list[Row]], Figure]] = {
    "growth-width.png": _cost_against_width,
    "growth-recall.png": _recall_against_cost,
}
