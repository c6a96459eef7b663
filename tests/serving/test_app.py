"""Routes as clients meet them: errors in one shape, work that stops when the client goes, health."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from corral.answering.answerer import Answerer
from corral.engines.scripted import ScriptedEngine
from corral.errors import EngineClosedError
from corral.serving.admission import Admission, ServerLimits
from corral.serving.generation import ServedModel
from corral.serving.protocol import RequestLimits
from corral.template import Template
from tests.serving.conftest import Endless, openai_client, post_and_disconnect, serve_in_thread

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


def wait_for(is_so: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether it comes to be so."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def url(scripted_model: Callable[..., ServedModel]) -> Iterator[str]:
    with serve_in_thread(scripted_model("Hello")) as address:
        yield address


GOOD = json.dumps({"model": "scripted", "messages": ASKED})


def _with(field: str, value: bytes) -> bytes:
    """A good body with a field besides."""
    return GOOD.encode()[:-1] + f', "{field}": '.encode() + value + b"}"


CASES: dict[str, tuple[str, str, Any, Any, int]] = {
    "not JSON": ("POST", CHAT, b"{", JSON, 400),
    "no body": ("POST", CHAT, None, JSON, 400),
    "no object": ("POST", CHAT, b"[1]", JSON, 400),
    "a form, as any page could send it": ("POST", CHAT, GOOD, {"content-type": "text/plain"}, 400),
    "a body without a type, as any page could send it": ("POST", CHAT, GOOD, {}, 400),
    "nested too deep": ("POST", CHAT, b"[" * 100_000, JSON, 400),
    "nested as deep as can be read": ("POST", CHAT, _with("best_of", b"[" * 900 + b"]" * 900), JSON, 400),
    "a whole number of a hundred thousand digits": ("POST", CHAT, _with("seed", b"1" * 100_000), JSON, 400),
    "a fraction of a hundred thousand digits": ("POST", CHAT, _with("top_p", b"1." + b"1" * 100_000), JSON, 400),
    "a power beyond all numbers": ("POST", CHAT, _with("temperature", b"1e999999"), JSON, 400),
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


def test_the_body_of_the_error_cases_is_valid_when_sent_as_json(url: str) -> None:
    assert call(url, "POST", CHAT, GOOD)[0] == 200


def test_a_lone_surrogate_in_a_model_name_is_a_client_error(url: str) -> None:
    body = b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}'
    status, answer, _ = call(url, "POST", CHAT, body)
    assert status in (400, 404)
    assert answer["error"]["param"] == "model"


def test_a_wrong_method_lists_the_allowed_methods(url: str) -> None:
    assert call(url, "PUT", CHAT)[2]["allow"] == "POST"


def test_a_body_over_the_limit_is_refused_by_its_header_and_by_its_length(
    scripted_model: Callable[..., ServedModel],
) -> None:
    said = scripted_model("Hello")
    served = ServedModel(said.answerer, said.name, RequestLimits(body_bytes=4000))
    good = json.dumps({"model": "scripted", "messages": ASKED}).encode()
    with serve_in_thread(served) as url:
        assert call(url, "POST", CHAT, good.ljust(4000))[0] == 200
        assert call(url, "POST", CHAT, good.ljust(4001))[0] == 413
        assert call(url, "POST", CHAT, iter([good, b" " * 3000]))[0] == 200  # no length is given: it comes in chunks
        status, answer, _ = call(url, "POST", CHAT, iter([good, b" " * 3000, b" " * 3000]))
        assert status == 413
        assert "4000" in answer["error"]["message"]


def test_requests_for_an_unknown_host_name_are_refused(scripted_model: Callable[..., ServedModel]) -> None:
    with serve_in_thread(scripted_model("Hello"), hosts=["127.0.0.1", "localhost", "::1"]) as url:
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
    body = {"model": "m", "messages": ASKED, "stream": stream, "n": 2}
    with serve_in_thread(ServedModel(Answerer(endless.engine, tiny_template), "m")) as url:
        post_and_disconnect(url, CHAT, body, endless.started)
        assert endless.has_stopped(), "the engine still works for nobody"
        assert call(url, "GET", "/health")[0] == 200


def test_openais_client_leaving_a_stream_stops_the_work(tiny_template: Template) -> None:
    endless = Endless()
    with (
        serve_in_thread(ServedModel(Answerer(endless.engine, tiny_template), "m")) as url,
        openai_client(url) as client,
    ):
        with client.chat.completions.create(model="m", messages=ASKED, stream=True) as stream:
            for _ in stream:
                if endless.started.is_set():
                    break
        assert endless.has_stopped()


def test_a_client_that_goes_away_before_the_first_token_stops_the_work(tiny_template: Template) -> None:
    """The engine takes long over the prompt: nothing is sent for seconds, and the loss is seen all the same."""
    endless = Endless(delay_seconds=0.6)
    with (
        serve_in_thread(ServedModel(Answerer(endless.engine, tiny_template), "m")) as url,
        openai_client(url, timeout=0.3) as client,
    ):
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
def test_an_engine_error_is_a_server_error_without_its_message(fault: str, tiny_template: Template) -> None:
    error, status, code = FAULTS[fault]
    served = ServedModel(Answerer(ScriptedEngine(breaking(error, 3)), tiny_template), "m")
    with serve_in_thread(served) as url, openai_client(url) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="m", messages=ASKED)
        assert (caught.value.status_code, caught.value.code) == (status, code)
        assert caught.value.type == "server_error"
        assert "secret" not in caught.value.message


def test_a_stream_that_fails_ends_with_the_error_and_without_done(tiny_template: Template) -> None:
    served = ServedModel(Answerer(ScriptedEngine(breaking(RuntimeError("secret"), 3)), tiny_template), "m")
    with serve_in_thread(served) as url:
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
        with openai_client(url) as client, pytest.raises(openai.APIError, match="engine failed"):
            list(client.chat.completions.create(model="m", messages=ASKED, stream=True))


def test_a_complete_stream_ends_with_one_done(url: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("POST", CHAT, json.dumps({"model": "scripted", "messages": ASKED, "stream": True}), JSON)
    events = connection.getresponse().read().decode().split("\n\n")
    connection.close()
    assert events[-2:] == ["data: [DONE]", ""]
    assert sum("DONE" in event for event in events) == 1
    assert all(event.startswith("data: ") for event in events[:-1])


def test_an_unexpected_exception_is_500_without_a_traceback(
    scripted_model: Callable[..., ServedModel], caplog: pytest.LogCaptureFixture
) -> None:
    served = scripted_model("Hello")
    served.answerer.template.prompt = None  # type: ignore[method-assign,assignment]
    try:
        with serve_in_thread(served) as url:
            body = json.dumps({"model": "scripted", "messages": [{"role": "user", "content": "my diary"}]})
            status, answer, _ = call(url, "POST", CHAT, body)
    finally:
        del served.answerer.template.prompt
    assert status == 500
    assert answer["error"]["code"] == "internal_error"
    assert "TypeError" not in json.dumps(answer)
    assert "TypeError" in caplog.text, "the log has it"
    assert "answerer.py" in caplog.text
    assert "my diary" not in caplog.text


def test_an_exception_that_quotes_the_prompt_is_logged_without_its_message(
    scripted_model: Callable[..., ServedModel], caplog: pytest.LogCaptureFixture
) -> None:
    def quote(*_: Any) -> Any:
        raise ValueError("cannot do my diary")

    served = scripted_model("Hello")
    served.answerer.template.prompt = quote  # type: ignore[method-assign]
    try:
        with serve_in_thread(served) as url:
            body = json.dumps({"model": "scripted", "messages": [{"role": "user", "content": "my diary"}]})
            assert call(url, "POST", CHAT, body)[0] == 500
    finally:
        del served.answerer.template.prompt
    assert "ValueError" in caplog.text
    assert "diary" not in caplog.text


def test_liveness_reports_the_process_and_readiness_the_engine(scripted_model: Callable[..., ServedModel]) -> None:
    served = scripted_model("Hello")
    with serve_in_thread(served) as url:
        assert call(url, "GET", "/health")[:2] == (200, {"status": "ok"})
        assert call(url, "GET", "/health/ready")[:2] == (200, {"status": "ready"})
        asyncio.run(served.answerer.engine.close())
        assert wait_for(lambda: call(url, "GET", "/health/ready")[0] == 503), "it is looked at once a second"
        assert call(url, "GET", "/health/ready")[1]["error"]["code"] == "engine_unavailable"
        assert call(url, "GET", "/health")[0] == 200
        assert call(url, "POST", CHAT, json.dumps({"model": "scripted", "messages": ASKED}))[0] == 503
        assert call(url, "GET", "/v1/models")[0] == 200


def test_every_response_has_a_unique_request_id(url: str) -> None:
    asked = json.dumps({"model": "scripted", "messages": ASKED})
    answers = [call(url, *of)[2]["x-request-id"] for of in (("GET", "/health"), ("GET", "/no"), ("POST", CHAT, asked))]
    assert all(number.startswith("req_") for number in answers)
    assert len(set(answers)) == 3


def test_only_pages_from_an_allowed_origin_may_send_requests(scripted_model: Callable[..., ServedModel]) -> None:
    allowed, asks = "https://chat.example.org", {"access-control-request-method": "POST"}
    with serve_in_thread(scripted_model("Hello"), cors=[allowed]) as url:
        for origin in (allowed, "https://evil.example"):
            connection = http.client.HTTPConnection(urlsplit(url).netloc)
            connection.request("OPTIONS", CHAT, headers={**asks, "origin": origin})
            answer = connection.getresponse()
            is_allowed = origin == allowed
            assert (answer.status == 200) == is_allowed
            assert answer.headers["access-control-allow-origin"] == (origin if is_allowed else None)
            assert answer.headers["x-request-id"]
            connection.close()
            seen = call(url, "GET", "/v1/models", headers={"origin": origin})[2]["access-control-allow-origin"]
            assert seen == (origin if is_allowed else None)
    with serve_in_thread(scripted_model("Hello")) as url:
        assert call(url, "GET", "/v1/models", headers={"origin": allowed})[2]["access-control-allow-origin"] is None


def test_headers_over_the_limit_are_refused_in_openais_shape(scripted_model: Callable[..., ServedModel]) -> None:
    with serve_in_thread(scripted_model("Hello"), admission=Admission(ServerLimits(header_bytes=2000))) as url:
        assert call(url, "GET", "/v1/models", headers={"x-a": "a" * 1000})[0] == 200
        for size in (2000, 200_000):  # the one comes in a piece, the other is cut short
            status, answer, _ = call(url, "GET", "/v1/models", headers={"x-a": "a" * size})
            assert status == 431
            assert "2000" in answer["error"]["message"]
        assert call(url, "GET", f"/v1/models/{'a' * 2000}")[0] == 431


def test_malformed_http_is_refused_in_openais_shape(url: str) -> None:
    place = urlsplit(url)
    with socket.create_connection((str(place.hostname), place.port or 0)) as raw:
        raw.sendall(b"HELO there\r\n\r\n")
        answer = raw.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"x-request-id: req_" in answer
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == {"message", "type", "param", "code"}


def test_prompts_are_not_logged(scripted_model: Callable[..., ServedModel], caplog: pytest.LogCaptureFixture) -> None:
    """At the lowest level of every logger, asked well and badly, on every route for text."""
    loggers = [logging.getLogger(name) for name in ("", "uvicorn.error", "uvicorn.access", "asyncio", "corral")]
    levels = [logger.level for logger in loggers]
    bodies: list[tuple[str, Any]] = [
        (CHAT, {"messages": [{"role": "user", "content": "my diary"}]}),
        (CHAT, {"messages": [{"role": "user", "content": "my diary"}], "stream": True}),
        (CHAT, {"messages": [{"role": "my diary", "content": "my diary"}]}),
        (CHAT, {"messages": [{"role": "user", "content": "my diary"}], "max_tokens": 10**9}),
        ("/v1/completions", {"prompt": "my diary"}),
        ("/v1/completions", {"prompt": "my diary", "my diary": 1}),
        ("/my diary?my diary", {}),
    ]
    try:
        with serve_in_thread(scripted_model("an answer")) as url:
            for logger in loggers:
                logger.setLevel(1)
            logging.getLogger("corral").debug("a line that is logged")
            for path, body in bodies:
                connection = http.client.HTTPConnection(urlsplit(url).netloc)
                connection.request("POST", path.replace(" ", "%20"), json.dumps({"model": "scripted", **body}), JSON)
                connection.getresponse().read()
                connection.close()
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    assert "a line that is logged" in caplog.text
    assert "diary" not in caplog.text


# What other servers let a client choose, each with what it was good for.
CHOICES: dict[str, Any] = {
    "a template": {"chat_template": "{{ ''.__class__ }}"},
    "arguments of a template": {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
    "an adapter by its path": {"lora_path": "/etc"},
    "a picture by its address": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}
        ]
    },
    "a file by its address": {
        "messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "file:///etc/passwd"}}]}]
    },
    "pickled embeddings": {"prompt_embeds": "gASVAAAA"},
    "a processor": {"logits_processors": ["os.system"]},
    "a grammar": {"guided_regex": "(a+)+$"},
    "a salt": {"cache_salt": "x"},
    "a model by its path": {"model": "../../../../etc"},
    "a model by its address": {"model": "https://example.org/model"},
}


WATCHED: list[str] = []
_is_watching = threading.Event()


def _watch(name: str, args: tuple[Any, ...]) -> None:
    if _is_watching.is_set() and name in ("open", "socket.connect", "socket.getaddrinfo", "os.listdir"):
        WATCHED.append(str(args))


sys.addaudithook(_watch)


@pytest.mark.parametrize("choice", CHOICES)
def test_no_path_template_or_url_from_a_client_is_used(choice: str, url: str) -> None:
    body = {"model": "scripted", "messages": ASKED} | CHOICES[choice]
    WATCHED.clear()
    _is_watching.set()
    try:
        status, answer, _ = call(url, "POST", CHAT, json.dumps(body))
    finally:
        _is_watching.clear()
    assert status == (404 if "model" in CHOICES[choice] else 400), answer
    assert WATCHED, "the call itself connects"
    assert not [seen for seen in WATCHED if any(name in seen for name in ("/etc", "169.254", "example.org"))]
