"""Runs the README's tour and puts what it printed, and its picture, into the README.

python benchmarks/readme_tour.py
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import record

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "images"


def output_of(words: list[str], folder: Path) -> str:
    """stdout of a Python command, as in a terminal of 80 columns."""
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, str(ROOT / words[0]), *words[1:]],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return "\n".join(line.rstrip() for line in done.stdout.rstrip().splitlines())


def block(command: str, output: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in [f"$ {command}", *output.splitlines()])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trained = output_of(["train.py"], Path(folder))
        run = next((Path(folder) / "runs").iterdir())
        PICTURES.mkdir(parents=True, exist_ok=True)
        for name in ("accuracy", "explored"):
            shutil.copy(run / f"{name}.png", PICTURES / f"default-{name}.png")
        loop = output_of(["examples/own_loop.py"], Path(folder))
        alone = output_of(["examples/growth_alone.py"], Path(folder))
    hardware = record.circumstances()
    text = "\n\n".join(
        [
            f"What follows was printed on {hardware['cores']} cores of an {hardware['hardware']} "
            f"with PyTorch {hardware['torch']} on {hardware['date']}.",
            "Train. No flag is needed: 3,600 real MNIST images, a WideResNet-16-1 in which one "
            "weight of ten exists, growth by similarity search once an epoch:",
            block("python train.py", trained),
            "The report has the figures and the plots: loss and accuracy, density per layer, "
            "explored connections, connections changed per update, where the time went.",
            "![loss and accuracy](docs/images/default-accuracy.png)",
            "Any loop becomes a sparse one with two lines:",
            block("python examples/own_loop.py", loop),
            "And growth alone answers which missing connections matter, for a plain PyTorch layer:",
            block("python examples/growth_alone.py", alone),
        ]
    )
    readme = ROOT / "README.md"
    pattern = r"(<!-- three-minutes: .*? -->\n).*(<!-- /three-minutes -->)"
    readme.write_text(
        re.sub(pattern, lambda m: f"{m[1]}\n{text}\n\n{m[2]}", readme.read_text(), flags=re.S)
    )


if __name__ == "__main__":
    main()
