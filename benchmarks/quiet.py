"""Whether the machine was left alone while something was measured.

Two threads that wait for one another are slowed down many times when a third one, or the host of a
virtual machine, takes one of their cores for a while: such times say nothing of what was measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

STAT = Path("/proc/stat")
SHARE, TRIES, PAUSE = 0.08, 6, 10.0
# The system counts in hundredths of a second, on each processor.
SLACK = 0.03


def others() -> float | None:
    """Processor seconds, of all processors, that went to anything but this process (its children
    are others, too); None where the system does not say."""
    try:
        line = STAT.read_text().splitlines()[0].split()
        user, nice, system, _, _, interrupts, soft, stolen = (int(ticks) for ticks in line[1:9])
    except (OSError, IndexError, ValueError):
        return None
    busy = user + nice + system + interrupts + soft + stolen
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()


def undisturbed(measure: Callable[[], T], threads: int) -> T | None:
    """What ``measure``, which runs on so many threads, returns from a time in which others took
    less than 8 % of what they had.

    It is called again, after a pause, until then; None if that did not happen in six times.
    """
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE)
        before, start = others(), time.perf_counter()
        found = measure()
        after, seconds = others(), time.perf_counter() - start
        if before is None or after is None:
            return found
        share = (after - before - SLACK) / (seconds * threads)
        if share < SHARE:
            return found
        print(f"others took {share:.0%} of the processors: measured again", flush=True)
    return None
