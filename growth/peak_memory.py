"""What a piece of code takes of memory, at its peak."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from types import TracebackType

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# What a kernel counts late, on several cores.
_SLACK = 1 << 20


class PeakMemory:
    """Bytes that the process took inside a ``with`` block beyond what it held before, at the peak.

        with PeakMemory(device) as peak:
            ...
        peak.bytes

    CPU, on Linux: of the resident set, whichever thread takes it. What the C library had kept for
    reuse is given back to the system before, where it has ``malloc_trim``; what other allocators
    keep for reuse is not counted. Anything that a first call loads or compiles is. CUDA: of
    PyTorch's allocations, whose peak statistics are reset. ``bytes`` is None where nothing can be
    measured: on other systems and devices, and where the kernel does not let a process reset its
    high-water mark.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            self._before = _reset_high_water_mark()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak: int | None = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _status("VmHWM")
        if peak is not None:
            self.bytes = max(0, peak - self._before)


def _reset_high_water_mark() -> int | None:
    """The resident set from now on, in bytes; None where its mark cannot be reset."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    held, mark = _status("VmRSS"), _status("VmHWM")
    if held is None or mark is None or mark > held + _SLACK:
        return None
    return held


def _status(name: str) -> int | None:
    """An entry of this process' status, in bytes; None where there is none."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return None
