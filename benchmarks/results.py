"""Everything that docs/results.md says: trains what is missing, then writes the page.

    python benchmarks/results.py [--jobs 2] [--only GROUP ...] [--page]

Each run leaves a JSON file below docs/results, and is not run again while its flags stay the same.
Stopped or killed, the next call goes on: finished runs are skipped, and a run that was cut off
continues from its checkpoint. ``--page`` writes the page from what is there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import experiments
import record

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "docs" / "results"
FOLDERS = ROOT / "runs" / "results"


def result_file(job: experiments.Job) -> Path:
    return RESULTS / job.group / f"{job.name}.json"


def is_done(job: experiments.Job) -> bool:
    """Whether the file is there, whole, and of these flags."""
    try:
        return job.made(json.loads(result_file(job).read_text()))
    except (OSError, ValueError):
        return False


def run(job: experiments.Job) -> tuple[experiments.Job, dict[str, Any] | str]:
    """Train, or continue to; write the result file. Returns the figures, or why there are none: a
    run that diverged, or a full disk."""
    from dst.errors import StoppedError
    from dst.training import run as train
    from growth import InputError
    from train import parse

    folder = FOLDERS / job.group / job.name
    # One thread a run: their number is then the same however many run side by side.
    flags = [*job.flags, "--threads=1", f"--out={folder.parent}", f"--name={folder.name}"]
    resumed, start = (folder / "config.json").is_file(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            summary = train(parse([*flags, f"--resume={folder}"] if resumed else flags))
        except InputError:
            # What lies there is another run's, or of another version.
            shutil.rmtree(folder, ignore_errors=True)
            summary = train(parse(flags))
        except StoppedError as error:
            return job, str(error)
    result = {
        "flags": list(job.flags),
        "seed": job.seed,
        # Of the run's one thread: what else the machine does hardly changes it.
        "cpu_seconds": None if resumed else round(time.process_time() - start, 2),
        "final": {name: getattr(summary, name) for name in summary.__dataclass_fields__},
        **_of_phases(folder),
        **record.circumstances(),
    }
    file = result_file(job)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".writing")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, file)
    shutil.rmtree(folder)
    return job, result["final"]


def _of_phases(folder: Path) -> dict[str, Any]:
    """What a recipe of several phases told of them."""
    from dst import tracking

    lines = tracking.read(folder)
    found = {
        f"{kind}s": [
            {name: value for name, value in line.items() if name not in ("kind", "time")}
            for line in lines
            if line["kind"] == kind
        ]
        for kind in ("phase", "curve")
    }
    return {kind: own for kind, own in found.items() if own}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each")
    parser.add_argument("--only", nargs="+", choices=experiments.GROUPS, help="these groups alone")
    parser.add_argument("--page", action="store_true", help="run nothing, write the page")
    options = parser.parse_args()
    if not options.page:
        jobs = experiments.jobs(options.only or list(experiments.GROUPS))
        train_missing(jobs, options.jobs)
    import results_page

    results_page.write()


def train_missing(jobs: list[experiments.Job], workers: int) -> None:
    missing = [job for job in jobs if not is_done(job)]
    print(f"{len(missing)} runs to go")
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers) as pool:
        try:
            for done, (job, final) in enumerate(pool.imap_unordered(run, missing), 1):
                left = (time.perf_counter() - start) / done * (len(missing) - done)
                said = (
                    f"stopped: {final}"
                    if isinstance(final, str)
                    else f"{final['test_accuracy']:.2%} in {final['wall_seconds']:.0f} s"
                )
                print(
                    f"{job.group}/{job.name}: {said}; {len(missing) - done} to go, "
                    f"about {left / 60:.0f} min",
                    flush=True,
                )
        except KeyboardInterrupt:
            pool.terminate()
            sys.exit("stopped; the same command goes on")


if __name__ == "__main__":
    main()
