"""What a terminal shows."""

from __future__ import annotations

import io

from rich.console import Console

from dst.progress import ProgressBar
from dst.report import Summary, announce


def test_the_bar_shows_loss_accuracy_density_rate_and_time_left(tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=140)
    with ProgressBar(console, total=100, done=10) as bar:
        for _ in range(40):
            bar.advance(64)
        bar.show("epoch 2/4", 0.1234, 0.9876, 0.1)
        bar._bar.refresh()
    text = out.getvalue()
    for word in ("epoch 2/4", "50/100", "loss 0.123", "acc 98.8%", "density 0.100", "images/s"):
        assert word in text
    assert "-:--:--" in text or "0:00" in text


def test_elsewhere_the_bar_is_silent():
    out = io.StringIO()
    with ProgressBar(Console(file=out), total=10, done=0) as bar:
        bar.advance(1)
        bar.show("epoch 1/1", 1.0, 0.5, 0.1)
    assert out.getvalue().strip() == ""


def test_the_last_words(tmp_path):
    out = io.StringIO()
    summary = Summary(0.97, 0.1, 0.1, 10, 100, 20, 200, 3000, 60000, 0.2, 1.0, 50.0)
    announce(Console(file=out, width=100), summary, tmp_path / "report.md")
    text = out.getvalue()
    for word in ("97.00%", "10 of 100", "0.100 of dense", "0.050 of dense", "20.00%", "2.00%"):
        assert word in text
    assert str(tmp_path / "report.md") in text.replace("\n", "")
