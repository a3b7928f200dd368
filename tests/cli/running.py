"""How the tests of the command line run it, and what a mistake must look like."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

# a shell that runs the tests in the background has its children ignore Ctrl-C; here they must not
HEED_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
CHILD = [sys.executable, "-c", f"{HEED_CTRL_C}; import sys; from qe_edge.cli import main; sys.exit(main())"]
# a quantization of a few seconds that still goes through every part of the method
SHORT = ["--samples", "2", "--set", "tokens=128", "--set", "em_steps=0", "--set", "experts=2"]


@dataclass(frozen=True)
class Outcome:
    """Exit code, standard output and standard error of a command."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def assert_two_lines(outcome: Outcome, problem: str, remedy: str) -> None:
    """One sentence saying what is wrong, one saying what to do, exit code 2, no traceback."""
    assert outcome.code == 2, outcome
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 2, outcome.err
    assert lines[0].startswith("Error: "), outcome.err
    assert lines[1].startswith("  Fix: "), outcome.err
    assert problem in lines[0]
    assert remedy in lines[1]
    assert "Traceback" not in outcome.out + outcome.err
