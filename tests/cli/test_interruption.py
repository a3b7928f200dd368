"""Ctrl-C and kill in the middle of a real run; then --resume gives the identical checkpoint."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.cli.forked import Command
from tests.cli.running import SHORT, Outcome, Run
from tests.small_vlm import write_small_vlm

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(forked: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a checkpoint that was made without interruption."""
    out = tmp_path_factory.mktemp("whole") / "checkpoint"
    outcome = forked("quantize", "demo", "-o", out, *SHORT)
    assert outcome.code == 0, outcome.err
    assert not out.with_name("checkpoint.work").exists()
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stopped_by(sign: signal.Signals, out: Path) -> Outcome:
    """Quantize until the first block is on disk, then send a signal."""
    command = Command("quantize", "demo", "-o", out, *SHORT)
    work, deadline = out.with_name("checkpoint.work"), time.monotonic() + 300
    while not list(work.glob("model*.safetensors")):
        assert command.runs(), command.outcome()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    command.send(sign)
    return command.outcome()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_stop_says_how_to_resume_and_resuming_gives_the_identical_checkpoint(
    sign: signal.Signals, forked: Run, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "checkpoint"
    stopped = stopped_by(sign, out)
    assert stopped.code == 130
    last = stopped.err.splitlines()[-1]
    assert last.startswith("Stopped. Continue where it was with: qe-edge quantize demo")
    assert last.endswith("--resume")
    assert "Traceback" not in stopped.err
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.work"]
    assert not [path for path in (tmp_path / "checkpoint.work").iterdir() if path.name.endswith(".part")]

    resumed = forked("quantize", "demo", "-o", out, *SHORT, "--resume")
    assert resumed.code == 0, resumed.err
    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]

    again = forked("quantize", "demo", "-o", out, *SHORT, "--resume")
    assert again.code == 0
    assert "complete already" in again.out


def test_a_dry_run_that_is_stopped_has_nothing_to_resume(tmp_path: Path) -> None:
    command = Command("quantize", "demo", "-o", tmp_path / "checkpoint", "--dry-run", "--bits", "4.25")
    while not command.errors():  # it begins to measure
        assert command.runs(), command.outcome()
        time.sleep(0.02)
    command.send(signal.SIGINT)
    stopped = command.outcome()
    assert stopped.code == 130
    assert "Memory:" in stopped.out  # what was known before
    assert stopped.err.splitlines()[-1] == "Stopped; nothing half-written is left. Run the same command again."
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_resumes_to_the_identical_checkpoint_and_with_no_other_recipe(
    forked: Run, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "checkpoint"
    assert stopped_by(signal.SIGKILL, out).code == -signal.SIGKILL
    assert not out.exists()
    finished = set(contents(out.with_name("checkpoint.work")))
    other = forked("quantize", "demo", "-o", out, *SHORT, "--seed", "1", "--resume")
    assert other.code == 2
    assert "another model, recipe or calibration data" in other.err
    assert set(contents(out.with_name("checkpoint.work"))) == finished
    resumed = forked("quantize", "demo", "-o", out, *SHORT, "--resume")
    assert resumed.code == 0, resumed.err
    assert contents(out) == whole
    assert not out.with_name("checkpoint.work").exists()


def test_ten_kills_at_random_moments_leave_no_trace(forked: Run, tmp_path: Path) -> None:
    """In a run with a budget, which writes gradients, offers and finished blocks before the checkpoint."""
    model = write_small_vlm(tmp_path / "model")
    words = ["quantize", str(model), *SHORT, "--bits", "4.5"]
    begun = time.monotonic()
    assert forked(*words, "-o", tmp_path / "whole").code == 0
    seconds, whole = time.monotonic() - begun, contents(tmp_path / "whole")
    out, moments = tmp_path / "checkpoint", random.Random(0)
    kills = 0
    while kills < 10:
        command = Command(*words, "-o", out, "--resume")
        if not command.ended(moments.uniform(0.15, 0.5) * seconds):
            command.send(signal.SIGKILL)
            kills += 1
        ended = command.outcome()
        assert ended.code in (0, -signal.SIGKILL), ended
        if ended.code == 0:
            assert contents(out) == whole
            shutil.rmtree(out)
    resumed = forked(*words, "-o", out, "--resume")
    assert resumed.code == 0, resumed.err
    assert contents(out) == whole
    assert {path.name for path in tmp_path.iterdir()} == {"model", "whole", "checkpoint"}
