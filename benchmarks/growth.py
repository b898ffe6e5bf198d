"""The measurements behind every claim about the searches for new connections.

    python benchmarks/growth.py                  # everything: about 20 minutes on one quiet core
    python benchmarks/growth.py --only claims    # or search, constants, page
    python benchmarks/growth.py --quick          # does it all work? some minutes, keeps nothing

``search``: time, peak memory, recall and mass of every strategy over widths, data and numbers of
connections -> results/growth.csv. ``claims``: what must hold, PASS or FAIL -> growth_claims.csv.
``constants``: those of ``triton_kernels/costs.py`` on this machine -> growth_constants.csv.
``page``: the tables and plots of docs/growth.md from these files.

Each group of rows is a process of its own, appended when it is measured: the script may be stopped
at any time, and goes on where it stopped. What has a row of the same code, PyTorch, hardware and
number of threads is skipped, unless with ``--again``. Times are medians of calls in turns within
one process; a search of more than two seconds is timed once. Memory is the peak of the resident set
beyond what was held before, of a call after a small one. Absolute times want a quiet machine;
their ratios, within a row's group, stand a busy one.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Before this folder, where ``growth`` would be this script.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import growth_cells as cells
import growth_claims as claims
import growth_constants as constants
import growth_data as data
import record
import torch
from growth_cells import Cell

from growth.connections import Block

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("search", "claims", "constants", "page")
WIDTHS = tuple(1 << k for k in range(9, 17))
# Wider than this, the whole gradient is not held.
LARGEST_GRADIENT = 5e9
# A library that is expected to take longer for one search is left out.
LIBRARY_SECONDS = 60.0


class Group(NamedTuple):
    """Rows that one process measures. parts: widths, or names of layers."""

    source: str
    parts: tuple[str, ...]
    wanted: tuple[str, ...]
    searches: tuple[str, ...]
    block: Block = (1, 1)

    def cells(self) -> list[Cell]:
        return [
            Cell(self.source, part, self.block, wanted, search)
            for part in self.parts
            for wanted in self.wanted
            for search in self.searches
        ]


def plan(quick: bool) -> list[Group]:
    entries = (*cells.MAIN, *cells.OTHERS)
    libraries, settings = _installed(cells.LIBRARIES), _installed(cells.SETTINGS)
    # Recall against cost, at one width.
    everything = (*entries, *libraries, *settings)
    widths = WIDTHS[:2] if quick else WIDTHS
    groups = []
    for n in map(str, widths):
        groups.append(Group("synth", (n,), ("16 n",), (*entries, *libraries)))
        one = str(widths[1] if quick else 4096)
        groups.append(Group("synth", (n,), ("0.1 %",), everything if n == one else entries))
    for source in ("synth-flat", "iid"):
        for n in map(str, widths[:1] if quick else WIDTHS[::2]):
            groups.append(Group(source, (n,), ("16 n", "0.1 %"), entries))
    for n in widths[1:2] if quick else (2048, 8192):
        groups.append(
            Group("synth", (str(n),), ("0.1 %", "1 %", "3 %"), tuple(cells.BLOCKS), (32, 32))
        )
    groups.append(Group("conv", ("wrn-28-5",), ("0.1 %", "1 %"), tuple(cells.CONVOLUTIONS)))
    layers = data.NETWORKS["mlp"][2]
    groups.append(Group("mlp", layers[:-1], ("0.1 %",), (*entries, *libraries)))
    groups.append(Group("mlp", layers[-1:], ("0.1 %",), everything))
    groups.append(Group("wrn", data.NETWORKS["wrn"][2], ("1 %",), tuple(cells.CONVOLUTIONS)))
    return groups


def _installed(searches: Iterable[str]) -> list[str]:
    """Less those whose library is not there."""
    missing = {name for name in ("faiss", "nmslib") if importlib.util.find_spec(name) is None}
    for name in sorted(missing):
        print(f"{name} is not installed: its searches are left out")
    return [search for search in searches if search.split()[0] not in missing]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to do")
    parser.add_argument("--again", action="store_true", help="also what has a row already")
    parser.add_argument("--quick", action="store_true", help="a smoke test that keeps nothing")
    parser.add_argument("--sources", nargs="+", help="data of the search: synth, iid, mlp, ...")
    parser.add_argument("--upto", type=int, default=WIDTHS[-1], help="largest width of the search")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            record.RESULTS = Path(folder)
        try:
            for part in options.only:
                DO[part](options)
        except KeyboardInterrupt:
            sys.exit("stopped; the same command goes on from here")
    print(f"{time.monotonic() - start:.0f} s")


def search(options: argparse.Namespace) -> None:
    for group in plan(options.quick):
        wide = max(int(part) if part.isdecimal() else 0 for part in group.parts)
        if wide > options.upto or (options.sources and group.source not in options.sources):
            continue
        rows = _rows("growth")
        known = set() if options.again else {_cell(row) for row in rows}
        todo = [cell for cell in group.cells() if cell not in known]
        skipped = [(cell, why) for cell in todo if (why := _too_much(cell, rows))]
        for cell, why in skipped:
            _append("growth", {**dict.fromkeys(_HEADER, ""), **cell._asdict(), "note": why})
        todo = [cell for cell in todo if cell not in dict(skipped)]
        for row in _in_child(_measure, group, todo, options.quick):
            _append("growth", row)
            print(
                f"{row['source']:10} {row['part']:>16} {row['wanted']:>6} {row['search']:24} "
                f"{row['seconds']:>9} s {row['MB']:>7} MB  recall {row['recall']}  "
                f"mass {row['mass']}",
                flush=True,
            )


def _measure(group: Group, todo: list[Cell], quick: bool) -> Iterator[dict[str, Any]]:
    if not todo:
        return
    pairs = data.load(group.source, sorted({cell.part for cell in todo}))
    cells.warm(sorted({cell.search for cell in todo}), group.source, group.block)
    for part in group.parts:
        for wanted in group.wanted:
            names = [cell.search for cell in todo if (cell.part, cell.wanted) == (part, wanted)]
            if names:
                yield from cells.measure(
                    pairs[part], group.source, part, group.block, wanted, names, quick
                )


def _too_much(cell: Cell, rows: list[dict[str, str]]) -> str:
    """Why a cell is not measured; empty where it is."""
    if not cell.part.isdecimal():
        return ""
    n = int(cell.part)
    gradient = 4 * n * n
    held = cells.HOLD_ALL.get(cell.search, 0) * gradient
    if held and gradient > LARGEST_GRADIENT:
        return f"skipped: the whole gradient takes {gradient / 1e9:.0f} GB"
    if held > 0.8 * _available():
        return f"skipped: takes about {held / 1e9:.0f} GB"
    smaller = [
        row
        for row in rows
        if cell.search in cells.LIBRARIES
        and row["seconds"]
        and _cell(row)._replace(part="") == cell._replace(part="")
        and int(row["part"]) < n
    ]
    if not smaller:
        return ""
    last = max(smaller, key=lambda row: int(row["part"]))
    expected = float(last["seconds"]) * (n / int(last["part"])) ** 2
    return f"skipped: takes about {expected:.0f} s" if expected > LIBRARY_SECONDS else ""


def _available() -> float:
    """Bytes of memory; where that is not known, enough."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def check(options: argparse.Namespace) -> None:
    known = set() if options.again else {row["group"] for row in _rows("growth_claims")}
    for name in claims.CLAIMS:
        if name not in known:
            for row in _in_child(claims.check, name, options.quick):
                _append("growth_claims", row)
                print(f"{row['result']}  {row['claim']}: {row['measured']} ({row['wanted']})")
                sys.stdout.flush()


def measure_constants(options: argparse.Namespace) -> None:
    if options.again or not _rows("growth_constants"):
        for row in _in_child(constants.measure, options.quick):
            _append("growth_constants", row)
    print(f"{'':24} {'here':>10} {'in costs.py':>12}")
    for row in _rows("growth_constants"):
        print(f"{row['constant']:24} {row['here']:>10} {row['in costs.py']:>12}")


def page(options: argparse.Namespace) -> None:
    # Not at the top: only the page needs matplotlib.
    import growth_page

    docs = growth_page.DOCS
    if options.quick:
        docs = Path(shutil.copy(docs / "growth.md", record.RESULTS)).parent
    growth_page.write(record.RESULTS, docs)


DO: dict[str, Callable[[argparse.Namespace], None]] = {
    "search": search,
    "claims": check,
    "constants": measure_constants,
    "page": page,
}


_HEADER = (
    *Cell._fields,
    *("n_out", "n_in", "samples", "count", "active", "seconds", "repeats", "MB"),
    *("recall", "mass", "GFLOP", "report", "note"),
)


def _state() -> dict[str, str]:
    """What a row must share to be of use now."""
    sources = [*sorted((ROOT / "growth").glob("*.py")), ROOT / "triton_kernels" / "costs.py"]
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]
    return {"code": code, "threads": str(torch.get_num_threads())}


def _append(name: str, row: dict[str, Any]) -> None:
    record.append(name, [{**row, **_state()}])


def _rows(name: str) -> list[dict[str, str]]:
    """Those of this state."""
    path = record.RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    here = {**record.circumstances(), **_state()}
    here.pop("date")
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if here.items() <= row.items()]


def _cell(row: dict[str, str]) -> Cell:
    bh, bw = map(int, row["block"].strip("()").split(","))
    return Cell(row["source"], row["part"], (bh, bw), row["wanted"], row["search"])


def _in_child(function: Callable[..., Iterator[dict[str, Any]]], *args: Any) -> Iterator[Any]:
    """What the function yields in a process of its own, whose memory nobody else has touched."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, function, args))
    child.start()
    sender.close()
    try:
        while True:
            yield receiver.recv()
    except EOFError:
        child.join()
        if child.exitcode:
            print(f"{function.__name__} ended with status {child.exitcode}", file=sys.stderr)
    finally:
        child.terminate()
        child.join()


def _send(sender: Any, function: Callable[..., Iterator[dict[str, Any]]], args: Any) -> None:
    for row in function(*args):
        sender.send(row)


if __name__ == "__main__":
    main()
