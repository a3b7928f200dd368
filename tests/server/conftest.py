"""A server on a free port of this machine, in a thread of the tests; its client is OpenAI's own."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import openai
import pytest
import uvicorn

from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.pipeline import Pipeline
from qe_edge.server.application import ChatServer
from qe_edge.server.serving import listen
from qe_edge.server.settings import ServerSettings
from tests.conftest import Exported

MODEL = "shapes"
CONTEXT = 512


@dataclass(frozen=True)
class Served:
    """A server that runs.

    Attributes:
        client: OpenAI's client for it.
        port: Its port.
        server: What answers.
    """

    client: openai.OpenAI
    port: int
    server: ChatServer

    def count(self, line: str) -> float:
        """A line of its metrics."""
        text = self.server._metrics.text().decode()
        return next((float(found.split()[-1]) for found in text.splitlines() if found.startswith(line)), 0.0)


@contextmanager
def serving(engine: VisionLanguageEngine, slots: int = 1, key: str = "none", **limits: object) -> Iterator[Served]:
    """Serve with these limits."""
    server = ChatServer(Pipeline(engine, slots=slots), ServerSettings(MODEL, **limits))  # type: ignore[arg-type]
    config = uvicorn.Config(server.application(), log_level="warning", timeout_graceful_shutdown=5)
    with listen("127.0.0.1", 0) as listening:
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        port = listening.getsockname()[1]
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=60)
        try:
            with client:
                yield Served(client, port, server)
        finally:
            running.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def engine(exported: Exported) -> VisionLanguageEngine:
    """One whose answers fill the context."""
    engine = VisionLanguageEngine.load(exported.onnx, threads=1, max_context=CONTEXT)
    rules = engine.manifest.generation.model_copy(update={"min_new_tokens": CONTEXT})
    manifest = engine.manifest.model_copy(update={"generation": rules})
    parts = (engine.family, engine.processor, engine._embedding, engine._sessions)
    return VisionLanguageEngine(manifest, *parts, max_context=CONTEXT)


@pytest.fixture(scope="session")
def slow(engine: VisionLanguageEngine) -> VisionLanguageEngine:
    """One whose answers take some 20 seconds."""
    slow = copy.copy(engine)

    def extend(*arguments: object, **options: object) -> np.ndarray:
        time.sleep(0.04)
        return engine.extend(*arguments, **options)  # type: ignore[arg-type]

    slow.extend = extend  # type: ignore[method-assign]
    return slow


@pytest.fixture(scope="session")
def served(engine: VisionLanguageEngine) -> Iterator[Served]:
    """Two slots, usual limits."""
    with serving(engine, slots=2) as found:
        yield found
