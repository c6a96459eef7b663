"""Streams as clients meet them: how they end, and work that stops when its client goes away."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from corral.engines.scripted import ScriptedEngine
from corral.serving import streams
from corral.serving.admission import Admission, ServerLimits
from corral.serving.database import Database
from tests.serving.conftest import ASKED, CHAT, COMPLETIONS, Endless, Serve, chat_head, openai_client, wait_for


def test_a_complete_stream_ends_with_one_done(serve: Serve) -> None:
    response = httpx2.post(serve("Hello").url + CHAT, json={"model": "m", "messages": ASKED, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert sum("DONE" in event for event in events) == 1
    assert all(event.startswith("data: ") for event in events[:-1])


def test_proxies_neither_keep_nor_gather_a_stream(serve: Serve) -> None:
    _, _, headers = serve("Hello").chat(stream=True)
    assert headers["x-accel-buffering"] == "no"
    assert headers["cache-control"] == "no-store"


def test_a_stream_that_has_nothing_to_send_yet_sends_comments(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while candidates of a vote are generated."""
    monkeypatch.setattr(streams, "_PING_SECONDS", 0.1)
    engine = ScriptedEngine([40, 41, 42], delay_seconds=0.5)
    served = serve.model(engine)
    body = {"model": "m", "messages": ASKED, "stream": True, "consensus": {"method": "rouge-l", "n": 2}}
    text = httpx2.post(serve(served).url + CHAT, json=body, timeout=60).text
    first, second, _ = text.split("\n\n", 2)
    assert first.startswith("data: ")
    assert second == ": ping"
    assert text.count(": ping\n\n") >= 5
    assert text.endswith("data: [DONE]\n\n")


def test_a_stream_that_fails_counts_as_failed(serve: Serve) -> None:
    def reply(ids: Any, sampling: Any, choice: int) -> Iterator[int]:
        yield 40
        raise RuntimeError

    admission = Admission()
    _, events, _ = serve(ScriptedEngine(reply), admission).chat(stream=True)
    assert events[-1]["error"]["code"] == "engine_failed"
    assert wait_for(lambda: b'outcome="failed"} 1.0' in admission.metrics.render())
    assert b'outcome="ended"' not in admission.metrics.render()


def test_a_stream_over_its_time_limit_ends_with_the_error(serve: Serve) -> None:
    endless, admission = Endless(), Admission(ServerLimits(max_seconds=0.5))
    _, events, _ = serve(endless.engine, admission).chat(stream=True)
    assert len(events) > 5
    assert events[-1]["error"]["code"] == "deadline_exceeded"
    assert "[DONE]" not in events
    assert wait_for(lambda: b'outcome="late"} 1.0' in admission.metrics.render())
    assert endless.has_stopped(within=0)


def test_a_stream_of_the_responses_protocol_over_its_time_limit_ends_with_its_error(
    serve: Serve, sqlite: Database
) -> None:
    server = serve.with_store(Endless().engine, sqlite, Admission(ServerLimits(max_seconds=0.5)))
    _, events, _ = server.call("POST", "/v1/responses", {"model": "m", "input": "count", "stream": True})
    assert (events[-1]["type"], events[-1]["code"]) == ("error", "deadline_exceeded")
    assert events[-1]["sequence_number"] == len(events) - 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": ASKED, "n": 2}),
        (CHAT, {"messages": ASKED, "n": 2, "stream": True}),
        (COMPLETIONS, {"prompt": "count"}),
        (COMPLETIONS, {"prompt": "count", "stream": True}),
        (COMPLETIONS, {"prompt": ["a", "b", "c"], "n": 2}),
    ],
    ids=str,
)
def test_a_client_that_goes_away_stops_the_work(path: str, body: dict[str, Any], serve: Serve) -> None:
    endless = Endless()
    server = serve(endless.engine)
    data = json.dumps({"model": "m", "max_tokens": 4000} | body)
    with server.connect(chat_head(f"content-length: {len(data)}").replace(CHAT, path) + data):
        assert endless.started.wait(30)
    assert endless.has_stopped(), "the engine still works for nobody"
    assert server.call("GET", "/health")[0] == 200


def test_a_client_that_goes_away_before_the_first_token_stops_the_work(serve: Serve) -> None:
    """The engine takes long over the prompt: nothing is sent for seconds, and the loss is seen all the same."""
    endless = Endless(delay_seconds=0.6)
    with openai_client(serve(endless.engine).url, timeout=0.3) as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="m", messages=ASKED)
    time.sleep(1)
    assert endless.drawn <= 1
