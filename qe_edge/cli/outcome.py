"""How a command ends: two short lines for a mistake, one for Ctrl-C, a file with the traceback for a defect of ours."""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import click

from qe_edge.system.disk_errors import explain_disk
from qe_edge.system.errors import QEError, UnknownNameError

MISTAKE, DEFECT, INTERRUPTED = 2, 1, 130
RESUMABLE = ("deploy", "quantize")
QUANTIZE = (
    "gguf",
    "matplotlib",
    "ml_dtypes",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "rich",
    "scipy",
    "sklearn",
    "threadpoolctl",
    "torch",
    "transformers",
    "yaml",
)  # modules of the extra of that name
SERVER = ("fastapi", "prometheus_client", "uvicorn")  # as well
LENIENT = "backslashreplace"  # how a character that cannot be encoded is written


class Interrupted(Exception):  # noqa: N818 - the user's wish, not an error
    """The user pressed Ctrl-C."""


def run_reporting(call: Callable[[], object], words: Sequence[str]) -> int:
    """Run the application and turn whatever it raises into lines on stderr and an exit code.

    Args:
        call: Runs the application; what it returns is the exit code, None for 0.
        words: The command line, to say how to resume.
    """
    _write_any_character()
    try:
        with _terminating_like_ctrl_c():
            code = call()
    except (KeyboardInterrupt, click.Abort, Interrupted):
        _say(click.style(_how_to_resume(words), fg="yellow"))
        return INTERRUPTED
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter fails once more when it flushes stdout
        return 0
    except Exception as error:  # noqa: BLE001 - the last handler: no traceback ever reaches the user unasked
        if "--verbose" in words:
            _say("".join(traceback.format_exception(error)).rstrip())
        problem, remedy, code = _explain(error, words)
        _say(click.style("Error: ", fg="red", bold=True) + _one_line(problem))
        _say(click.style("  Fix: ", fg="green", bold=True) + _one_line(remedy))
        return code
    return code if isinstance(code, int) else 0


def _write_any_character() -> None:
    """Let standard output and error take any text, whatever the locale can encode."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors=LENIENT)


def _say(line: str) -> None:
    """A line on standard error, as far as there is one; the exit code tells the rest."""
    try:
        click.echo(line, err=True)
    except UnicodeEncodeError:  # a stream of another kind
        with suppress(OSError, ValueError):
            click.echo(line.encode("ascii", LENIENT).decode("ascii"), err=True)
    except (OSError, ValueError):  # closed, full, or a pipe that nobody reads
        pass


@contextmanager
def _terminating_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, as a service manager sends it, clean up and say how to resume; only a main thread may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _explain(error: Exception, words: Sequence[str]) -> tuple[str, str, int]:
    """Problem, remedy and exit code."""
    if isinstance(error, QEError):
        return error.problem, error.remedy, error.exit_code
    if isinstance(error, click.NoSuchOption) and error.ctx:
        known = [word for option in error.ctx.command.params for word in option.opts if word.startswith("--")]
        unknown = UnknownNameError("option", error.option_name, known)
        return unknown.problem, unknown.remedy, MISTAKE
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "qe-edge"
        return error.format_message(), f"See '{path} --help'.", MISTAKE
    if isinstance(error, click.ClickException):
        return error.format_message(), "Correct the command line.", MISTAKE
    return _explain_missing(error) or _explain_system(error) or _explain_defect(error, words)


def _explain_missing(error: Exception) -> tuple[str, str, int] | None:
    """Whoever runs engines only has no package of the extra `quantize`, and perhaps none of `server`."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if name in SERVER:
        problem = f"The server needs the Python package {name}, which is not installed."
        return problem, 'Run: pip install "qe-edge[server]".', MISTAKE
    if name not in QUANTIZE:
        return None
    problem = f"This needs the package '{name}', which is not installed: here, engines can only be run."
    return problem, "Run: pip install 'qe-edge[quantize]'.", MISTAKE


def _explain_system(error: Exception) -> tuple[str, str, int] | None:
    """What the operating system refuses is for the user to mend, wherever it happened."""
    if isinstance(error, MemoryError):
        return "Memory ran out.", "Close other programs, use fewer --samples, or use a larger machine.", MISTAKE
    if isinstance(error, PermissionError):
        return f"The system refuses access to '{error.filename}'.", "Choose a folder that you may write to.", MISTAKE
    explained = explain_disk(error)
    return None if explained is None else (explained.problem, explained.remedy, MISTAKE)


def _explain_defect(error: Exception, words: Sequence[str]) -> tuple[str, str, int]:
    kind = type(error).__name__
    written = _write_traceback(error, words)
    remedy = f"The full traceback is in '{written}'; please report it." if written else "Add --verbose to see where."
    return f"This should not happen: {kind}: {error}", remedy, DEFECT


def _write_traceback(error: Exception, words: Sequence[str]) -> str | None:
    """A new file with the command and the traceback; None if not even that can be written."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="qe-edge-", suffix=".log", delete=False, encoding="utf-8", errors=LENIENT
        ) as file:
            file.write(f"qe-edge {shlex.join(words)}\n\n")
            traceback.print_exception(error, file=file)
            return file.name
    except OSError:
        return None


def _how_to_resume(words: Sequence[str]) -> str:
    if not words or words[0] not in RESUMABLE or "--dry-run" in words:
        return "Stopped; nothing half-written is left. Run the same command again."
    # --overwrite would throw the finished part away
    kept = [word for word in words if word not in ("--resume", "--overwrite")]
    return f"Stopped. Continue where it was with: qe-edge {shlex.join([*kept, '--resume'])}"


def _one_line(text: str) -> str:
    """Text from models and libraries without line breaks and terminal control characters."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
