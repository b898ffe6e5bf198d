"""Multiply-and-max/min against a linear layer of the same size, and against its naive form.

    python benchmarks/mam.py                       # some 30 minutes on two quiet cores
    python benchmarks/mam.py --quick               # half a minute
    python benchmarks/mam.py --sizes 2048 --batches 128
    python benchmarks/mam.py --device cuda --dtype bfloat16

``mam``: ours. ``linear``: ``nn.Linear`` without bias, in float32 without tf32. ``naive``:
``p = x[:, None] * w; p.max(-1).values + p.min(-1).values``, left out where it would need more than
``--most-gb``. On a GPU also ``packed`` (half precision, products rounded to it; forward alone) and
``atomic`` (gradients summed in any order). ``forward``: without gradients.

All ways take turns in one process; medians, and half the distance between the quartiles. MB: peak
beyond what was held before the call, after a first one. ``work MB``: of these, what is neither the
output nor a gradient -> results/mam.csv.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import record
import torch
from torch import Tensor, nn

from growth.peak_memory import PeakMemory
from triton_kernels.mam import mam

SIZES, BATCHES = (256, 512, 1024, 2048, 4096), (32, 128, 512)
FORWARD, BOTH = "forward", "forward + backward"
# Tensors of (batch, n_out, n_in) that the naive form holds at its peak, with some room.
HELD = {FORWARD: 1.1, BOTH: 3.2}
# In one turn, each way is called so often, the naive one once.
CALLS = 5
TURNS, MOST_SECONDS = 6, 20.0

Call = Callable[[], tuple[Tensor, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="inputs, and outputs")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--most-gb", default=10.0, type=float, help="for the naive form")
    parser.add_argument("--quick", action="store_true", help="256 and 512, batch 32")
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.batches = SIZES[:2], BATCHES[:1]
    torch.backends.cuda.matmul.allow_tf32 = False
    how = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    for n in options.sizes:
        for batch in options.batches:
            for what in (FORWARD, BOTH):
                rows = measure(n, batch, what, how, options.most_gb)
                record.append("mam", rows)
                _show(rows)


def measure(
    n: int, batch: int, what: str, how: dict[str, Any], most_gb: float
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    x = torch.randn(batch, n, **how)
    layer = nn.Linear(n, n, bias=False, **how)
    dy = torch.randn(batch, n, **how)
    ways = {"mam": mam, "linear": nn.functional.linear, "naive": naive}
    calls = {name: _call(way, x, layer.weight, dy, what) for name, way in ways.items()}
    needed = HELD[what] * batch * n * n * x.element_size() / 1e9
    if needed > most_gb:
        del calls["naive"]
    if how["device"].type == "cuda":
        calls.update(_on_gpu(x, layer.weight.detach(), dy, what))
    times = _in_turns(calls, how["device"])
    rows = []
    for name in dict.fromkeys([*calls, "naive"]):
        row: dict[str, Any] = {"n": n, "batch": batch, "what": what, "way": name}
        if name in calls:
            low, middle, high = statistics.quantiles(times[name], n=4)
            row |= {"ms": round(1e3 * middle, 4), "+-": round(500 * (high - low), 4)}
            row["x linear"] = round(middle / statistics.median(times["linear"]), 3)
            row |= _memory(calls[name], how["device"]) | {"note": ""}
        else:
            row |= dict.fromkeys(("ms", "+-", "x linear", "MB", "work MB"), "")
            row["note"] = f"not run: needs about {needed:.0f} GB"
        row |= {"device": how["device"].type, "dtype": str(how["dtype"])[6:]}
        rows.append({**row, "threads": torch.get_num_threads()})
    return rows


def naive(x: Tensor, weight: Tensor) -> Tensor:
    products = x[:, None] * weight
    return products.max(-1).values + products.min(-1).values


def _call(
    way: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, dy: Tensor, what: str
) -> Call:
    """What returns the results that a caller asked for."""

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (way(x, weight),)

    own = x.clone().requires_grad_()

    def both() -> tuple[Tensor, ...]:
        y = way(own, weight)
        return (y.detach(), *torch.autograd.grad(y, (own, weight), dy))

    return forward if what == FORWARD else both


def _on_gpu(x: Tensor, weight: Tensor, dy: Tensor, what: str) -> dict[str, Call]:
    from triton_kernels import mam_gpu

    def packed() -> tuple[Tensor, ...]:
        return (mam_gpu.winners(x, weight, packed=True).values,)

    def atomic() -> tuple[Tensor, ...]:
        y, *args = mam_gpu.winners(x, weight)
        dx = mam_gpu.input_gradient(dy, weight, *args, deterministic=False)
        return y, dx, mam_gpu.weight_gradient(dy, x, *args, deterministic=False)

    if what == BOTH:
        return {"atomic": atomic}
    return {"packed": packed} if x.dtype in (torch.float16, torch.bfloat16) else {}


def _in_turns(calls: dict[str, Call], device: torch.device) -> dict[str, list[float]]:
    """Seconds of each, so that all meet the same neighbours. The first call of each, which works
    out, compiles and allocates what is kept, is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    start, turn = time.perf_counter(), 0
    while turn < 2 or (turn < TURNS and time.perf_counter() - start < MOST_SECONDS):
        for name, call in calls.items():
            for _ in range(1 if name == "naive" else CALLS):
                _wait(device)
                before = time.perf_counter()
                results = call()
                _wait(device)
                times[name].append(time.perf_counter() - before)
                del results
        turn += 1
    return times


def _memory(call: Call, device: torch.device) -> dict[str, float | str]:
    with PeakMemory(device) as peak:
        results = call()
    if peak.bytes is None:
        return {"MB": "", "work MB": ""}
    own = sum(result.nbytes for result in results)
    return {"MB": round(peak.bytes / 1e6, 2), "work MB": round((peak.bytes - own) / 1e6, 2)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _show(rows: list[dict[str, Any]]) -> None:
    """One line a way, and how ours compares with the naive form."""
    by_way = {row["way"]: row for row in rows}
    for row in rows:
        cells = (row[key] for key in ("n", "batch", "what", "way", "ms", "+-", "x linear", "MB"))
        print(*cells, row["work MB"], row["note"], sep="\t")
    ours, other = by_way["mam"], by_way["naive"]
    if other["ms"] != "":
        line = f"naive / mam: {other['ms'] / ours['ms']:.0f} x the time"
        if "" not in (other["work MB"], ours["work MB"]):
            # Pages come four KB at a time: what is less cannot be seen.
            least = max(ours["work MB"], 0.1)
            line += f", {other['work MB'] / least:.0f} x the memory beside the results"
        print(line, flush=True)


if __name__ == "__main__":
    main()
