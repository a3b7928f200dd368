"""Keeps what C libraries print by themselves off the terminal and out of what a user redirects to a file."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silent_c_stdout() -> Iterator[None]:
    """Throw away what is written to file descriptor 1 while the context is open; nothing else may print meanwhile.

    C's own buffer is emptied before and after, or what was printed inside would come out later.
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


def _flush_c() -> None:
    ctypes.CDLL(None).fflush(None)
