"""Prometheus metrics of one server.

Labels are routes, statuses and names of served models, never keys or prompts. Each server has a registry of its own, so
several servers in one process do not mix.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from corral.serving.protocol import Usage
from corral.serving.request_queue import RequestQueue
from corral.serving.streams import Outcome

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The metrics of one server.

    Args:
        queue: whose length is shown.
    """

    def __init__(self, queue: RequestQueue) -> None:
        self.registry = CollectorRegistry()
        waiting = Gauge("corral_requests_waiting", "Requests in the queue.", registry=self.registry)
        waiting.set_function(lambda: queue.waiting)
        running = Gauge("corral_requests_in_flight", "Requests that are worked on.", registry=self.registry)
        running.set_function(lambda: queue.running)
        self._responses = self._counter("corral_http_answers", "HTTP answers, by route and status.", "route", "status")
        self._requests = self._counter(
            "corral_requests", "Requests that were worked on, by their end.", "model", "outcome"
        )
        self._prompt_tokens = self._counter("corral_prompt_tokens", "Tokens of prompts.", "model")
        self._completion_tokens = self._counter("corral_completion_tokens", "Tokens drawn.", "model")
        self._queue_seconds = self._histogram("corral_queue_seconds", "Time in the queue.")
        self._first_token_seconds = self._histogram(
            "corral_time_to_first_token_seconds", "Time to a stream's first token.", "model"
        )
        self._request_seconds = self._histogram(
            "corral_request_seconds", "Time from a request's arrival to its end.", "model"
        )

    def count_response(self, route: str, status: int) -> None:
        """Count an HTTP response."""
        self._responses.labels(route, str(status)).inc()

    def observe_queue_time(self, seconds: float) -> None:
        """A request waited this long in the queue."""
        self._queue_seconds.observe(seconds)

    def observe_first_token(self, model: str, seconds: float) -> None:
        """A stream's first token was ready this long after the request arrived."""
        self._first_token_seconds.labels(model).observe(seconds)

    def count_request(self, model: str, outcome: Outcome, seconds: float, usage: Usage) -> None:
        """A request that was worked on finished this long after it arrived."""
        self._requests.labels(model, outcome).inc()
        self._request_seconds.labels(model).observe(seconds)
        self._prompt_tokens.labels(model).inc(usage.prompt_tokens)
        self._completion_tokens.labels(model).inc(usage.completion_tokens)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format 0.0.4."""
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(name, what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, *labels: str) -> Histogram:
        return Histogram(name, what, labels, buckets=_SECONDS, registry=self.registry)
