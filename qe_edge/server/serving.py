"""Run the HTTP server until a signal stops it; running answers are finished first."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from qe_edge.runtime.pipeline import Pipeline
from qe_edge.server.application import ChatServer
from qe_edge.server.settings import ServerSettings
from qe_edge.system.errors import InputError

CONNECTIONS = 256  # beyond the connections of requests that run or wait
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Uvicorn(uvicorn.Server):
    """Ends without an error when SIGTERM or Ctrl-C ask for it; Ctrl-C twice ends at once."""

    def __init__(self, config: uvicorn.Config, server: ChatServer, ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self._chat, self._ready = server, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take requests, and report the address."""
        await super().startup(sockets)
        if self.started and sockets:
            host, port, *_ = sockets[0].getsockname()
            self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1")

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at a signal; uvicorn itself would raise it again at the end."""
        if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
            yield
            return
        earlier = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no more requests, and finish the ones that were taken."""
        self._chat.stopping = True
        super().handle_exit(sig, frame)


def serve(pipeline: Pipeline, settings: ServerSettings, listening: socket.socket, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        pipeline: The model.
        settings: Limits.
        listening: The socket, from `listen`.
        ready: Called with the server's address when it takes requests.

    Example:
        >>> from qe_edge import Pipeline  # doctest: +SKIP
        >>> pipeline = Pipeline.from_dir("out/demo/engines/cpu")  # doctest: +SKIP
        >>> settings = ServerSettings(model="demo")  # doctest: +SKIP
        >>> serve(pipeline, settings, listen("127.0.0.1", 8000), ready=print)  # doctest: +SKIP
    """
    server = ChatServer(pipeline, settings)
    config = uvicorn.Config(
        server.application(),
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=pipeline.slots + settings.queue + CONNECTIONS,
        timeout_graceful_shutdown=max(1, round(settings.grace_seconds)),
        timeout_keep_alive=30,
    )
    _Uvicorn(config, server, ready).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Open a socket that listens.

    Args:
        host: Address of this machine.
        port: Its port; 0 for any free one.

    Raises:
        InputError: If the address is not available.

    Example:
        >>> listening = listen("127.0.0.1", port=0)
        >>> listening.getsockname()[0]
        '127.0.0.1'
        >>> listening.close()
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=256)
    except OSError as error:
        why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise InputError(
            f"The server cannot listen on {host}, port {port}: {why}.",
            "Choose another --port, or an address of this machine as --host.",
        ) from error
