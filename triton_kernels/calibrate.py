"""Measures training steps of a few layers, and fits the constants by which ``compute="auto"``
chooses on this machine.

    python -m triton_kernels.calibrate             # a minute or two on an otherwise idle machine
    python -m triton_kernels.calibrate --quick     # half of it
    python -m triton_kernels.calibrate --device cuda

They are kept in ``$SPARSEGROW_CACHE``, or else ``$XDG_CACHE_HOME/sparsegrow`` or
``~/.cache/sparsegrow``, for this processor, number of threads and PyTorch.

On a GPU, ``auto`` compares a layer's density with the break-even density of its blocks. That part
has not run on one yet.

``--ship`` writes ``triton_kernels/shipped.py`` instead, where the forms that were not measured, and
processors of other makers, stay as they are. For all of them: without more, then ``--without
numba``, then ``--without numba blas``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from triton_kernels import blas, constants, costs, shipped
from triton_kernels.calibrate_steps import Case, Sample, Step, measure, samples, steps_of

# Seconds that steps are measured for, beside what compiles their kernels.
SECONDS, QUICK_SECONDS = 60.0, 15.0
# Blocks whose break-even densities are told.
TOLD_SIDES, TOLD_ROWS = (1, 8, 16, 32, 64, 128), (32, 256, 1024)

GPU_SIDES = (1, 16, 32, 64, 128)
GPU_DENSITIES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)
GPU_CASE = Case(4096, 4096, 4096, density=0)
GPU_SECONDS = 0.5


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m triton_kernels.calibrate",
        description="Measures how long training steps take on this machine, by which "
        "compute='auto' then chooses.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch, if not its own number")
    parser.add_argument("--ship", action="store_true", help="write triton_kernels/shipped.py")
    parser.add_argument(
        "--without", nargs="+", default=(), choices=("numba", "blas"), help="as if not there"
    )
    options = parser.parse_args(arguments)
    if options.without and not options.ship:
        parser.error("--without is for --ship: what is kept for a machine is what it has")
    if options.ship and options.device != "cpu":
        parser.error("--ship is for the CPU: leave one of --ship and --device out")
    if options.ship and not constants.maker():
        parser.error("--ship is for processors whose maker /proc/cpuinfo tells: leave it out")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads {options.threads} must be at least 1")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    if options.device == "cpu":
        _hide(options.without)
        ns = on_cpu(QUICK_SECONDS if options.quick else SECONDS)
        machine = constants.cpu(torch.get_num_threads())
        if options.ship:
            path = ship(Path(shipped.__file__), ns, machine, constants.maker())
        else:
            path = constants.write(machine, {"ns": ns})
            for line in _break_evens():
                print(line)
    elif torch.cuda.is_available():
        found = on_gpu()
        print("break-even densities, by the side of blocks:", found)
        path = constants.write(constants.gpu(torch.cuda.get_device_name()), {"break_even": found})
    else:
        parser.error("there is no GPU that PyTorch can use: leave --device out")
    print(f"written: {path}")


def on_cpu(seconds: float) -> dict[str, constants.Sides]:
    """Measure for about so long, fit, and say how well that predicts."""
    steps = [step for sample in samples() for step in steps_of(sample)]
    print(f"{len(steps)} training steps; their kernels are compiled first", flush=True)
    measure(steps, seconds)
    ns = fit(steps)
    for line in told(steps, ns):
        print(line)
    return ns


def fit(steps: Iterable[Step]) -> dict[str, constants.Sides]:
    """Nanoseconds of each part of each form of work, by side: those whose sums come nearest to
    what was measured, in their ratios."""
    measured: dict[tuple[str, int], list[Step]] = {}
    for step in steps:
        *_, last = work_of(step)
        measured.setdefault((last.form, last.side), []).append(step)
    ns: dict[str, constants.Sides] = {}
    # What half precision adds comes after the same work in single.
    for (form, side), own in sorted(measured.items(), key=lambda item: len(work_of(item[1][0]))):
        works = [work_of(step) for step in own]
        times = np.array([step.ns for step in own])
        rest = [
            max(0.0, step.ns - costs.ns_of(w[:-1], ns)) for step, w in zip(own, works, strict=True)
        ]
        ns.setdefault(form, {})[side] = least([w[-1].parts for w in works], np.array(rest), times)
    return ns


def work_of(step: Step) -> list[costs.Work]:
    if step.way == "sparse":
        return costs.sparse_work(step.layer)
    return [costs.dense_works(step.layer)[step.way == "loops"]]


def least(
    parts: Sequence[Sequence[float]], ns: NDArray[Any], scale: NDArray[Any]
) -> tuple[float, ...]:
    """The x >= 0 with the least squares of (parts @ x - ns) / scale. parts: (n, k); ns, scale:
    (n,).

    Among the numbers that are not held at zero, x is the solution without this bound. So the best
    over all choices of what is held is exact, and there are few.
    """
    matrix, goal = np.array(parts) / scale[:, None], ns / scale
    best, found = float("inf"), np.zeros(matrix.shape[1])
    for chosen in itertools.product((False, True), repeat=matrix.shape[1]):
        use = np.flatnonzero(matrix.any(0) & chosen)
        x = np.zeros(matrix.shape[1])
        # Columns of like size: counts differ by many orders of magnitude.
        size = np.linalg.norm(matrix[:, use], axis=0)
        x[use] = np.linalg.lstsq(matrix[:, use] / size, goal, rcond=None)[0] / size
        error = float(np.square(matrix @ x - goal).sum())
        if (x >= 0).all() and error < best:
            best, found = error, x
    return tuple(float(f"{value:.4g}") for value in found)


def told(steps: Sequence[Step], ns: Mapping[str, constants.Sides]) -> Iterator[str]:
    """How far these constants are from what was measured, and what choices by them lose."""
    errors: dict[str, list[float]] = {}
    layers: dict[costs.Layer, dict[str, tuple[float, float]]] = {}
    for step in steps:
        works = work_of(step)
        predicted = costs.ns_of(works, ns)
        errors.setdefault(works[-1].form, []).append(abs(predicted / step.ns - 1))
        layers.setdefault(step.layer, {})[step.way] = predicted, step.ns
    yield f"{'relative error of the predicted times':44} {'median':>7} {'worst':>7}  of"
    everything = [error for own in errors.values() for error in own]
    for name, own in (*sorted(errors.items()), ("all", everything)):
        yield f"{name:44} {statistics.median(own):7.2f} {max(own):7.2f}  {len(own)}"
    several = [ways for ways in layers.values() if len(ways) > 1]
    # By the predicted times, then by the measured ones.
    losses = [
        min(ways.values())[1] / min(time for _, time in ways.values()) - 1 for ways in several
    ]
    wrong = sum(loss > 0 for loss in losses)
    yield (
        f"auto would take a slower way than another in {wrong} of {len(several)} layers, and lose "
        f"at most {100 * max(losses, default=0):.0f} %"
    )


def _break_evens() -> Iterator[str]:
    yield "break-even densities of 2048 x 2048 weights in float32:"
    yield "block" + "".join(f"{rows:>8} rows" for rows in TOLD_ROWS)
    for side in TOLD_SIDES:
        layer = costs.Layer(2048, 2048, 1, (side, side), 0, 0, 0, 4, "cpu")
        found = (costs.break_even(layer._replace(rows=r, padded=r)) for r in TOLD_ROWS)
        yield f"{side:5}" + "".join(f"{density:13.2g}" for density in found)


def on_gpu() -> dict[int, float]:
    """Break-even densities by side, of one layer in half precision."""
    return {side: _gpu_break_even(side) for side in GPU_SIDES}


def _gpu_break_even(side: int) -> float:
    gains = []
    for density in GPU_DENSITIES:
        sample = Sample(GPU_CASE._replace(density=density), side, torch.bfloat16, dense=True)
        steps = [*steps_of(sample, "cuda")]
        measure(steps, GPU_SECONDS)
        ns = {step.way: step.ns for step in steps}
        gains.append(ns["dense"] - ns["sparse"])
        if gains[-1] <= 0:
            break
    return crossing(GPU_DENSITIES, gains)


def crossing(densities: Sequence[float], gains: Sequence[float]) -> float:
    """Where the first gain that is none would be zero, between this density and the one before;
    0 if it is the first of all, 1 if there is none."""
    for i, gain in enumerate(gains):
        if gain <= 0:
            if i == 0:
                return 0.0
            share = gains[i - 1] / (gains[i - 1] - gain)
            return round(densities[i - 1] + share * (densities[i] - densities[i - 1]), 4)
    return 1.0


def ship(
    path: Path, ns: Mapping[str, constants.Sides], machine: Mapping[str, Any], maker: str
) -> Path:
    """Write the module of shipped constants, with those of this maker's forms that were not
    measured now, and of other makers, left as they are. A new maker starts from the default's."""
    version = machine["torch"].split("+")[0]
    name = f"{machine['processor']}, threads: {machine['threads']}, PyTorch {version}"
    before = shipped.NS.get(maker, shipped.NS[constants.DEFAULT_MAKER])
    merged = {form: {**before.get(form, {}), **ns.get(form, {})} for form in {*before, *ns}}
    lines = []
    for each, forms in {**shipped.NS, maker: merged}.items():
        lines.append(f'    "{each}": {{')
        for form, sides in sorted(forms.items()):
            one = [f"{side}: {sides[side]!r}" for side in sorted(sides)]
            if len(one) == 1:
                lines.append(f'        "{form}": {{{one[0]}}},')
            else:
                lines += [
                    f'        "{form}": {{',
                    *(f"            {o}," for o in one),
                    "        },",
                ]
        lines.append("    },")
    machines = {**shipped.MACHINES, maker: name}.items()
    named = "\n".join(f'    "{each}": {json.dumps(name)},' for each, name in machines)
    path.write_text(SHIPPED.format(machines=named, lines="\n".join(lines)), encoding="utf-8")
    return path


SHIPPED = '''\
"""What the cost model takes where nothing was measured on this machine: what was measured on one of
the same maker. Written by ``python -m triton_kernels.calibrate --ship``.
"""

# By the maker's name in /proc/cpuinfo. The first one's are for all others, too.
MACHINES = {{
{machines}
}}

# Nanoseconds by maker, by form, then by the smaller side of blocks; of what: see ``costs``.
NS: dict[str, dict[str, dict[int, tuple[float, ...]]]] = {{
{lines}
}}
'''


def _hide(missing: Sequence[str]) -> None:
    """As if these were not there, for the rest of the process."""
    if "numba" in missing:
        sys.modules["numba"] = None  # type: ignore[assignment]
    if "blas" in missing:
        blas.available = lambda dtype: False  # type: ignore[assignment]


if __name__ == "__main__":
    main()
