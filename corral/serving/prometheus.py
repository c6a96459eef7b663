"""What a server counts, as Prometheus reads it. Its labels are routes, statuses and the names of models: it knows neither keys
nor prompts, and keeps nothing outside itself, so that several servers in one process stay apart.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from corral.serving.http_responses import Outcome
from corral.serving.protocol import Usage
from corral.serving.request_queue import Places

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The figures of one server.

    Args:
        places: the queue whose length is shown.
    """

    def __init__(self, places: Places) -> None:
        self.registry = CollectorRegistry()
        waiting = Gauge("corral_requests_waiting", "Requests in the queue.", registry=self.registry)
        waiting.set_function(lambda: places.waiting)
        inside = Gauge("corral_requests_in_flight", "Requests that are worked on.", registry=self.registry)
        inside.set_function(lambda: places.inside)
        self._answers = Counter(
            "corral_http_answers", "HTTP answers, by route and status.", ["route", "status"], registry=self.registry
        )
        self._worked = Counter(
            "corral_requests",
            "Requests that were worked on, by their end.",
            ["model", "outcome"],
            registry=self.registry,
        )
        self._prompt = Counter("corral_prompt_tokens", "Tokens of prompts.", ["model"], registry=self.registry)
        self._completion = Counter("corral_completion_tokens", "Tokens drawn.", ["model"], registry=self.registry)
        self._queue = self._histogram("corral_queue_seconds", "Time in the queue.")
        self._first = self._histogram("corral_time_to_first_token_seconds", "Time to a stream's first token.", "model")
        self._latency = self._histogram("corral_request_seconds", "Time from a request's arrival to its end.", "model")

    def answered(self, route: str, status: int) -> None:
        """An HTTP answer was begun."""
        self._answers.labels(route, str(status)).inc()

    def entered(self, seconds: float) -> None:
        """A request got its place, after so long."""
        self._queue.observe(seconds)

    def began(self, model: str, seconds: float) -> None:
        """A stream's first token is there, so long after the request came."""
        self._first.labels(model).observe(seconds)

    def ended(self, model: str, outcome: Outcome, seconds: float, usage: Usage) -> None:
        """A request that was worked on is over, so long after it came."""
        self._worked.labels(model, outcome).inc()
        self._latency.labels(model).observe(seconds)
        self._prompt.labels(model).inc(usage.prompt_tokens)
        self._completion.labels(model).inc(usage.completion_tokens)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format 0.0.4."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, what: str, *labels: str) -> Histogram:
        return Histogram(name, what, labels, buckets=_SECONDS, registry=self.registry)
