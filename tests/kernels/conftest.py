"""Tests of kernels: on a GPU, and in Triton's interpreter where TRITON_INTERPRET=1 is set.

Without it they carry the mark ``gpu``, so that the same checks run on the device;
tests/test_interpreter.py runs them with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ahead_of_time import version

from triton_kernels.require import interpreting

HERE = Path(__file__).resolve().parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # This hook sees the items of the whole run.
    for item in items:
        if item.path.is_relative_to(HERE) and not interpreting():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run; skips where they cannot."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if not interpreting():
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
        return torch.device("cuda")
    numpy = pytest.importorskip("numpy")
    if version(triton) < (3, 7) and version(numpy) >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 fails on loops with NumPy 2.4 and newer")
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that is allocated and not written holds NaN or the largest integer."""
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.set_deterministic_debug_mode(before)
