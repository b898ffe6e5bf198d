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

SHARE, TRIES, PAUSE = 0.03, 6, 20.0
STAT = Path("/proc/stat")


def others() -> float | None:
    """Processor seconds, of all cores, that went to anything but this process; None if unknown."""
    try:
        line = STAT.read_text().splitlines()[0].split()
    except OSError:
        return None
    user, nice, system, _, _, interrupts, soft, stolen = (int(ticks) for ticks in line[1:9])
    busy = user + nice + system + interrupts + soft + stolen
    own = os.times()
    return busy / os.sysconf("SC_CLK_TCK") - sum(own[:4])


def undisturbed(measure: Callable[[], T]) -> T | None:
    """What ``measure`` returns, from a time in which others took less than 3 % of the machine.

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
        share = (after - before) / (seconds * (os.cpu_count() or 1))
        if share < SHARE:
            return found
        print(f"others took {share:.0%} of the processors: measured again", flush=True)
    return None
