"""What a run shows while it goes on: a bar on a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class ProgressBar:
    """Steps done of all, with loss, accuracy, density, images a second and the time left."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]} acc {task.fields[accuracy]}"),
            TextColumn("density {task.fields[density]} {task.fields[rate]} images/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            "", total=total, completed=done, loss="-", accuracy="-", density="-", rate="-"
        )
        self._images, self._since = 0, time.perf_counter()

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, images: int) -> None:
        self._images += images
        self._bar.advance(self._task)

    def show(self, epoch: str, loss: float, accuracy: float, density: float) -> None:
        """loss and accuracy: of this epoch so far. The rate is that since the last call."""
        now = time.perf_counter()
        rate = self._images / max(1e-9, now - self._since)
        self._images, self._since = 0, now
        self._bar.update(
            self._task,
            description=epoch,
            loss=f"{loss:.3f}",
            accuracy=f"{accuracy:.1%}",
            density=f"{density:.3f}",
            rate=f"{rate:.0f}",
        )


def print_rows(console: Console, title: str, rows: dict[str, str]) -> None:
    """A two-column table."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
