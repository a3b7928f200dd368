"""Progress of long work, told to whoever wants to know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Receives how far a piece of long work is."""

    def start(self, title: str, total: float) -> None:
        """A piece of work of `total` units begins."""

    def advance(self, amount: float, note: str) -> None:
        """`amount` units are done; `note` names what comes next."""

    def finish(self) -> None:
        """The piece of work is over."""


class Silent:
    """Ignores progress; what the Python functions use unless told otherwise.

    Example:
        >>> with track(Silent(), "quantizing", total=2) as progress:
        ...     progress.advance(1, "layers.1")
    """

    def start(self, title: str, total: float) -> None:
        """Nothing to do."""

    def advance(self, amount: float, note: str) -> None:
        """Nothing to do."""

    def finish(self) -> None:
        """Nothing to do."""


class Part(Silent):
    """A piece of work inside another one, of which it is so many units.

    Args:
        whole: Progress of the other one.
        units: Its units that this piece is.

    Example:
        >>> class Printed(Silent):
        ...     def advance(self, amount: float, note: str) -> None:
        ...         print(amount, note)
        >>> with track(Part(Printed(), 10), "gradients", total=2) as progress:
        ...     progress.advance(1, "batch 1")
        5.0 batch 1
    """

    def __init__(self, whole: Progress, units: float) -> None:
        self._whole = whole
        self._units = units
        self._total = 1.0

    def start(self, _title: str, total: float) -> None:
        """The units are shared among `total` of its own."""
        self._total = total

    def advance(self, amount: float, note: str) -> None:
        """Tell the whole."""
        self._whole.advance(self._units * amount / self._total, note)


@contextmanager
def track(progress: Progress, title: str, total: float) -> Iterator[Progress]:
    """Start a piece of work and finish it whatever happens.

    Example:
        >>> class Printed(Silent):
        ...     def start(self, title: str, total: float) -> None:
        ...         print(f"{title}: {total} layers")
        ...     def finish(self) -> None:
        ...         print("done")
        >>> with track(Printed(), "quantizing", total=2) as progress:
        ...     progress.advance(1, "layers.1")
        quantizing: 2 layers
        done
    """
    progress.start(title, total)
    try:
        yield progress
    finally:
        progress.finish()
