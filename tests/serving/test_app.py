"""Routes as clients meet them: errors in one shape, work that stops when the client goes, health."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from corral.answerer import Answerer
from corral.engines.scripted import ScriptedEngine
from corral.errors import EngineClosedError
from corral.serving.completions import Served
from corral.serving.protocol import Limits
from corral.template import Template
from tests.serving.conftest import Endless, client_of, running

ASKED: Any = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def call(url: str, method: str, path: str, body: Any = None, headers: Any = JSON) -> tuple[int, dict[str, Any], Any]:
    """(status, body, headers) of one plain request."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text), answer.headers


@pytest.fixture
def url(says: Callable[..., Served]) -> Iterator[str]:
    with running(says("Hello")) as address:
        yield address


CASES: dict[str, tuple[str, str, Any, Any, int]] = {
    "not JSON": ("POST", CHAT, b"{", JSON, 400),
    "no body": ("POST", CHAT, None, JSON, 400),
    "no object": ("POST", CHAT, b"[1]", JSON, 400),
    "a form, as any page could send it": ("POST", CHAT, b'{"model": "scripted"}', {"content-type": "text/plain"}, 400),
    "nested too deep": ("POST", CHAT, b"[" * 100_000, JSON, 400),
    "half a character": ("POST", CHAT, b'{"model": "\\ud800", "messages": []}', JSON, 400),
    "half a character as a key": ("POST", CHAT, b'{"\\ud800": 1}', JSON, 400),
    "not a number": ("POST", CHAT, b'{"model": "scripted", "messages": [], "temperature": NaN}', JSON, 400),
    "unknown route": ("GET", "/v2/chat", None, {}, 404),
    "unknown model": ("GET", "/v1/models/a%2Fb", None, {}, 404),
    "wrong method": ("GET", CHAT, None, {}, 405),
    "documentation": ("GET", "/docs", None, {}, 404),
}


@pytest.mark.parametrize("case", CASES)
def test_every_error_has_openais_shape(case: str, url: str) -> None:
    method, path, body, headers, status = CASES[case]
    got, answer, _ = call(url, method, path, body, headers)
    assert got == status, answer
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["message"]


def test_half_a_character_in_a_name_is_quoted_not_choked_on(url: str) -> None:
    body = b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}'
    status, answer, _ = call(url, "POST", CHAT, body)
    assert status in (400, 404)
    assert answer["error"]["param"] == "model"


def test_a_wrong_method_says_which_is_right(url: str) -> None:
    assert call(url, "PUT", CHAT)[2]["allow"] == "POST"


def test_a_body_over_the_limit_is_refused_by_its_header_and_by_its_length(
    says: Callable[..., Served],
) -> None:
    said = says("Hello")
    served = Served(said.answerer, said.name, Limits(body_bytes=4000))
    good = json.dumps({"model": "scripted", "messages": ASKED}).encode()
    with running(served) as url:
        assert call(url, "POST", CHAT, good.ljust(4000))[0] == 200
        assert call(url, "POST", CHAT, good.ljust(4001))[0] == 413
        assert call(url, "POST", CHAT, iter([good, b" " * 3000]))[0] == 200  # no length is given: it comes in chunks
        status, answer, _ = call(url, "POST", CHAT, iter([good, b" " * 3000, b" " * 3000]))
        assert status == 413
        assert "4000" in answer["error"]["message"]


def test_a_page_that_gave_the_server_a_name_of_its_own_is_refused(says: Callable[..., Served]) -> None:
    with running(says("Hello"), hosts=["127.0.0.1", "localhost", "::1"]) as url:
        for name in ("127.0.0.1:8000", "LOCALHOST", "[::1]:80"):
            assert call(url, "GET", "/v1/models", headers={"host": name})[0] == 200
        for name in ("evil.example", "127.0.0.1.evil.example:8000", "[::1", ""):
            status, answer, _ = call(url, "GET", "/v1/models", headers={"host": name})
            assert (
                (status, answer["error"]["code"]) == (403, "unknown_host") if name != "[::1" else status in (200, 403)
            )


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_the_work(stream: bool, tiny_template: Template) -> None:
    endless = Endless()
    body = json.dumps({"model": "m", "messages": ASKED, "stream": stream, "n": 2}).encode()
    with running(Served(Answerer(endless.engine, tiny_template), "m")) as url:
        place = urlsplit(url)
        with socket.create_connection((str(place.hostname), place.port or 0)) as raw:
            head = (
                f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            )
            raw.sendall(head.encode() + b"\r\n" + body)
            assert endless.began.wait(30)
        time.sleep(1)
        then = endless.drawn
        time.sleep(0.2)
        assert endless.drawn == then, "the engine still works for nobody"
        assert call(url, "GET", "/health")[0] == 200


def test_openais_client_leaving_a_stream_stops_the_work(tiny_template: Template) -> None:
    endless = Endless()
    with running(Served(Answerer(endless.engine, tiny_template), "m")) as url, client_of(url) as client:
        with client.chat.completions.create(model="m", messages=ASKED, stream=True) as stream:
            for _ in stream:
                if endless.began.is_set():
                    break
        time.sleep(1)
        then = endless.drawn
        time.sleep(0.2)
        assert endless.drawn == then


def test_a_client_that_goes_away_before_the_first_token_stops_the_work(tiny_template: Template) -> None:
    """The engine takes long over the prompt: nothing is sent for seconds, and the loss is seen all the same."""
    endless = Endless(delay_seconds=0.6)
    with running(Served(Answerer(endless.engine, tiny_template), "m")) as url, client_of(url, timeout=0.3) as client:
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(model="m", messages=ASKED)
        time.sleep(1)
    assert endless.drawn <= 1


def breaking(error: Exception, after: int) -> Any:
    def reply(ids: Any, sampling: Any, choice: int) -> Iterator[int]:
        yield from [50] * after
        raise error

    return reply


FAULTS = {
    "engine": (RuntimeError("secret of the machine"), 500, "engine_failed"),
    "closed": (EngineClosedError("the process died"), 503, "engine_unavailable"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_that_fails_is_a_server_error_without_its_inner_words(fault: str, tiny_template: Template) -> None:
    error, status, code = FAULTS[fault]
    served = Served(Answerer(ScriptedEngine(breaking(error, 3)), tiny_template), "m")
    with running(served) as url, client_of(url) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="m", messages=ASKED)
        assert (caught.value.status_code, caught.value.code) == (status, code)
        assert caught.value.type == "server_error"
        assert "secret" not in caught.value.message


def test_a_stream_that_breaks_ends_with_the_error_and_no_done(tiny_template: Template) -> None:
    served = Served(Answerer(ScriptedEngine(breaking(RuntimeError("secret"), 3)), tiny_template), "m")
    with running(served) as url:
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        connection.request("POST", CHAT, json.dumps({"model": "m", "messages": ASKED, "stream": True}), JSON)
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in answer.read().decode().split("\n\n") if line]
        connection.close()
        assert json.loads(events[-1])["error"]["code"] == "engine_failed"
        assert len(events) == 5  # the role, three tokens, the error
        assert not any("DONE" in event or "secret" in event for event in events)
        with client_of(url) as client, pytest.raises(openai.APIError, match="engine failed"):
            list(client.chat.completions.create(model="m", messages=ASKED, stream=True))


def test_a_stream_that_ends_well_ends_with_one_done(url: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("POST", CHAT, json.dumps({"model": "scripted", "messages": ASKED, "stream": True}), JSON)
    events = connection.getresponse().read().decode().split("\n\n")
    connection.close()
    assert events[-2:] == ["data: [DONE]", ""]
    assert sum("DONE" in event for event in events) == 1
    assert all(event.startswith("data: ") for event in events[:-1])


def test_a_fault_of_ours_is_500_without_a_traceback(
    says: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    served = says("Hello")
    served.answerer.template.prompt = None  # type: ignore[method-assign,assignment]
    try:
        with running(served) as url:
            body = json.dumps({"model": "scripted", "messages": [{"role": "user", "content": "my diary"}]})
            status, answer, _ = call(url, "POST", CHAT, body)
    finally:
        del served.answerer.template.prompt
    assert status == 500
    assert answer["error"]["code"] == "internal_error"
    assert "NoneType" not in json.dumps(answer)
    assert "NoneType" in caplog.text, "the log has it"
    assert "my diary" not in caplog.text


def test_health_names_model_and_engine_and_ends_with_the_engine(says: Callable[..., Served]) -> None:
    served = says("Hello")
    with running(served) as url:
        assert call(url, "GET", "/health")[:2] == (200, {"status": "ok", "model": "scripted", "engine": "scripted"})
        asyncio.run(served.answerer.engine.close())
        status, answer, _ = call(url, "GET", "/health")
        assert (status, answer["error"]["code"]) == (503, "engine_unavailable")
        assert call(url, "POST", CHAT, json.dumps({"model": "scripted", "messages": ASKED}))[0] == 503
        assert call(url, "GET", "/v1/models")[0] == 200


def test_prompts_are_not_logged(says: Callable[..., Served], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    with running(says("an answer")) as url:
        for stream in (False, True):
            body = {"model": "scripted", "stream": stream, "messages": [{"role": "user", "content": "my diary"}]}
            connection = http.client.HTTPConnection(urlsplit(url).netloc)
            connection.request("POST", CHAT, json.dumps(body), JSON)
            connection.getresponse().read()
            connection.close()
    assert "diary" not in caplog.text
