"""What ``python train.py`` claims with no flags: test accuracy, wall time, share of it in growth.

    python benchmarks/default_run.py [--seeds 3] [flags of train.py ...]

Every run is a process of its own, as a user's is; the wall time is that of the process, imports and
report included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    options, flags = parser.parse_known_args()
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, str(ROOT / "train.py"), f"--seed={seed}", f"--out={out}"]
            start = time.perf_counter()
            subprocess.run([*command, *flags, "--name=run"], check=True)
            seconds = time.perf_counter() - start
            lines = (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()
            final = json.loads(lines[-1])
        row = {
            "flags": " ".join(flags),
            "seed": seed,
            "test accuracy": final["test_accuracy"],
            "density": round(final["density"], 5),
            "explored": round(final["explored_share"], 5),
            "training FLOPs/dense": round(
                final["training_flops"] / final["dense_training_flops"], 5
            ),
            "growth seconds": round(final["growth_seconds"], 3),
            "wall seconds": round(seconds, 1),
            "growth share": round(final["growth_seconds"] / final["wall_seconds"], 5),
        }
        print(row, record.append("default_run", [row]))


if __name__ == "__main__":
    main()
