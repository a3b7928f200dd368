"""An answer that comes piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import TracebackType

from qe_edge.runtime.answers import Answer, Piece
from qe_edge.system.errors import InputError


class AnswerStream(Iterator[Piece]):
    """The pieces of an answer, each as soon as it is known. The work is done by the thread that asks for the next one.

    It ends itself when its last piece has been read; `close`, or `with`, ends it before.

    Args:
        make: Makes the pieces, until the event is set.
        wake: Lets an answer that waits for its turn see that it was cancelled.
        done: Called with the whole answer when it has ended.

    Attributes:
        ended: Whether there are no more pieces.

    Example:
        `for piece in pipeline(question, stream=True): print(piece.text, end="")`
    """

    def __init__(
        self,
        make: Callable[[threading.Event], Iterator[Piece]],
        wake: Callable[[], None],
        done: Callable[[Answer], None] | None = None,
    ) -> None:
        self.ended = False
        self._cancelled = threading.Event()
        self._pieces = make(self._cancelled)  # which knows not this stream: unread, both go at once
        self._wake, self._done = wake, done
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._answer: Answer | None = None

    def __next__(self) -> Piece:
        try:
            piece = next(self._pieces)
        except BaseException:
            self.ended = True
            raise
        self._texts.append(piece.text)
        self._ids += piece.token_ids
        if piece.finish_reason is not None and piece.timings is not None:
            self._answer = Answer("".join(self._texts), tuple(self._ids), piece.finish_reason, piece.timings)
            self.close()
            if self._done is not None:
                self._done(self._answer)
        return piece

    def cancel(self) -> None:
        """End the answer after the token that is being computed; from any thread. Its last piece says so."""
        self._cancelled.set()
        self._wake()

    def close(self) -> None:
        """End the answer at once, without a last piece; from the thread that reads it."""
        self.ended = True
        close: Callable[[], None] = getattr(self._pieces, "close", lambda: None)
        close()

    def answer(self) -> Answer:
        """Read to the end; the whole answer.

        Raises:
            InputError: If it was closed before its end.
        """
        for _ in self:
            pass
        if self._answer is None:
            raise InputError("This answer was closed before its end.", "Ask again.")
        return self._answer

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
