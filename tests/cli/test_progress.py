"""Progress on a terminal and off it, with a clock that the test moves."""

from __future__ import annotations

import io

import pytest
from rich.text import Text

from qe_edge.cli.console import ConsoleProgress, Estimate, clock


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_clock() -> None:
    assert [clock(0.4), clock(61), clock(3661)] == ["0:00", "1:01", "1:01:01"]


def test_an_estimate_knows_nothing_before_the_first_advance() -> None:
    assert Estimate(10, 0.0).remaining(5.0) is None


def test_an_even_pace_gives_the_exact_rest_and_counts_down() -> None:
    estimate = Estimate(10, 0.0)
    for second in range(1, 6):
        estimate.advance(1, float(second))
    assert estimate.remaining(5.0) == pytest.approx(5.0)
    assert estimate.remaining(7.0) == pytest.approx(3.0)
    assert estimate.remaining(100.0) == 0.0


def test_blocks_that_a_resumed_run_skips_do_not_spoil_the_estimate() -> None:
    estimate = Estimate(20, 0.0)
    for _ in range(10):
        estimate.advance(1, 0.01)
    for second in range(1, 7):
        estimate.advance(1, 10.0 * second)
    assert estimate.remaining(60.0) == pytest.approx(40.0)


def test_off_a_terminal_a_line_comes_every_tenth_or_every_ten_seconds() -> None:
    stream, now = io.StringIO(), Clock()
    progress = ConsoleProgress(stream, now)
    progress.start("Quantizing", 1000)
    for index in range(1000):
        now.time += 0.001
        progress.advance(1, f"layer {index}")
    progress.finish()
    assert len(lines(stream)) == 1 + 9 + 1
    assert lines(stream)[1] == "Quantizing:  10% after 0:00, about 0:01 left (layer 99)"
    assert lines(stream)[-1] == "Quantizing: done after 0:01"

    slow = io.StringIO()
    progress = ConsoleProgress(slow, now)
    progress.start("Quantizing", 1000)
    for index in range(10):
        now.time += 5.0
        progress.advance(1, f"layer {index}")
    assert len(lines(slow)) == 1 + 5
    assert "\x1b" not in stream.getvalue() + slow.getvalue()


def test_stopped_work_is_not_called_done() -> None:
    stream = io.StringIO()
    progress = ConsoleProgress(stream, Clock())
    progress.start("Quantizing", 2)
    progress.advance(1, "first")
    progress.finish()
    assert "done" not in stream.getvalue()


def test_on_a_terminal_the_bar_shows_share_elapsed_and_remaining_time() -> None:
    stream, now = Terminal(), Clock()
    progress = ConsoleProgress(stream, now)
    progress.start("Quantizing", 4)
    now.time += 60
    progress.advance(1, "model.language_model.layers.[0]")
    progress.finish()
    text = stream.getvalue()
    for part in ("Quantizing", "25%", "about 3:00 left"):
        assert part in text
    assert max(len(line) for line in Text.from_ansi(text).plain.splitlines()) <= 80


def test_work_inside_work() -> None:
    stream = io.StringIO()
    progress = ConsoleProgress(stream, Clock())
    progress.start("Validating", 1)
    progress.start("Answering", 1)
    progress.advance(1, "all")
    progress.finish()
    progress.advance(1, "answers")
    progress.finish()
    assert [line.split(":")[0] for line in lines(stream)[-2:]] == ["Answering", "Validating"]
