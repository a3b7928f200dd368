"""Progress on the terminal: a live bar where a person watches, an occasional plain line where a file does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING

from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from qe_edge.cli import rich_bar
else:
    rich_bar = lazy_module("qe_edge.cli.rich_bar")

LINE_SHARE = 0.1  # a plain line at least every tenth of the work ...
LINE_SECONDS = 10.0  # ... or every so many seconds
NOTE_WIDTH = 20  # the end of a layer's name tells more than its beginning; with it the bar fits 80 columns


def clock(seconds: float) -> str:
    """A duration as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Estimate:
    """How long a piece of work still takes, from the speed of its most recent third.

    Work is rarely even: blocks that a resumed run finds finished pass in an instant, and vision blocks cost more than
    language blocks of the same size. The recent past is the best guess of what comes.

    Args:
        total: Units of the whole work.
        now: Time of the start in seconds.
    """

    def __init__(self, total: float, now: float) -> None:
        self.total = total
        self.started = now
        self.done = 0.0
        self._marks = [(now, 0.0)]

    def advance(self, amount: float, now: float) -> None:
        """Note that `amount` more units are done."""
        self.done += amount
        self._marks.append((now, self.done))

    def remaining(self, now: float) -> float | None:
        """Seconds left, or None as long as nothing is known; counts down between two advances."""
        last, _ = self._marks[-1]
        if len(self._marks) < 2 or self.done <= 0:
            return None
        since = last - (last - self.started) / 3
        before = max((mark for mark in self._marks[:-1] if mark[0] <= since), default=self._marks[0])
        seconds, units = last - before[0], self.done - before[1]
        if units <= 0:
            return None
        return max(0.0, (self.total - self.done) * seconds / units - (now - last))


class ConsoleProgress:
    """The `qe_edge.system.progress.Progress` of the command line; one piece of work may run inside another.

    Args:
        stream: Where to write; a live bar on a terminal, plain lines elsewhere.
        now: Clock in seconds.
    """

    def __init__(self, stream: IO[str] | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        self._now = now
        self._live = self._stream.isatty()
        self._work: list[_Bar | _Lines] = []

    def start(self, title: str, total: float) -> None:
        """A piece of work of `total` units begins."""
        estimate = Estimate(total, self._now())
        self._work.append((_Bar if self._live else _Lines)(self._stream, self._now, title, estimate))

    def advance(self, amount: float, note: str) -> None:
        """`amount` units are done; `note` says at what."""
        self._work[-1].advance(amount, note)

    def finish(self) -> None:
        """The piece of work is over, complete or not."""
        self._work.pop().finish()


class _Lines:
    """Plain lines: one at the start, one now and then, one at the end."""

    def __init__(self, stream: IO[str], now: Callable[[], float], title: str, estimate: Estimate) -> None:
        self._stream, self._now, self._title, self._estimate = stream, now, title, estimate
        self._line_at, self._line_share = estimate.started, 0.0
        self._write(f"{title} ...")

    def advance(self, amount: float, note: str) -> None:
        now = self._now()
        self._estimate.advance(amount, now)
        share = self._estimate.done / self._estimate.total if self._estimate.total else 1.0
        due = share - self._line_share >= LINE_SHARE or now - self._line_at >= LINE_SECONDS
        if not due or share >= 1.0:
            return
        self._line_at, self._line_share = now, share
        remaining = self._estimate.remaining(now)
        left = "" if remaining is None else f", about {clock(remaining)} left"
        self._write(f"{self._title}: {share:4.0%} after {clock(now - self._estimate.started)}{left} ({note})")

    def finish(self) -> None:
        if self._estimate.done >= self._estimate.total:  # else an error or Ctrl-C has the last word
            self._write(f"{self._title}: done after {clock(self._now() - self._estimate.started)}")

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class _Bar:
    """A live bar with elapsed and remaining time."""

    def __init__(self, stream: IO[str], now: Callable[[], float], title: str, estimate: Estimate) -> None:
        self._now, self._title, self._estimate = now, title, estimate
        self._bar, self._task = rich_bar.make_bar(stream, now, title, estimate)
        self._bar.start()

    def advance(self, amount: float, note: str) -> None:
        self._estimate.advance(amount, self._now())
        short = note if len(note) <= NOTE_WIDTH else f"…{note[1 - NOTE_WIDTH :]}"
        self._bar.update(self._task, advance=amount, note=short)

    def finish(self) -> None:
        self._bar.update(self._task, note="")
        self._bar.stop()
