"""CSV rows that say on what hardware, with which versions and when a figure was measured."""

from __future__ import annotations

import csv
import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def append(name: str, rows: list[dict[str, Any]]) -> Path:
    """Add rows to ``results/<name>.csv``; its header is that of the first rows ever written."""
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    rows = [{**row, **circumstances()} for row in rows]
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
    return path


def circumstances() -> dict[str, str]:
    return {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()
