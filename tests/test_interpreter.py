"""Runs the tests of the kernels in Triton's interpreter, which needs no GPU.

It must be chosen before a kernel is imported, for a whole process: each file of tests/kernels runs
in one of its own. By hand: ``TRITON_INTERPRET=1 python -m pytest tests/kernels``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-m", "pytest", str(file), "-m", "not gpu and not slow"]
    done = subprocess.run(
        [*command, "-q", "--color=no", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode != 0:
        pytest.fail(f"in the interpreter:\n{done.stdout}{done.stderr}", pytrace=False)
    if " passed" not in done.stdout:
        pytest.skip(done.stdout.strip().splitlines()[-2].split(": ", 1)[-1])
