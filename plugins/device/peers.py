"""Runs the peers in a process of their own, and again without a peer that crashed or hung."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
COMMAND = (sys.executable, "-m", "device.peer_process")
GRACE = 30.0  # seconds for a start, and for a product that was begun before the time was up


@dataclass
class PeerResults:
    """What the peers left.

    Attributes:
        linears: One row per product.
        steps: One row per whole step.
        skipped: Peer, or peer and shape, and why it was not measured.
        torch: Version of torch; empty if it was not used.
    """

    linears: list[Row] = field(default_factory=list)
    steps: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    torch: str = ""

    def take(self, row: Row) -> None:
        """Sort one row of the process in."""
        if "torch" in row:
            self.torch = str(row["torch"])
        elif "skipped" in row:
            name = f"{row['peer']}, {row['what']}" if "what" in row else str(row["peer"])
            self.skipped[name] = str(row["skipped"])
        elif "microseconds" in row:
            (self.steps if "blocks" in row else self.linears).append(row)


def run_peers(names: list[str], beyond: int, seconds: float, command: tuple[str, ...] = COMMAND) -> PeerResults:
    """Rows of all peers within `seconds`, or some more for one that does not end."""
    results, ends = PeerResults(), time.monotonic() + seconds
    while names:
        left = max(1.0, ends - time.monotonic())
        rows, trouble = _run_once(names, beyond, left, command)
        for row in rows:
            results.take(row)
        if trouble is None:
            break
        started = [str(row["start"]) for row in rows if "start" in row]
        if not started:
            results.skipped.update(dict.fromkeys(names, trouble))
            break
        if {"done": started[-1]} not in rows:
            results.skipped[started[-1]] = trouble
        names = names[names.index(started[-1]) + 1 :]
    return results


def _run_once(names: list[str], beyond: int, seconds: float, command: tuple[str, ...]) -> tuple[list[Row], str | None]:
    """Rows of one process, and what became of it if it did not end well."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "rows.jsonl", Path(folder) / "stderr"
        out.touch()
        options = ["--out", str(out), "--beyond", str(beyond), "--seconds", str(seconds)]
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [*command, *options, *names], cwd=ROOT, stdout=stderr, stderr=stderr, stdin=subprocess.DEVNULL
            )
            trouble = None
            try:
                code = process.wait(seconds + GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                trouble = "its process did not end and was stopped."
            else:
                if code:
                    said = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                    trouble = f"its process ended with code {code}. {said[-1][:200] if said else ''}".strip()
        return _complete_rows(out.read_text(encoding="utf-8")), trouble


def _complete_rows(text: str) -> list[Row]:
    """Rows of all lines that were written to their end."""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
