"""The live bar of a piece of work, drawn by rich."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from qe_edge.cli.console import Estimate, clock


class _Remaining(ProgressColumn):
    """Our own estimate: rich's looks at the last 30 seconds only, and one block may take longer."""

    def __init__(self, estimate: Estimate, now: Callable[[], float]) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._estimate, self._now = estimate, now

    def render(self, task: Task) -> Text:  # noqa: ARG002 - rich's signature
        remaining = self._estimate.remaining(self._now())
        return Text("" if remaining is None else f"about {clock(remaining)} left", style="cyan")


def make_bar(stream: IO[str], now: Callable[[], float], title: str, estimate: Estimate) -> tuple[Progress, TaskID]:
    """A bar that is not shown yet, and its one task."""
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        _Remaining(estimate, now),
        TextColumn("{task.fields[note]}", style="dim", markup=False, table_column=Column(no_wrap=True)),
        console=Console(file=stream),
    )
    return bar, bar.add_task(title, total=estimate.total, note="")
