"""The order of answers: a fixed number run at a time, and the others wait in the order in which they came."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from qe_edge.system.errors import InputError


class Turns:
    """Lets a number of answers run at once; more of them wait.

    Args:
        count: Number of answers that run at once.

    Example:
        >>> turns = Turns(count=1)
        >>> turns.enter("first", given_up=lambda: False), turns.running
        (True, 1)
        >>> turns.leave("first")
        >>> turns.running
        0
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._condition = threading.Condition()
        self._queue: deque[object] = deque()
        self._running: dict[object, int] = {}  # with the thread that works at it

    @property
    def waiting(self) -> int:
        """Answers that wait."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Answers that run."""
        return len(self._running)

    def enter(self, who: object, given_up: Callable[[], bool]) -> bool:
        """Wait for a turn.

        Args:
            who: The answer.
            given_up: Says whether to wait no longer; called after every `wake`.

        Returns:
            Whether it may run; False if it was given up.

        Raises:
            InputError: If only answers of the calling thread run, so that waiting would not end.
        """
        with self._condition:
            self._queue.append(who)
            try:
                while self._queue[0] is not who or len(self._running) >= self.count:
                    if given_up():
                        return False
                    self._check_others()
                    self._condition.wait()
                if given_up():
                    return False
                self._running[who] = threading.get_ident()
            finally:
                self._queue.remove(who)
                self._condition.notify_all()
            return True

    def work(self, who: object) -> None:
        """Note that the calling thread works at an answer."""
        with self._condition:
            if who in self._running:
                self._running[who] = threading.get_ident()

    def leave(self, who: object) -> None:
        """End a turn."""
        with self._condition:
            self._running.pop(who, None)
            self._condition.notify_all()

    def wake(self) -> None:
        """Let those who wait ask whether they were given up."""
        with self._condition:
            self._condition.notify_all()

    def _check_others(self) -> None:
        mine = threading.get_ident()
        if len(self._running) >= self.count and all(thread == mine for thread in self._running.values()):
            raise InputError(
                "An answer that this thread began has not ended, and no other one may run beside it.",
                "Read it to its end or close it first, or open the pipeline with more slots.",
            )
