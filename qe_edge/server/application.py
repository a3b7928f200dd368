"""The HTTP interface: `/v1/chat/completions`, `/v1/models`, `/health` and `/metrics`."""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.requests import ClientDisconnect

from qe_edge.models.messages import plain_text, read_messages, read_turns
from qe_edge.runtime.answer_stream import AnswerStream
from qe_edge.runtime.answers import Piece, Timings
from qe_edge.runtime.pipeline import Pipeline
from qe_edge.server.errors import RequestError
from qe_edge.server.jobs import Job, Jobs
from qe_edge.server.metrics import Metrics
from qe_edge.server.pictures import bounded, check_videos, picture_source
from qe_edge.server.schema import ChatRequest, choice, conversation, read_request, usage
from qe_edge.server.settings import ServerSettings
from qe_edge.system.errors import InputError

CHECK_SECONDS = 0.25  # between two checks whether the client is still there
GONE = 499  # the status that proxies use for a client that closed the connection


class ChatServer:
    """Answers requests with one pipeline.

    Args:
        pipeline: The model.
        settings: Limits.

    Attributes:
        stopping: Whether new requests are refused.

    Example:
        >>> import uvicorn  # doctest: +SKIP
        >>> from qe_edge import Pipeline  # doctest: +SKIP
        >>> pipeline = Pipeline.from_dir("out/demo/engines/cpu")  # doctest: +SKIP
        >>> server = ChatServer(pipeline, ServerSettings(model="demo"))  # doctest: +SKIP
        >>> uvicorn.run(server.application(), host="127.0.0.1", port=8000)  # doctest: +SKIP
    """

    def __init__(self, pipeline: Pipeline, settings: ServerSettings) -> None:
        self.stopping = False
        self._pipeline, self._settings = pipeline, settings
        self._jobs = Jobs(pipeline, settings)
        self._metrics = Metrics(
            lambda: self._jobs.running, lambda: self._jobs.waiting, lambda: pipeline.remembered_bytes
        )
        self._open_source = picture_source(settings)
        self._created = int(time.time())

    def application(self) -> FastAPI:
        """Build the application with its routes."""

        @asynccontextmanager
        async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
            yield
            await asyncio.get_running_loop().run_in_executor(None, self._jobs.stop)

        app = FastAPI(title="QE-Edge", openapi_url=None, lifespan=lifespan)
        app.add_exception_handler(RequestError, _refused)
        guarded = APIRouter(dependencies=[Depends(self._check_key)])
        guarded.post("/v1/chat/completions")(self.complete)
        guarded.get("/v1/models")(self.models)
        guarded.get("/metrics")(self.metrics)
        app.include_router(guarded)
        app.get("/health")(self.health)
        return app

    async def _check_key(self, request: Request) -> None:
        key = self._settings.api_key
        sent = request.headers.get("authorization", "")
        if key is not None and not hmac.compare_digest(sent.encode(), f"Bearer {key}".encode()):
            raise RequestError(401, "The API key is missing or wrong. Send the right one as a bearer token.")

    async def health(self) -> Response:
        """Report whether requests are taken."""
        return JSONResponse({"status": "stopping" if self.stopping else "ok"}, 503 if self.stopping else 200)

    async def metrics(self) -> Response:
        """Return the counters for Prometheus."""
        return PlainTextResponse(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self) -> dict[str, Any]:
        """List the one model."""
        entry = {"id": self._settings.model, "object": "model", "created": self._created, "owned_by": "qe-edge"}
        return {"object": "list", "data": [entry]}

    async def complete(self, request: Request) -> Response:
        """Answer a conversation, whole or piece by piece."""
        job: Job | None = None
        gone: asyncio.Task[None] | None = None
        try:
            asked = await self._read(request)
            gone = asyncio.create_task(_until_gone(request))
            job = self._jobs.start(lambda: self._begin(asked))
            first = await _next(job, gone)
            identity = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.model}
            if asked.stream:  # an error before the first piece still sets the HTTP status
                events = self._events(job, first, identity, asked)
                return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
            return await self._whole(job, first, identity, gone)
        except BaseException as error:
            self._count_failure(job, error)
            if self.stopping and isinstance(error, asyncio.CancelledError):  # the time of grace is over
                raise _stopping() from error
            raise
        finally:
            if gone is not None:
                gone.cancel()

    async def _read(self, request: Request) -> ChatRequest:
        if self.stopping:
            raise _stopping()
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "The request is no JSON. Send it with 'Content-Type: application/json'.")
        try:
            body = await asyncio.wait_for(self._body(request), self._settings.request_seconds)
        except asyncio.TimeoutError as error:
            raise RequestError(408, "The request did not arrive in time. Send it again.") from error
        except ClientDisconnect as error:
            raise _gone() from error
        asked = read_request(body)
        if asked.model != self._settings.model:
            raise RequestError(404, f"There is no such model here. Ask for '{self._settings.model}'.")
        return asked

    async def _body(self, request: Request) -> bytes:
        most = self._settings.max_request_bytes
        body = bytearray()
        too_large = RequestError(413, f"The request has more than {most} bytes. Send smaller pictures.")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise too_large
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise too_large
        return bytes(body)

    def _begin(self, asked: ChatRequest) -> AnswerStream:
        """Begin an answer; runs in the thread of the job."""
        messages = conversation(asked)
        _, places = read_turns(messages, "messages", plain_text)
        named = [place.source for place in places if place.source is not None]
        count = sum(len(source) if isinstance(source, list) else 1 for source in named)  # every frame of a list is one
        most = self._settings.max_pictures
        if count > most:
            raise InputError(f"The request has {count} pictures.", f"Send at most {most}.")
        open_source = bounded(self._open_source, self._settings.max_pixels)
        sample = read_messages(messages, open_source=open_source)
        check_videos(sample.videos, self._settings.max_pixels)
        return self._pipeline(sample, stream=True, **asked.options)

    async def _whole(
        self, job: Job, piece: Piece | None, identity: dict[str, Any], gone: asyncio.Task[None]
    ) -> Response:
        """Send the whole answer at once."""
        text = ""
        last = piece
        while piece is not None:
            text += piece.text
            last = piece
            piece = await _next(job, gone)
        reason, timings = _end(last)
        self._metrics.count("answered", timings)
        message = choice("message", {"role": "assistant", "content": text}, reason)
        return JSONResponse({**identity, "object": "chat.completion", "choices": [message], "usage": usage(timings)})

    async def _events(
        self, job: Job, piece: Piece | None, identity: dict[str, Any], asked: ChatRequest
    ) -> AsyncIterator[str]:
        """Send the answer piece by piece, as server-sent events."""
        chunk = {**identity, "object": "chat.completion.chunk"}
        try:
            yield _event({**chunk, "choices": [choice("delta", {"role": "assistant", "content": ""}, None)]})
            last = piece
            while piece is not None:
                if piece.text:
                    yield _event({**chunk, "choices": [choice("delta", {"content": piece.text}, None)]})
                last = piece
                piece = await job.next()
            reason, timings = _end(last)
            yield _event({**chunk, "choices": [choice("delta", {}, reason)]})
            if asked.stream_options is not None and asked.stream_options.include_usage:
                yield _event({**chunk, "choices": [], "usage": usage(timings)})
            yield "data: [DONE]\n\n"
            self._metrics.count("answered", timings)
        except RequestError as error:
            self._count_failure(job, error)
            yield _event(error.body)
        except BaseException as error:
            self._count_failure(job, error)
            raise

    def _count_failure(self, job: Job | None, error: BaseException) -> None:
        if job is not None:
            job.cancel()
        if not isinstance(error, RequestError):
            gone = isinstance(error, asyncio.CancelledError | GeneratorExit)
            self._metrics.count("disconnected" if gone else "failed")
        elif error.status == GONE:
            self._metrics.count("disconnected")
        else:
            outcomes = {429: "busy", 503: "busy", 504: "timeout"}
            self._metrics.count(outcomes.get(error.status, "refused" if error.status < 500 else "failed"))


async def _until_gone(request: Request) -> None:
    """Return when the client does not wait any longer."""
    while not await request.is_disconnected():
        await asyncio.sleep(CHECK_SECONDS)


async def _next(job: Job, gone: asyncio.Task[None]) -> Piece | None:
    """The next piece.

    Raises:
        RequestError: As `Job.next`, and if the client is gone.
    """
    piece = asyncio.ensure_future(job.next())
    await asyncio.wait({piece, gone}, return_when=asyncio.FIRST_COMPLETED)
    if not piece.done():
        piece.cancel()
        raise _gone()
    return piece.result()


def _end(last: Piece | None) -> tuple[str, Timings]:
    if last is None or last.timings is None or last.finish_reason in (None, "cancelled"):
        raise _stopping()
    return str(last.finish_reason), last.timings


def _gone() -> RequestError:
    return RequestError(GONE, "The client is gone. Nobody reads this.")


def _stopping() -> RequestError:
    return RequestError(503, "The server is stopping. Ask another one.", {"Retry-After": "5"})


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


async def _refused(_request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestError):
        raise error
    return JSONResponse(error.body, error.status, error.headers)
