"""A progress display that stands for a kill in the middle of a run."""

from __future__ import annotations


class KilledError(Exception):
    """Stands for a kill: raised from the progress report."""


class StopAfter:
    """Raises `KilledError` when this many blocks are done."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks

    def start(self, title: str, total: float) -> None:
        pass

    def advance(self, amount: float, note: str) -> None:
        self.left -= note != "gradients"
        if self.left == 0:
            raise KilledError

    def finish(self) -> None:
        pass
