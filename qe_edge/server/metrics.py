"""Counters of a server in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from qe_edge.runtime.answers import Timings

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counters of one server.

    Args:
        running: Returns the number of answers that run.
        waiting: Returns the number of requests that wait.
        picture_bytes: Returns the memory of the pictures that are remembered.

    Example:
        >>> metrics = Metrics(running=lambda: 1, waiting=lambda: 0, picture_bytes=lambda: 0)
        >>> metrics.count("answered")
        >>> lines = metrics.text().decode().splitlines()
        >>> [line for line in lines if line.startswith("qe_edge_r") and "created" not in line]
        ['qe_edge_requests_total{outcome="answered"} 1.0', 'qe_edge_running 1.0']
    """

    def __init__(
        self, running: Callable[[], float], waiting: Callable[[], float], picture_bytes: Callable[[], float]
    ) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "qe_edge_requests", "Requests of answers by outcome.", ["outcome"], registry=self._registry
        )
        self._tokens = Counter("qe_edge_tokens", "Tokens by kind.", ["kind"], registry=self._registry)
        self._first = Histogram(
            "qe_edge_first_token_seconds", "Seconds to the first token.", buckets=SECONDS, registry=self._registry
        )
        self._whole = Histogram(
            "qe_edge_answer_seconds", "Seconds to the last token.", buckets=SECONDS, registry=self._registry
        )
        for name, help_text, ask in (
            ("running", "Answers that run.", running),
            ("waiting", "Requests that wait.", waiting),
            ("picture_bytes", "Memory of pictures that are remembered.", picture_bytes),
        ):
            Gauge(f"qe_edge_{name}", help_text, registry=self._registry).set_function(ask)

    def count(self, outcome: str, timings: Timings | None = None) -> None:
        """Count a request that has ended."""
        self._requests.labels(outcome).inc()
        if timings is not None:
            self._tokens.labels("prompt").inc(timings.prompt_tokens)
            self._tokens.labels("reused").inc(timings.reused_tokens)
            self._tokens.labels("answer").inc(timings.answer_tokens)
            self._first.observe(timings.first_token)
            self._whole.observe(timings.first_token + timings.decode)

    def text(self) -> bytes:
        """Return all counters as text."""
        return generate_latest(self._registry)
