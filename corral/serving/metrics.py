"""Prometheus metrics of one server.

Labels are routes, statuses, and names of models, replicas and keys, never secrets or prompts. Each server has its registry,
so several servers in one process do not mix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from corral.engines.base import Engine
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
        ProcessCollector(registry=self.registry)  # memory, CPU time and open files, on Linux
        self._responses = self._counter("corral_http_answers", "HTTP answers, by route and status.", "route", "status")
        self._requests = self._counter(
            "corral_requests", "Requests that were worked on, by their end.", "model", "outcome"
        )
        self._prompt_tokens = self._counter("corral_prompt_tokens", "Tokens of prompts.", "model")
        self._completion_tokens = self._counter("corral_completion_tokens", "Tokens drawn.", "model")
        self._key_requests = self._counter("corral_key_requests", "Requests that were worked on, by key.", "key")
        self._key_tokens = self._counter("corral_key_tokens", "Tokens of prompts and answers, by key.", "key")
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

    def count_request(self, model: str, key: str, outcome: Outcome, seconds: float, usage: Usage) -> None:
        """A request of the key of this name, that was worked on, finished this long after it arrived."""
        self._requests.labels(model, outcome).inc()
        self._request_seconds.labels(model).observe(seconds)
        self._prompt_tokens.labels(model).inc(usage.prompt_tokens)
        self._completion_tokens.labels(model).inc(usage.completion_tokens)
        self._key_requests.labels(key).inc()
        self._key_tokens.labels(key).inc(usage.total_tokens)

    def watch(self, engines: Callable[[], Mapping[str, Engine]]) -> None:
        """Show the state of the engines of all models, by name, and of their replicas."""
        self.registry.register(_EngineCollector(engines))

    def render(self) -> bytes:
        """All metrics in Prometheus' text format 0.0.4."""
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(name, what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, *labels: str) -> Histogram:
        return Histogram(name, what, labels, buckets=_SECONDS, registry=self.registry)


class _EngineCollector(Collector):
    """Reads the state of engines when metrics are read."""

    def __init__(self, engines: Callable[[], Mapping[str, Engine]]) -> None:
        self._engines = engines

    def collect(self) -> Iterable[Metric]:
        """The metrics now."""
        ready = GaugeMetricFamily("corral_engine_ready", "1 if the model's engine can compute.", labels=["model"])
        restarts = CounterMetricFamily("corral_engine_restarts", "Restarts of the engine's process.", labels=["model"])
        up = GaugeMetricFamily("corral_replica_up", "1 if a replica takes requests.", labels=["model", "replica"])
        for model, engine in self._engines().items():
            ready.add_metric([model], engine.ready)
            restarts.add_metric([model], engine.restarts)
            states = {_address(replica.url): replica.fault is None for replica in engine.replicas}
            for address, is_up in states.items():
                up.add_metric([model, address], is_up)
        return ready, restarts, up


def _address(url: str) -> str:
    """A URL without user, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
