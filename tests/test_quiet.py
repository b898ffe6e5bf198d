"""What benchmarks measure while others have the processors is measured again."""

import sys
import time
from pathlib import Path

import pytest

# Last: a benchmark is called as the package that it measures.
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import quiet


def test_it_counts_what_others_and_the_host_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = tmp_path / "stat"
    monkeypatch.setattr(quiet, "STAT", stat)
    monkeypatch.setattr(time, "process_time", lambda: 2.5)
    assert quiet.others() is None
    # user, nice, system, idle, waiting, interrupts, soft ones, stolen, guests: in user already.
    stat.write_text("cpu  100 20 30 9999 9999 4 6 50 70 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    ticks = quiet.os.sysconf("SC_CLK_TCK")
    assert quiet.others() == pytest.approx(210 / ticks - 2.5)
    stat.write_text("nothing of the kind\n")
    assert quiet.others() is None


@pytest.mark.parametrize(
    ("taken", "tries"),
    [([0.0], 1), ([9.0, 9.0, 0.1], 3), ([9.0] * 6, 6)],
)
def test_it_measures_until_it_is_left_alone(
    taken: list[float], tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """taken: seconds of two processors, out of 10 seconds of both in each try."""
    found: list[int] = []
    clock = iter(range(0, 1000, 10))
    totals = iter([total for seconds in taken for total in (0.0, seconds)])
    monkeypatch.setattr(quiet.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(quiet.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(quiet, "others", lambda: next(totals))
    result = quiet.undisturbed(lambda: found.append(1) or len(found), 2)
    assert len(found) == tries
    assert result == (None if taken[-1] > 1 else tries)


def test_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "others", lambda: None)
    assert quiet.undisturbed(lambda: 3, 2) == 3
