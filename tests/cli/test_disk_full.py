"""A disk that fills up or fails: a real small one where the tests may mount it, and stand-ins."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qe_edge.cli import quantize_work
from qe_edge.system.disk_errors import REMEDIES
from tests.cli.running import Run, assert_two_lines

WORDS = ["quantize", "demo", "--method", "rtn", "--modules", "merger", "--samples", "1"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 3 MiB: the finished block fits, the checkpoint of 9 MB does not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"mounting needs root: {mount.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_small_disk_is_refused_before_any_work(cli: Run, small_disk: Path) -> None:
    outcome = cli(*WORDS, "-o", small_disk / "checkpoint")
    assert_two_lines(outcome, "needs about", "another disk")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_costs_no_finished_block(
    cli: Run, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = small_disk / "checkpoint"
    with monkeypatch.context() as patch:
        patch.setattr(quantize_work, "check_disk", lambda *_arguments: None)  # as if others had filled it meanwhile
        outcome = cli(*WORDS, "-o", out)
    assert outcome.code == 2
    assert "The disk is full" in outcome.err.splitlines()[-2]
    assert [path.name for path in small_disk.iterdir()] == ["checkpoint.work"]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    resumed = cli(*WORDS, "-o", out, "--resume")
    assert resumed.code == 0, resumed.err
    assert [path.name for path in small_disk.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_checkpoint(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    out = tmp_path / "checkpoint"
    assert cli(*WORDS, "-o", out).code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(_tensors: object, path: Path, *_arguments: object, **_keywords: object) -> None:
        path.write_bytes(b"the first half")
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("qe_edge.models.quantized.write_tensors", full)
    outcome = cli(*WORDS, "-o", out, "--overwrite")
    assert outcome.code == 2
    assert "The disk is full" in outcome.err.splitlines()[-2]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "checkpoint.work"}


@pytest.mark.parametrize("code", REMEDIES)
def test_what_the_disk_reports_is_said(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*_arguments: object, **_keywords: object) -> None:
        raise OSError(code, os.strerror(code), str(tmp_path / "where"))

    monkeypatch.setattr("qe_edge.quantization.quantizer.load_outside_blocks", fail)
    outcome = cli("quantize", "demo", "-o", tmp_path / "out", "--method", "rtn")
    assert outcome.code == 2, outcome.err
    assert f"Error: The system reports '{os.strerror(code)}' for '{tmp_path / 'where'}'.\n" in outcome.err
    assert f"Fix: {REMEDIES[code]}" in outcome.err
    assert list(tmp_path.iterdir()) == []
