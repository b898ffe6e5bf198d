"""How hard ``strokes`` is: test accuracy of an MLP by difficulty and density, and the time to draw.

    python benchmarks/difficulty.py [--seeds 1] [flags of train.py ...]

Every run is ``train.py --model=mlp-300-100 --data=strokes``, dense or with a static topology.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import record
import torch

from dst.data.drawn import TEST, TRAIN, draw

ROOT = Path(__file__).resolve().parent.parent
DIFFICULTIES = (0.5, 1.0, 2.0)
METHODS = ("--method=dense", "--density=0.1", "--density=0.02")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=1)
    options, flags = parser.parse_known_args()
    torch.set_num_threads(1)
    for difficulty in DIFFICULTIES:
        start = time.process_time()
        draw("train", TRAIN, difficulty)
        draw("test", TEST, difficulty)
        seconds = time.process_time() - start
        for seed in range(options.seeds):
            for method in METHODS:
                row = {
                    "difficulty": difficulty,
                    "method": method if "method" in method else f"--method=static {method}",
                    "seed": seed,
                    "test accuracy": accuracy([*row_flags(difficulty, seed), method, *flags]),
                    "CPU seconds to draw": round(seconds, 2),
                }
                print(row, record.append("difficulty", [row]), flush=True)


def row_flags(difficulty: float, seed: int) -> list[str]:
    """A sparse run unless a flag that follows says otherwise."""
    return [
        "--model=mlp-300-100",
        "--method=static",
        "--data=strokes",
        f"--data-difficulty={difficulty}",
        f"--seed={seed}",
    ]


def accuracy(flags: list[str]) -> float:
    """On the test images, of a run of ``train.py`` in a process and a folder of its own."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(ROOT / "train.py"), f"--out={out}", "--name=run"]
        # The last of two equal flags counts.
        subprocess.run([*command, *flags], check=True, stdout=subprocess.DEVNULL)
        lines = (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["test_accuracy"]


if __name__ == "__main__":
    main()
