"""Answers for an event loop: each is made in a thread, and the number that run or wait is limited."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from qe_edge.runtime.answer_stream import AnswerStream
from qe_edge.runtime.answers import Piece
from qe_edge.runtime.pipeline import Pipeline
from qe_edge.server.errors import RequestError, as_request_error
from qe_edge.server.settings import ServerSettings
from qe_edge.system.errors import QEError

LONGEST_RETRY = 60


class Job:
    """One answer; its pieces arrive in the event loop.

    Args:
        begin: Makes the stream; runs in the thread.
        seconds: Time after which the answer is given up.

    Example:
        >>> from qe_edge.runtime.answers import Piece
        >>> async def whole() -> str:
        ...     pieces = [Piece("yes", (9,)), Piece(".", (3,))]  # stand for the stream of a pipeline
        ...     job = Job(begin=lambda: pieces, seconds=10)
        ...     asyncio.get_running_loop().run_in_executor(None, job.run)
        ...     text = ""
        ...     while (piece := await job.next()) is not None:
        ...         text += piece.text
        ...     return text
        >>> asyncio.run(whole())
        'yes.'
    """

    def __init__(self, begin: Callable[[], AnswerStream], seconds: float) -> None:
        self._begin = begin
        self._loop = asyncio.get_running_loop()
        self._found: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        self._end = time.monotonic() + seconds
        self._stream: AnswerStream | None = None
        self._cancelled = threading.Event()

    def run(self) -> None:
        """Make the answer; runs in a thread of its own."""
        try:
            if self._cancelled.is_set():
                return
            self._stream = self._begin()
            if self._cancelled.is_set():  # in the meantime
                self._stream.cancel()
            for piece in self._stream:
                self._put(piece)
        except Exception as error:  # noqa: BLE001 - whoever waits for the pieces raises it
            self._put(error)
        finally:
            self._put(None)

    def cancel(self) -> None:
        """End the answer after the token that is being computed."""
        self._cancelled.set()
        if self._stream is not None:
            self._stream.cancel()

    async def next(self) -> Piece | None:
        """The next piece; None after the last one.

        Raises:
            RequestError: If the answer cannot be made, or takes too long.
        """
        try:
            found = await asyncio.wait_for(self._found.get(), max(self._end - time.monotonic(), 0.001))
        except asyncio.TimeoutError as error:
            self.cancel()
            raise RequestError(504, "The answer takes too long. Ask for fewer tokens or a smaller picture.") from error
        if isinstance(found, QEError):
            raise as_request_error(found) from found
        if isinstance(found, Exception):
            raise found
        return found

    def _put(self, found: Piece | Exception | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._found.put_nowait, found)


class Jobs:
    """Takes requests up to the number that may run or wait, and refuses more.

    Args:
        pipeline: Makes the answers.
        settings: Limits.

    Example:
        >>> from types import SimpleNamespace
        >>> from qe_edge.runtime.answers import Piece
        >>> async def first() -> str:
        ...     pipeline = SimpleNamespace(slots=1)  # stands for a pipeline that answers one request at a time
        ...     jobs = Jobs(pipeline, ServerSettings(model="demo", queue=4))
        ...     job = jobs.start(lambda: [Piece("yes", (9,))])
        ...     print(jobs.running, jobs.waiting)
        ...     return (await job.next()).text
        >>> asyncio.run(first())
        1 0
        'yes'
    """

    def __init__(self, pipeline: Pipeline, settings: ServerSettings) -> None:
        self._pipeline, self._settings = pipeline, settings
        self._most = pipeline.slots + settings.queue
        self._threads = ThreadPoolExecutor(self._most, thread_name_prefix="answer")
        self._taken: set[Job] = set()
        self._usual = 1.0  # seconds of an answer, a moving mean

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a slot."""
        return max(len(self._taken) - self._pipeline.slots, 0)

    @property
    def running(self) -> int:
        """Number of requests that are being answered."""
        return min(len(self._taken), self._pipeline.slots)

    def start(self, begin: Callable[[], AnswerStream]) -> Job:
        """Take a request.

        Raises:
            RequestError: With status 429, if too many requests wait already.
        """
        if len(self._taken) >= self._most:
            seconds = math.ceil(self._usual * (1 + self.waiting / self._pipeline.slots))
            raise RequestError(
                429,
                f"{self.waiting} requests wait already. Try again later.",
                {"Retry-After": str(min(max(seconds, 1), LONGEST_RETRY))},
            )
        job = Job(begin, self._settings.answer_seconds)
        self._taken.add(job)
        started = time.monotonic()
        future = asyncio.get_running_loop().run_in_executor(self._threads, job.run)

        def ended(_future: object) -> None:
            self._taken.discard(job)
            self._usual += 0.1 * (time.monotonic() - started - self._usual)

        future.add_done_callback(ended)
        return job

    def stop(self) -> None:
        """Cancel all requests that run or wait, and wait for the threads."""
        for job in tuple(self._taken):  # the event loop takes out those that end
            job.cancel()
        self._threads.shutdown(wait=True)
