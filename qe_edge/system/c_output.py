"""Keeps what C libraries print by themselves off the terminal and out of what a user redirects to a file."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

LONGEST_REPORT = 2**16  # bytes


@contextmanager
def silent_c_stdout() -> Iterator[None]:
    """Throw away what is written to file descriptor 1 while the context is open; nothing else may print meanwhile.

    C's own buffer is emptied before and after, or what was printed inside would come out later.

    Example:
        >>> with silent_c_stdout():
        ...     _ = ctypes.CDLL(None).puts(b"a library's banner, which nobody sees")
    """
    sys.stdout.flush()
    _flush_c()
    try:
        kept = os.dup(1)
    except OSError:  # it is closed, so nothing can be printed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        _flush_c()
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def without_panic_report() -> Iterator[None]:
    """Hold back what is written to file descriptor 2; where a Rust library panics, its own report is thrown away.

    The exception says the same. Everything else that was written comes out when the context is left.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> with without_panic_report():
        ...     words = Tokenizer(models.WordLevel({"cat": 0}, unk_token="cat"))
        >>> words.encode("cat").ids
        [0]
    """
    panicked = False
    said = b""
    try:
        with held_stderr() as held:
            try:
                yield
            except BaseException as error:
                panicked = type(error).__module__ == "pyo3_runtime"
                raise
            finally:
                said = held()
    finally:
        if said and not panicked:
            with suppress(OSError):
                os.write(2, said)


@contextmanager
def held_stderr() -> Iterator[Callable[[], bytes]]:
    """Hold back what is written to file descriptor 2 while the context is open, and throw it away.

    Yields:
        What was written so far, at most 64 KiB of it; only inside the context.

    Example:
        >>> with held_stderr() as held:
        ...     _ = os.write(2, b"a library's warning")
        ...     print(held())
        b"a library's warning"
    """
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # it is closed, so nothing can be printed
        yield bytes
        return
    with tempfile.TemporaryFile() as file:

        def held() -> bytes:
            sys.stderr.flush()
            _flush_c()
            return os.pread(file.fileno(), LONGEST_REPORT, 0)

        os.dup2(file.fileno(), 2)
        try:
            yield held
        finally:
            sys.stderr.flush()
            _flush_c()
            os.dup2(kept, 2)
            os.close(kept)


def _flush_c() -> None:
    ctypes.CDLL(None).fflush(None)
