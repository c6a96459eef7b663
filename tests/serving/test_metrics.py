"""What a server counts, read as Prometheus reads it."""

from __future__ import annotations

import http.client
import json
from urllib.parse import urlsplit

import httpx2
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from corral.engines.base import ReplicaHealth
from corral.engines.scripted import ScriptedEngine
from corral.serving.admission import Admission, ServerLimits
from corral.serving.keys import KeyStore
from corral.serving.metrics import Metrics
from corral.serving.request_queue import RequestQueue
from tests.serving.conftest import ASKED, CHAT, JSON, Endless, RunningServer, Serve, bearer, wait_for


def read_samples(text: str) -> dict[str, float]:
    """Each sample by its name and labels, as `name{a=b,c=d}`."""
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}"] = sample.value
    return samples


def fetch_samples(server: RunningServer) -> dict[str, float]:
    response = httpx2.get(f"{server.url}/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return read_samples(response.text)


def test_responses_tokens_times_and_finish_reasons_are_counted(serve: Serve) -> None:
    server = serve("one two three")
    drawn = len(serve.template.tokenizer("one two three").input_ids)
    answer = server.client.chat.completions.create(model="m", messages=ASKED)
    server.chat(stream=True)
    server.call("GET", "/v1/models/nobody's")
    server.call("GET", "/elsewhere")
    server.call("POST", CHAT, "{")
    samples = fetch_samples(server)
    assert answer.usage
    assert samples["corral_prompt_tokens_total{model=m}"] == 2 * answer.usage.prompt_tokens
    assert samples["corral_completion_tokens_total{model=m}"] == 2 * drawn == 2 * answer.usage.completion_tokens
    assert samples["corral_requests_total{model=m,outcome=ended}"] == 2
    assert samples["corral_request_seconds_count{model=m}"] == 2
    assert samples["corral_time_to_first_token_seconds_count{model=m}"] == 1, "of streams alone"
    assert samples["corral_queue_seconds_count{}"] == 2
    assert samples["corral_http_answers_total{route=/v1/chat/completions,status=200}"] == 2
    assert samples["corral_http_answers_total{route=/v1/chat/completions,status=400}"] == 1
    assert samples["corral_http_answers_total{route=none,status=404}"] == 1
    assert samples["corral_http_answers_total{route=/v1/models/{name:path},status=404}"] == 1
    assert (samples["corral_requests_waiting{}"], samples["corral_requests_in_flight{}"]) == (0, 0)


def test_queue_length_and_client_disconnects_are_reported(serve: Serve) -> None:
    endless = Endless()
    server = serve(endless.engine, Admission(ServerLimits(at_once=2)))
    connections = [http.client.HTTPConnection(urlsplit(server.url).netloc) for _ in range(5)]
    for connection in connections:
        connection.request("POST", CHAT, json.dumps({"model": "m", "messages": ASKED, "stream": True}), JSON)

    def running_and_waiting() -> tuple[float, float]:
        samples = fetch_samples(server)
        return samples["corral_requests_in_flight{}"], samples["corral_requests_waiting{}"]

    assert wait_for(lambda: running_and_waiting() == (2, 3))
    for connection in connections:
        connection.close()
    assert wait_for(lambda: running_and_waiting() == (0, 0))
    assert fetch_samples(server)["corral_requests_total{model=m,outcome=gone}"] >= 2
    assert endless.drawn


def test_client_text_does_not_become_a_metric_label(serve: Serve) -> None:
    server = serve("a")
    fetch_samples(server)
    before = len(fetch_samples(server))
    for i in range(20):
        server.chat(model=f"made up {i}")
        server.call("GET", f"/made/up/{i}")
        server.call("GET", f"/v1/models/{i}")
    samples = fetch_samples(server)
    assert len(samples) <= before + 3 * 2, "a route and a status each, and when it was first seen"
    assert not any("made" in name for name in samples)


class Remote(ScriptedEngine):
    """An engine that was restarted, one of whose replicas is down."""

    restarts = 2
    replicas = (ReplicaHealth("http://user:secret@a:1/v1?secret", None), ReplicaHealth("http://b:1/v1", "unreachable"))


def test_engines_replicas_and_memory_are_reported(serve: Serve) -> None:
    server = serve(Remote([40]))
    samples = fetch_samples(server)
    assert samples["corral_engine_ready{model=m}"] == 1
    assert samples["corral_engine_restarts_total{model=m}"] == 2
    assert samples["corral_replica_up{model=m,replica=http://a:1/v1}"] == 1
    assert samples["corral_replica_up{model=m,replica=http://b:1/v1}"] == 0
    assert samples["process_resident_memory_bytes{}"] > 2**20


def test_use_is_counted_by_the_name_of_the_key(serve: Serve, keys: KeyStore) -> None:
    admission = Admission(keys=keys)
    server = serve("Hello", admission)
    secrets = [keys.add(name)[1] for name in ("alice", "bob")]
    answers = [server.chat(bearer(secret))[1] for secret in secrets]
    samples = read_samples(admission.metrics.render().decode())
    for name, answer in zip(("alice", "bob"), answers, strict=True):
        assert samples[f"corral_key_requests_total{{key={name}}}"] == 1
        assert samples[f"corral_key_tokens_total{{key={name}}}"] == answer["usage"]["total_tokens"]


def test_two_servers_in_one_process_have_separate_metrics() -> None:
    one, other = Metrics(RequestQueue(1, 1)), Metrics(RequestQueue(1, 1))
    one.count_response("/a", 200)
    assert "corral_http_answers_total{route=/a,status=200}" in read_samples(one.render().decode())
    assert "/a" not in other.render().decode()
    assert not any(family.name.startswith("corral") for family in REGISTRY.collect())
