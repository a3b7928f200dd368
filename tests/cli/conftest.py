"""The command line inside this process (fast) and in a child process (start-up, signals)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from qe_edge.cli import main
from qe_edge.demo import model_path
from tests.cli.forked import Command
from tests.cli.running import CHILD, Outcome, Run


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*words: object) -> Outcome:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def child() -> Run:
    def run(*words: object) -> Outcome:
        done = subprocess.run([*CHILD, *map(str, words)], capture_output=True, text=True, check=False, timeout=600)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def forked() -> Run:
    """As `child`, without the seconds of its imports."""

    def run(*words: object) -> Outcome:
        return Command(*words).outcome()

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model to damage."""
    return Path(shutil.copytree(model_path(), tmp_path / "model"))
