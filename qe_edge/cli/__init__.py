"""The command line, `qe-edge COMMAND`: this package reads arguments, checks them, and calls the Python functions.

Only click is imported at start-up, so that `qe-edge --help` answers at once. A command's own module holds its options,
and is imported when the command is called. Its work is in a lazy module, `<name>_work` where it is long: that one
imports what is heavy (torch, transformers, pydantic, rich) at its top.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from qe_edge.system.child_process import forget_current_folder
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from qe_edge.cli import application, outcome
else:  # after the current folder is forgotten, and where a Ctrl-C is answered
    application = lazy_module("qe_edge.cli.application")
    outcome = lazy_module("qe_edge.cli.outcome")

PROGRAM = "qe-edge"
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; None takes those of the process, which then ends with this call.

    Returns:
        Exit code: 0 for success, 2 for a mistake that the user can mend, 1 for a defect of ours, 130 after Ctrl-C.
    """
    if arguments is not None:
        return _run(list(arguments))
    code = INTERRUPTED  # if a Ctrl-C comes before the command starts, or a second one while the first is answered
    with suppress(KeyboardInterrupt):
        for file in forget_current_folder():
            sys.stderr.write(_executed(file))
        code = _run(sys.argv[1:])
    _ignore_ctrl_c()
    return code


def _run(words: list[str]) -> int:
    # OpenMP's threads otherwise wait in a busy loop: on a shared machine that costs more than all computing
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run = application.application.main
    return outcome.run_reporting(lambda: run(words, prog_name=PROGRAM, standalone_mode=False), words)


def _executed(file: str) -> str:
    """That Python ran somebody's file is past help, but not past telling."""
    return (
        f"Note: Python ran {file!a} of the current folder when it started, because an entry of PYTHONPATH is empty "
        "or '.'. Take that entry out, or anybody's file can run here.\n"
    )


def _ignore_ctrl_c() -> None:
    """Let the interpreter end in peace: all is done and said, and there a Ctrl-C could only print a traceback."""
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may
    while signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        with suppress(KeyboardInterrupt):  # of the moment before
            signal.signal(signal.SIGINT, signal.SIG_IGN)
