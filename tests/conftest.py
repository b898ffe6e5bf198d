"""Shared by all tests: the repository's root is importable, and runs are small and repeatable."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Or how layers compute would follow what somebody measured on this machine.
os.environ["SPARSEGROW_CACHE"] = os.path.join(ROOT, "tests", "no-cache")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    # The tests are small, and idle threads that spin slow down whoever shares the cores.
    torch.set_num_threads(1)
