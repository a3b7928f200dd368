"""Ctrl-C where no command is left to stop: before it starts, twice in a row, and while the interpreter ends."""

from __future__ import annotations

import signal
import subprocess

import pytest

from tests.cli.running import CHILD

INTERRUPT = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"


def run(before: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line in a child that first runs some code."""
    *python, code = CHILD
    heed, _, call = code.partition("; import sys; ")
    command = [*python, f"{heed}\nimport sys\n{before}\n{call}", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_while_the_interpreter_ends() -> None:
    done = run(f"import atexit; atexit.register(lambda: exec({INTERRUPT!r}))", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("QE-Edge")


def test_while_threads_are_waited_for() -> None:
    wait = f"import time; time.sleep(0.5); exec({INTERRUPT!r})"
    done = run(f"import threading; threading.Thread(target=lambda: exec({wait!r})).start()", "--version")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("moment", ["qe_edge.cli.application", "qe_edge.cli.doctor"])
def test_while_modules_are_imported(moment: str) -> None:
    spy = (
        "class Spy:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {moment!r}: exec({INTERRUPT!r})\n"
        "sys.meta_path.insert(0, Spy())"
    )
    done = run(spy, "doctor", "--help")
    assert done.returncode == 128 + signal.SIGINT
    assert "Traceback" not in done.stderr


def test_twice_in_a_row() -> None:
    """The second comes while the first is being answered."""
    spy = f"import click; click.secho = lambda *a, **k: exec({INTERRUPT!r})\n"
    spy += f"import qe_edge.doctor; qe_edge.doctor.examine = lambda: exec({INTERRUPT!r})"
    done = run(spy, "doctor")
    assert done.returncode == 128 + signal.SIGINT
    assert "Traceback" not in done.stderr
