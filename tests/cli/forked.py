"""Commands in processes of their own, which a server that has imported torch forks: importing it takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cli.running import Outcome

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["qe_edge.quantization.quantizer", "qe_edge.models.qwen2_vl", "qe_edge.cli"])


class Command:
    """A command of the user that has been started.

    Args:
        words: Its words after `qe-edge`.
    """

    def __init__(self, *words: object) -> None:
        self._written = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._written.name) / name for name in ("out", "err"))
        words = tuple(str(word) for word in words)
        self._process = SERVER.Process(target=_run, args=(words, self._out, self._err), daemon=True)
        self._process.start()

    def runs(self) -> bool:
        return self._process.is_alive()

    def ended(self, seconds: float) -> bool:
        """Wait for its end, at most so long."""
        self._process.join(seconds)
        return not self.runs()

    def send(self, sign: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, sign)

    def outcome(self, seconds: float = 600) -> Outcome:
        """Wait for its end; a process that a signal has ended has the signal's number below zero as its code."""
        if not self.ended(seconds):
            self._process.kill()
            raise subprocess.TimeoutExpired("qe-edge", seconds)
        assert self._process.exitcode is not None
        with self._written:
            return Outcome(self._process.exitcode, self._out.read_text(), self._err.read_text())

    def errors(self) -> str:
        """What it has written to standard error so far."""
        return self._err.read_text() if self._err.exists() else ""


def _run(words: tuple[str, ...], out: Path, err: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores Ctrl-C, a command does not
    for path, descriptor in ((out, 1), (err, 2)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    from qe_edge.cli import main

    sys.exit(main(list(words)))
