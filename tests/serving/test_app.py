"""Routes as clients meet them: errors in one shape, health."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

import corral
from corral.engines.base import Generation, Sampling
from corral.engines.scripted import ScriptedEngine
from corral.errors import EngineClosedError, EngineUnavailableError
from corral.serving.admission import Admission, ServerLimits
from corral.serving.middleware import LOCAL_HOSTS
from corral.serving.models import ServedModels
from corral.serving.protocol import RequestLimits
from tests.serving.conftest import (
    ASKED,
    CHAT,
    COMPLETIONS,
    JSON,
    RunningServer,
    Serve,
)


@pytest.fixture
def server(serve: Serve) -> RunningServer:
    return serve("Hello")


GOOD = json.dumps({"model": "m", "messages": ASKED})


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
    "not a number": ("POST", CHAT, b'{"model": "m", "messages": [], "temperature": NaN}', JSON, 400),
    "unknown route": ("GET", "/v2/chat", None, {}, 404),
    "unknown model": ("GET", "/v1/models/a%2Fb", None, {}, 404),
    "wrong method": ("GET", CHAT, None, {}, 405),
}


@pytest.mark.parametrize("case", CASES)
def test_every_error_has_openais_shape(case: str, server: RunningServer) -> None:
    method, path, body, headers, expected = CASES[case]
    status, answer, _ = server.call(method, path, body, headers)
    assert status == expected, answer
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["message"]


def test_the_body_of_the_error_cases_is_valid_when_sent_as_json(server: RunningServer) -> None:
    assert server.call("POST", CHAT, GOOD)[0] == 200


def test_a_lone_surrogate_in_a_model_name_is_a_client_error(server: RunningServer) -> None:
    status, answer, _ = server.call("POST", CHAT, GOOD.replace('"m"', '"\\ud800"'))
    assert status in (400, 404)
    assert answer["error"]["param"] == "model"


def test_a_wrong_method_lists_the_allowed_methods(server: RunningServer) -> None:
    assert server.call("PUT", CHAT)[2]["allow"] == "POST"


def test_a_body_over_the_limit_is_refused_by_its_header_and_by_its_length(serve: Serve) -> None:
    server, good = serve("Hello", limits=RequestLimits(body_bytes=4000)), GOOD.encode()
    assert server.call("POST", CHAT, good.ljust(4000))[0] == 200
    assert server.call("POST", CHAT, good.ljust(4001))[0] == 413
    assert server.call("POST", CHAT, iter([good, b" " * 3000]))[0] == 200  # no length is given: it comes in chunks
    status, answer, _ = server.call("POST", CHAT, iter([good, b" " * 3000, b" " * 3000]))
    assert status == 413
    assert "4000" in answer["error"]["message"]


def test_requests_for_an_unknown_host_name_are_refused_except_for_health(serve: Serve) -> None:
    server = serve("Hello", hosts=[*LOCAL_HOSTS, "LLM.example", "*.proxy.example"])
    known = ("127.0.0.1:8000", "192.0.2.7", "LOCALHOST", "[::1]:80", "app.localhost:1", "host.docker.internal:8000")
    for name in (*known, "llm.example:80", "a.proxy.example"):
        assert server.call("GET", "/v1/models", headers={"host": name})[0] == 200, name
    for name in ("evil.example", "127.0.0.1.evil.example:8000", "localhost.evil.example", "proxy.example", ""):
        status, answer, _ = server.call("GET", "/v1/models", headers={"host": name})
        assert (status, answer["error"]["code"]) == (403, "unknown_host")
        assert f"--allowed-host {name.partition(':')[0] or 'NAME'}" in answer["error"]["message"]
        assert server.call("GET", "/health", headers={"host": name})[0] == 200
    assert serve("Hello").call("GET", "/v1/models", headers={"host": "any.example"})[0] == 200


def test_a_root_path_is_accepted_with_or_without_the_proxy_passing_it_on(serve: Serve) -> None:
    server = serve("Hello", root_path="/llm")
    for path in ("/v1/models", "/llm/v1/models", "/health", "/llm/health"):
        assert server.call("GET", path)[0] == 200, path
    assert server.call("GET", "/openapi.json")[1]["servers"] == [{"url": "/llm"}]


def test_health_answers_head_and_the_version_is_told(server: RunningServer) -> None:
    assert server.call("HEAD", "/health")[0] == 200
    assert server.call("GET", "/version")[:2] == (200, {"version": corral.__version__})


def test_a_body_with_more_brackets_than_are_parsed_quickly_is_refused(server: RunningServer) -> None:
    status, answer, _ = server.call("POST", CHAT, _with("metadata", b"[" + b"[]," * 200_000 + b"[]]"))
    assert status == 413
    assert "brackets" in answer["error"]["message"]


def breaking(error: Exception) -> ScriptedEngine:
    """An engine that fails after three tokens."""

    def reply(ids: Any, sampling: Any, choice: int) -> Iterator[int]:
        yield from [50] * 3
        raise error

    return ScriptedEngine(reply)


class Unreachable(ScriptedEngine):
    """An engine that cannot compute just now."""

    def submit(self, ids: Sequence[int], sampling: Sampling) -> Generation:
        raise EngineUnavailableError("http://10.0.0.7:8000, the secret of the machine, cannot be reached")


FAULTS = {
    "an error": (breaking(RuntimeError("secret of the machine")), 500, "engine_failed"),
    "closed amid an answer": (breaking(EngineClosedError("secret: the process died")), 503, "engine_unavailable"),
    "unreachable": (Unreachable([1]), 503, "engine_unavailable"),
}


@pytest.mark.parametrize(("path", "body"), [(CHAT, {"messages": ASKED}), (COMPLETIONS, {"prompt": "a"})])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_error_is_a_server_error_without_its_message(fault: str, path: str, body: Any, serve: Serve) -> None:
    engine, expected, code = FAULTS[fault]
    server = serve(engine)
    for extra in ({}, {"stream": True}):
        status, answer, headers = server.call("POST", path, {"model": "m"} | body | extra)
        assert "secret" not in json.dumps(answer)
        if extra and fault != "unreachable":
            assert status == 200
            assert len(answer) == (5 if path == CHAT else 4), "the role of a chat, three tokens, the error, no [DONE]"
            answer = answer[-1]
        else:
            assert status == expected
            assert status != 503 or int(headers["retry-after"]) > 0
        assert (answer["error"]["code"], answer["error"]["type"]) == (code, "server_error")


def test_openais_client_raises_the_error_that_ends_a_stream(serve: Serve) -> None:
    client = serve(breaking(RuntimeError("secret"))).client
    with pytest.raises(openai.APIError, match="engine failed"):
        list(client.chat.completions.create(model="m", messages=ASKED, stream=True))


def quote_the_prompt(*_: Any) -> Any:
    raise ValueError("cannot do my diary")


@pytest.mark.parametrize(("render", "error"), [(None, "TypeError"), (quote_the_prompt, "ValueError")])
def test_an_exception_that_quotes_the_prompt_is_logged_without_its_message(
    render: Any, error: str, serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve.template, "prompt", render)
    status, answer, _ = serve("Hello").chat(messages=[{"role": "user", "content": "my diary"}])
    assert (status, answer["error"]["code"]) == (500, "internal_error")
    assert error not in json.dumps(answer)
    assert error in caplog.text, "the log has it"
    assert "answerer.py" in caplog.text
    assert "diary" not in caplog.text + json.dumps(answer)


def test_liveness_reports_the_process_and_readiness_each_engine(serve: Serve) -> None:
    engine, other = ScriptedEngine([40]), Lost([40])
    server = serve(ServedModels([serve.model(engine), replace(serve.model(engine), name="n")]))
    state: Any = {"engine": "scripted", "ready": True, "reason": None, "restarts": 0}
    assert server.call("GET", "/health")[:2] == (200, {"status": "ok"})
    assert server.call("GET", "/health/ready")[:2] == (200, {"status": "ready", "engines": [state]})
    asyncio.run(engine.close())
    status, body, headers = server.call("GET", "/health/ready")
    closed = state | {"ready": False, "reason": "it was closed"}
    assert (status, body) == (503, {"status": "not ready", "engines": [closed]})
    assert int(headers["retry-after"]) >= 1
    assert server.call("GET", "/health")[0] == 200
    assert server.call("GET", "/v1/models")[0] == 200
    status, answer, headers = server.chat()
    assert (status, answer["error"]["code"]) == (503, "engine_unavailable")
    assert int(headers["retry-after"]) >= 1
    both = serve(ServedModels([serve.model(ScriptedEngine([40])), replace(serve.model(other), name="n")]))
    status, body, _ = both.call("GET", "/health/ready")
    lost = {"engine": "scripted", "ready": False, "reason": "its process ended", "restarts": 3}
    assert (status, body) == (503, {"status": "not ready", "engines": [state, lost]})


class Lost(ScriptedEngine):
    """An engine that takes work, and lost what it computes with."""

    fault = "its process ended"
    restarts = 3


def test_every_response_has_a_unique_request_id(server: RunningServer) -> None:
    answers = (server.call("GET", "/health"), server.call("GET", "/no"), server.chat())
    numbers = {headers["x-request-id"] for _, _, headers in answers}
    assert all(number.startswith("req_") for number in numbers)
    assert len(numbers) == 3


def test_a_short_harmless_request_id_of_the_client_is_taken_over(server: RunningServer) -> None:
    for sent, is_taken in (("trace-1.a_B", True), ("a" * 64, True), ("a" * 65, False), ("a b", False), ("é", False)):
        got = server.call("GET", "/health", headers={"x-request-id": sent})[2]["x-request-id"]
        assert (got == sent) == is_taken
        assert is_taken or got.startswith("req_")


def test_only_pages_from_an_allowed_origin_may_send_requests(serve: Serve, server: RunningServer) -> None:
    allowed, asks = "https://chat.example.org", {"access-control-request-method": "POST"}
    with_cors = serve("Hello", cors=[allowed])
    for origin in (allowed, "https://evil.example"):
        connection = http.client.HTTPConnection(urlsplit(with_cors.url).netloc)
        connection.request("OPTIONS", CHAT, headers={**asks, "origin": origin})
        answer = connection.getresponse()
        is_allowed = origin == allowed
        assert (answer.status == 200) == is_allowed
        assert answer.headers["access-control-allow-origin"] == (origin if is_allowed else None)
        assert answer.headers["x-request-id"]
        connection.close()
        _, _, headers = with_cors.call("GET", "/v1/models", headers={"origin": origin})
        assert headers["access-control-allow-origin"] == (origin if is_allowed else None)
    _, _, headers = server.call("GET", "/v1/models", headers={"origin": allowed})
    assert headers["access-control-allow-origin"] is None


def test_headers_over_the_limit_are_refused_in_openais_shape(serve: Serve) -> None:
    server = serve("Hello", Admission(ServerLimits(header_bytes=2000)))
    assert server.call("GET", "/v1/models", headers={"x-a": "a" * 1000})[0] == 200
    status, answer, _ = server.call("GET", "/v1/models", headers={"x-a": "a" * 2000})
    assert status == 431
    assert "2000" in answer["error"]["message"]
    assert server.call("GET", f"/v1/models/{'a' * 2000}")[0] == 431


def test_malformed_http_and_endless_headers_are_refused_and_the_connection_is_closed(server: RunningServer) -> None:
    with server.connect("HELO there\r\n\r\n") as raw:
        assert raw.makefile("rb").read().startswith(b"HTTP/1.1 400")
    with server.connect("GET / HTTP/1.1\r\nx-a: ") as raw, contextlib.suppress(OSError):
        for _ in range(10_000):
            raw.sendall(b"a" * 2**16)
        raise AssertionError("it read 600 MB of a head")


def test_prompts_are_not_logged(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """At the lowest level of every logger, asked well and badly, on every route for text."""
    server = serve("Hello")  # not in a fixture: after those, pytest gives a handler to loggers without one
    bodies: list[tuple[str, Any]] = [
        (CHAT, {"messages": [{"role": "user", "content": "my diary"}]}),
        (CHAT, {"messages": [{"role": "user", "content": "my diary"}], "stream": True}),
        (CHAT, {"messages": [{"role": "my diary", "content": "my diary"}]}),
        (CHAT, {"messages": [{"role": "user", "content": "my diary"}], "max_tokens": 10**9}),
        (COMPLETIONS, {"prompt": "my diary"}),
        ("/my%20diary?my%20diary", {}),
    ]
    for name in ("", "uvicorn.error", "uvicorn.access", "asyncio", "corral"):
        caplog.set_level(1, name)
    logging.getLogger("corral").debug("a line that is logged")
    for path, body in bodies:
        server.call("POST", path, {"model": "m", **body})
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
def test_no_path_template_or_url_from_a_client_is_used(choice: str, server: RunningServer) -> None:
    WATCHED.clear()
    _is_watching.set()
    try:
        status, answer, _ = server.chat(**CHOICES[choice])
    finally:
        _is_watching.clear()
    expected = 200 if choice == "a salt" else 404 if "model" in CHOICES[choice] else 400  # a salt changes no answer
    assert status == expected, answer
    assert WATCHED, "the call itself connects"
    assert not [seen for seen in WATCHED if any(name in seen for name in ("/etc", "169.254", "example.org"))]
