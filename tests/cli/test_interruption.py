"""Ctrl-C and kill in the middle of a real run; then --resume gives the identical checkpoint."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.running import CHILD, SHORT, Outcome, Run
from tests.small_vlm import write_small_vlm

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(child: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a checkpoint that was made without interruption."""
    out = tmp_path_factory.mktemp("whole") / "checkpoint"
    outcome = child("quantize", "demo", "-o", out, *SHORT)
    assert outcome.code == 0, outcome.err
    assert not out.with_name("checkpoint.work").exists()
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stopped_by(sign: signal.Signals, out: Path) -> Outcome:
    """Quantize until the first block is on disk, then send a signal."""
    process = subprocess.Popen(
        [*CHILD, "quantize", "demo", "-o", str(out), *SHORT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    work, deadline = out.with_name("checkpoint.work"), time.monotonic() + 300
    while not list(work.glob("model*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sign)
    return Outcome(process.wait(300), *process.communicate())


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_stop_says_how_to_resume_and_resuming_gives_the_identical_checkpoint(
    sign: signal.Signals, child: Run, tmp_path: Path, whole: dict[str, bytes]
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

    resumed = child("quantize", "demo", "-o", out, *SHORT, "--resume")
    assert resumed.code == 0, resumed.err
    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]

    again = child("quantize", "demo", "-o", out, *SHORT, "--resume")
    assert again.code == 0
    assert "complete already" in again.out


def test_a_dry_run_that_is_stopped_has_nothing_to_resume(tmp_path: Path) -> None:
    words = [*CHILD, "quantize", "demo", "-o", str(tmp_path / "checkpoint"), "--dry-run", "--bits", "4.25"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()  # it begins to measure
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Memory:" in out  # what was known before
    assert err.splitlines()[-1] == "Stopped; nothing half-written is left. Run the same command again."
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_resumes_to_the_identical_checkpoint_and_with_no_other_recipe(
    child: Run, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "checkpoint"
    assert stopped_by(signal.SIGKILL, out).code == -signal.SIGKILL
    assert not out.exists()
    finished = set(contents(out.with_name("checkpoint.work")))
    other = child("quantize", "demo", "-o", out, *SHORT, "--seed", "1", "--resume")
    assert other.code == 2
    assert "another model, recipe or calibration data" in other.err
    assert set(contents(out.with_name("checkpoint.work"))) == finished
    resumed = child("quantize", "demo", "-o", out, *SHORT, "--resume")
    assert resumed.code == 0, resumed.err
    assert contents(out) == whole
    assert not out.with_name("checkpoint.work").exists()


def test_ten_kills_at_random_moments_leave_no_trace(child: Run, tmp_path: Path) -> None:
    """In a run with a budget, which writes gradients, offers and finished blocks before the checkpoint."""
    model = write_small_vlm(tmp_path / "model")
    words = ["quantize", str(model), *SHORT, "--bits", "4.5"]
    begun = time.monotonic()
    assert child(*words, "-o", tmp_path / "whole").code == 0
    seconds, whole = time.monotonic() - begun, contents(tmp_path / "whole")
    out, moments = tmp_path / "checkpoint", random.Random(0)
    kills = 0
    while kills < 10:
        process = subprocess.Popen(
            [*CHILD, *words, "-o", str(out), "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            process.wait(moments.uniform(0.15, 0.5) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        errors = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), errors
        if process.returncode == 0:
            assert contents(out) == whole
            shutil.rmtree(out)
    resumed = child(*words, "-o", out, "--resume")
    assert resumed.code == 0, resumed.err
    assert contents(out) == whole
    assert {path.name for path in tmp_path.iterdir()} == {"model", "whole", "checkpoint"}
