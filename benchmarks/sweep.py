"""Runs W&B sweep files here, one run after another, without W&B.

    python benchmarks/sweep.py sweeps/mam-small-*.yaml [--jobs 2] [--list]

Files are grids (``method: grid``) of flags of train.py. Results are JSON files below docs/results,
as those of results.py: a finished run is not run again, one that was cut off continues.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import experiments
import results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="sweep files")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each")
    parser.add_argument("--list", action="store_true", help="show the runs, run nothing")
    options = parser.parse_args()
    try:
        jobs = [job for file in options.files for job in read(file)]
    except (OSError, ValueError) as error:
        sys.exit(f"sweep.py: {error}")
    if not options.list:
        results.train_missing(jobs, options.jobs)
        return
    for job in jobs:
        done = "done" if results.is_done(job) else "open"
        print(f"{done}  {job.group}/{job.name}: {' '.join(job.flags)}")


def read(file: Path) -> list[experiments.Job]:
    """Every run of a sweep; ValueError where it is not a grid of flags."""
    import yaml

    try:
        sweep = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(sweep, dict) or sweep.get("method") != "grid":
        raise ValueError(f"{file} must hold a sweep of method: grid, which alone can be listed")
    choices: dict[str, list[Any]] = {}
    for name, own in sweep.get("parameters", {}).items():
        if not isinstance(own, dict) or not {"value", "values"} & own.keys():
            raise ValueError(f"{file}: parameter {name} has neither a value nor values")
        choices[name] = own["values"] if "values" in own else [own["value"]]
    jobs = []
    for chosen in itertools.product(*choices.values()):
        run = dict(zip(choices, chosen, strict=True))
        varied = [
            _word(run[name]) for name, own in choices.items() if len(own) > 1 and name != "seed"
        ]
        flags = tuple(f"--{name}={value}" for name, value in run.items())
        seed = int(run.get("seed", 0))
        jobs.append(experiments.Job(file.stem, "-".join(varied) or "run", seed, flags))
    return jobs


def _word(value: Any) -> str:
    """As a part of a file's name."""
    return "".join(c if c.isalnum() or c in "._" else "_" for c in str(value))


if __name__ == "__main__":
    main()
