"""Keeps other libraries' warnings and progress bars off the terminal, except those of downloads; shows our notices."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

import click

from qe_edge.system.errors import CommonNotice, QENotice
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    import transformers
else:
    transformers = lazy_module("transformers")

# Read by the libraries when they are imported; what the user has set wins.
SETTINGS = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


@contextmanager
def quiet_libraries(verbose: bool) -> Iterator[None]:
    """Silence transformers, torch and everything that warns through Python, unless `verbose`."""
    if verbose:
        with _notices():
            yield
        return
    added = [name for name in SETTINGS if name not in os.environ]
    os.environ.update({name: SETTINGS[name] for name in added})
    if "transformers" in sys.modules:  # imported earlier in this process, so the settings above come too late
        transformers.utils.logging.set_verbosity_error()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _notices():
                yield
    finally:
        logging.disable(disabled)
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _notices() -> Iterator[None]:
    """Print a `QENotice` as one line, every time; a `CommonNotice` once."""
    shown: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", QENotice)
        others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, QENotice):
                if issubclass(category, CommonNotice) and str(message) in shown:
                    return
                shown.add(str(message))
                click.secho(f"Note: {message}", fg="yellow", err=True)
            else:
                others(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield
