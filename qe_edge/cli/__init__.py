"""The command line, `qe-edge COMMAND`: this package reads arguments, checks them, and calls the Python functions.

Only click is imported at start-up. Each command's module is imported when it is needed, and what is heavy (torch,
transformers, pydantic, rich) inside the command itself, so that `qe-edge --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

PROGRAM = "qe-edge"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; None takes those of the process.

    Returns:
        Exit code: 0 for success, 2 for a mistake that the user can mend, 1 for a defect of ours, 130 after Ctrl-C.
    """
    # OpenMP's threads otherwise wait in a busy loop: on a shared machine that costs more than all computing
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from qe_edge.cli.application import application
    from qe_edge.cli.outcome import run_reporting

    words = list(sys.argv[1:] if arguments is None else arguments)
    return run_reporting(lambda: application.main(words, prog_name=PROGRAM, standalone_mode=False), words)
