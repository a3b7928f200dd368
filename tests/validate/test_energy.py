"""Energy of answers: in total, above idle, per answer; what a report and a table say of it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from qe_edge.cli import bench_work
from qe_edge.cli.bench import command
from qe_edge.report.page import render_page
from qe_edge.report.wording import limits
from qe_edge.validate.energy import NO_RAILS, Energy, Gauge
from qe_edge.validate.schema import Latency, Timing
from tests.report.conftest import ENERGY, make_report
from tests.system.test_power import ORIN_NX, monitor, replace


def test_energy_of_an_answer_in_total_and_above_idle(tmp_path: Path) -> None:
    folder = monitor(tmp_path, ORIN_NX)
    gauge = Gauge(tmp_path, settling=0, idle=0.15)
    replace(folder / "curr1_input", b"3200")  # from 6 W to 16 W
    begin = time.perf_counter()
    with gauge.running():
        time.sleep(0.4)
    seconds = time.perf_counter() - begin
    found = gauge.energy(answers=4)
    assert isinstance(found, Energy)
    assert found.joules == pytest.approx(16 * seconds / 4, rel=0.02)
    assert found.above_idle == pytest.approx(10 * seconds / 4, rel=0.02)
    assert found.idle_watts == pytest.approx(6.0)
    assert (found.rails, found.notices, found.answers) == (["VDD_IN"], [], 4)
    assert found.samples > 5


def test_the_board_settles_before_its_idle_power_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = monitor(tmp_path, {"VDD_IN": (5000, 4000)})  # still warm from the work before
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        replace(folder / "curr1_input", b"1000")
        threading.Event().wait(0.15)

    monkeypatch.setattr("qe_edge.validate.energy.time.sleep", sleep)
    gauge = Gauge(tmp_path, settling=7, idle=3)
    with gauge.running():
        threading.Event().wait(0.15)
    found = gauge.energy(1)
    assert isinstance(found, Energy)
    assert found.idle_watts == pytest.approx(5.0)
    assert slept == [7, 3]


def test_a_desktop_waits_for_nothing(tmp_path: Path) -> None:
    begin = time.perf_counter()
    gauge = Gauge(tmp_path, settling=60, idle=60)
    with gauge.running():
        pass
    assert gauge.energy(1) == NO_RAILS == "no power rails"
    assert time.perf_counter() - begin < 30


def test_rails_that_fail_end_in_a_sentence(tmp_path: Path) -> None:
    folder = monitor(tmp_path, ORIN_NX)
    gauge = Gauge(tmp_path, settling=0, idle=0.15)
    (folder / "curr1_input").unlink()
    with gauge.running():
        time.sleep(0.1)
    assert gauge.energy(4) == (
        "The power rails could not be read to the end: 'curr1_input' cannot be read, No such file or directory."
    )


def test_rails_that_are_garbage_from_the_start_end_in_sentences(tmp_path: Path) -> None:
    folder = monitor(tmp_path, ORIN_NX)
    (folder / "curr1_input").write_text("nothing")
    gauge = Gauge(tmp_path, settling=60)
    with gauge.running():
        pass
    said = gauge.energy(4)
    assert isinstance(said, str)
    assert "those that can be: VDD_CPU_GPU_CV, VDD_SOC." in said
    assert "'VDD_IN' was left out" in said


def test_less_than_nothing_is_no_energy(tmp_path: Path) -> None:
    monitor(tmp_path, {"VDD_IN": (5000, -300)})
    gauge = Gauge(tmp_path, settling=0, idle=0.15)
    said = gauge.energy(1)
    assert isinstance(said, str)
    assert "-1.5 W on average" in said


def test_an_error_in_the_answers_is_not_hidden(tmp_path: Path) -> None:
    monitor(tmp_path, ORIN_NX)
    gauge = Gauge(tmp_path, settling=0, idle=0.15)
    with pytest.raises(KeyError), gauge.running():
        raise KeyError


def latency(energy: Energy | str | None) -> Latency:
    timing = Timing(median=12.5, lower=11.0, upper=14.0, repeats=32, p90=15.5, p99=17.25)
    steps = {"first_token": timing, "decode": timing}
    return Latency(
        runtime="tensorrt", setting="", steps=steps, prompt_tokens=34, threads=2, peak_bytes=1, energy=energy
    )


def printed(row: Latency, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(bench_work, "measure_latency", lambda *_, **__: [row])
    monkeypatch.setattr(bench_work, "find_engines", lambda folder, _: folder)
    monkeypatch.setattr(bench_work, "check_deployment", lambda *_: None)
    monkeypatch.setenv("COLUMNS", "200")
    outcome = CliRunner().invoke(command, ["engines", *words])
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def test_the_table_has_the_energy_and_says_that_no_jetson_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(latency(ENERGY), monkeypatch)
    assert "Answer J" in text
    assert "1.25" in text
    assert "0.75" in text
    assert "an answer of 9 tokens; rails VDD_IN" in text
    assert "never checked on a Jetson" in text


@pytest.mark.parametrize("energy", [NO_RAILS, None])
def test_the_table_of_a_desktop_is_silent(energy: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(latency(energy), monkeypatch)
    assert "nergy" not in text
    assert "idle" not in text
    kept: list[tuple[tuple[str, ...], list[tuple[str, ...]]]] = []
    monkeypatch.setattr(bench_work.tables, "print_table", lambda *table: kept.append(table))
    printed(latency(energy), monkeypatch)
    printed(latency(ENERGY), monkeypatch)
    assert [[len(row) - len(names) for row in rows] for names, rows in kept] == [[0], [0]]
    assert len(kept[1][0]) == len(kept[0][0]) + 3


def test_json_says_that_there_are_no_rails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert '"energy": "no power rails"' in printed(latency(NO_RAILS), monkeypatch, "--json")
    assert '"joules": 1.25' in printed(latency(ENERGY), monkeypatch, "--json")


def test_a_failure_and_a_notice_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No energy. The power rails went." in printed(latency("The power rails went."), monkeypatch)
    noticed = ENERGY.model_copy(update={"notices": ["A rail was left out."]})
    assert "A rail was left out." in printed(latency(noticed), monkeypatch)


def test_a_latency_comes_back_from_its_json() -> None:
    for energy in (ENERGY, NO_RAILS, None):
        assert Latency.model_validate_json(latency(energy).model_dump_json()).energy == energy
    with pytest.raises(ValidationError):
        latency("x" * 601)
    with pytest.raises(ValidationError):
        Energy.model_validate(ENERGY.model_dump() | {"joules": float("inf")})


def test_the_report_shows_energy_where_there_is_some() -> None:
    report = make_report()
    silent = report.model_copy(
        update={"latency": [row.model_copy(update={"energy": NO_RAILS}) for row in report.latency]}
    )
    first, second = report.latency
    measured = report.model_copy(update={"latency": [first.model_copy(update={"energy": ENERGY}), second]})
    failed = report.model_copy(update={"latency": [first.model_copy(update={"energy": "The rails went."}), second]})
    assert "Energy" not in render_page(silent)
    assert "1.25 J" in render_page(measured)
    assert "0.750 J above idle, 5.00 W" in render_page(measured)
    assert any("never checked on a Jetson" in line for line in limits(measured))
    assert "Energy was not measured. The rails went." in limits(failed)
