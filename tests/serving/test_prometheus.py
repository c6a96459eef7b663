"""What a server counts, read as Prometheus reads it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from urllib.parse import urlsplit

from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from corral.answering.answerer import Answerer
from corral.serving.admission import Admission, ServerLimits
from corral.serving.generation import ServedModel
from corral.serving.prometheus import Metrics
from corral.serving.request_queue import RequestQueue
from corral.template import Template
from tests.serving.conftest import Endless, openai_client, serve_in_thread
from tests.serving.test_app import ASKED, CHAT, call, wait_for


def figures(url: str) -> dict[str, float]:
    """Each sample by its name and labels, as `name{a=b,c=d}`."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    assert str(answer.headers["content-type"]).startswith("text/plain; version=0.0.4")
    text = answer.read().decode()
    connection.close()
    return read(text)


def read(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_responses_tokens_times_and_finish_reasons_are_counted(scripted_model: Callable[..., ServedModel]) -> None:
    served = scripted_model("one two three")
    drawn = len(served.answerer.template.tokenizer("one two three").input_ids)
    with serve_in_thread(served) as url, openai_client(url) as client:
        answer = client.chat.completions.create(model="scripted", messages=ASKED)
        list(client.chat.completions.create(model="scripted", messages=ASKED, stream=True))
        call(url, "GET", "/v1/models/nobody's")
        call(url, "GET", "/elsewhere")
        call(url, "POST", CHAT, "{")
        found = figures(url)
    assert answer.usage
    of_model = "{model=scripted}"
    assert found[f"corral_prompt_tokens_total{of_model}"] == 2 * answer.usage.prompt_tokens
    assert found[f"corral_completion_tokens_total{of_model}"] == 2 * drawn == 2 * answer.usage.completion_tokens
    assert found["corral_requests_total{model=scripted,outcome=ended}"] == 2
    assert found[f"corral_request_seconds_count{of_model}"] == 2
    assert found[f"corral_time_to_first_token_seconds_count{of_model}"] == 1, "of streams alone"
    assert found["corral_queue_seconds_count{}"] == 2
    assert found["corral_http_answers_total{route=/v1/chat/completions,status=200}"] == 2
    assert found["corral_http_answers_total{route=/v1/chat/completions,status=400}"] == 1
    assert found["corral_http_answers_total{route=none,status=404}"] == 1
    assert found["corral_http_answers_total{route=/v1/models/{name:path},status=404}"] == 1
    assert (found["corral_requests_waiting{}"], found["corral_requests_in_flight{}"]) == (0, 0)


def test_queue_length_and_client_disconnects_are_reported(tiny_template: Template) -> None:
    endless = Endless()
    served = ServedModel(Answerer(endless.engine, tiny_template), "m")
    asked = json.dumps({"model": "m", "messages": ASKED, "stream": True})
    with serve_in_thread(served, admission=Admission(ServerLimits(at_once=2))) as url:
        connections = [http.client.HTTPConnection(urlsplit(url).netloc) for _ in range(5)]
        for connection in connections:
            connection.request("POST", CHAT, asked, {"content-type": "application/json"})

        def state() -> tuple[float, float]:
            found = figures(url)
            return found["corral_requests_in_flight{}"], found["corral_requests_waiting{}"]

        assert wait_for(lambda: state() == (2, 3))
        for connection in connections:
            connection.close()
        assert wait_for(lambda: state() == (0, 0))
        assert figures(url)["corral_requests_total{model=m,outcome=gone}"] >= 2
    assert endless.drawn


def test_client_text_does_not_become_a_metric_label(scripted_model: Callable[..., ServedModel]) -> None:
    with serve_in_thread(scripted_model("a")) as url:
        figures(url)
        before = len(figures(url))
        for i in range(20):
            call(url, "POST", CHAT, json.dumps({"model": f"made up {i}", "messages": ASKED}))
            call(url, "GET", f"/made/up/{i}")
            call(url, "GET", f"/v1/models/{i}")
        found = figures(url)
    assert len(found) <= before + 3 * 2, "a route and a status each, and when it was first seen"
    assert not any("made" in name for name in found)


def test_two_servers_in_one_process_have_separate_metrics() -> None:
    one, other = Metrics(RequestQueue(1, 1)), Metrics(RequestQueue(1, 1))
    one.count_response("/a", 200)
    assert "corral_http_answers_total{route=/a,status=200}" in read(one.render().decode())
    assert "/a" not in other.render().decode()
    assert not any(family.name.startswith("corral") for family in REGISTRY.collect())
