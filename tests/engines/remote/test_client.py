"""What one endpoint does to a request, over real sockets: statuses, keys, sizes, and answers that cannot be read."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from corral.engines.base import Sampling
from corral.errors import EngineError, ModelError, RequestError
from tests.conftest import Request, web_server
from tests.engines.remote.fake_server import (
    FakeServer,
    answers_well,
    ask,
    chunk,
    fake_server,
    first_then,
    free_port,
    refuses_with,
    remote,
)


def test_the_key_is_from_the_argument_or_our_environment_variable_and_nothing_is_sent_from_openais(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CORRAL_API_KEY", raising=False)
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", "of openai")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "authorization: of openai\nx-more: of openai")
    server = fake_server(answers_well)
    with web_server(server) as url:
        ask(remote(url))
        monkeypatch.setenv("CORRAL_API_KEY", "from the environment")
        ask(remote(url))
        ask(remote(url, key="given"))
    keys = [None, "Bearer from the environment", "Bearer given"]
    assert [headers.get("authorization") for headers in server.headers_of_lists] == keys
    assert [headers.get("authorization") for headers in server.headers_of_requests] == keys
    for headers in (*server.headers_of_lists, *server.headers_of_requests):
        assert "of openai" not in headers.values()
        assert not [name for name in headers if name.startswith(("x-", "openai-"))], "nothing about this machine either"
        assert headers["user-agent"].startswith("corral/")


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("method", ["completion", "do_GET"])
def test_a_wrong_key_is_an_error_at_once_that_does_not_show_it(status: int, method: str) -> None:
    server = fake_server(**{"completion": answers_well} | {method: refuses_with(status, "no such key: sesame-1")})
    with web_server(server) as url, pytest.raises((EngineError, ModelError)) as caught:
        ask(remote(url, key="sesame-1"))
    assert "CORRAL_API_KEY" in str(caught.value)
    assert url in str(caught.value)
    assert "sesame" not in repr(caught.value) + str(caught.value)
    assert len(server.requests) <= 1, "the same key would be refused again"


@pytest.mark.parametrize("pad", [0, 270, 283])
@pytest.mark.parametrize("where", ["amid an answer", "400", "503"])
def test_no_part_of_the_key_is_shown_wherever_the_endpoint_quotes_it(where: str, pad: int) -> None:
    message = "x" * pad + " no such key: sesame-and-more-1"
    amid = lambda self: self.events({"error": {"message": message, "code": 500}})  # noqa: E731
    server = fake_server(refuses_with(int(where), message) if where.isdecimal() else amid)
    with web_server(server) as url, pytest.raises(EngineError) as caught:
        ask(remote(url, key="sesame-and-more-1", retries=0))
    assert "sesame" not in str(caught.value) + repr(caught.value)


def test_a_redirect_is_refused_and_the_key_does_not_follow() -> None:
    elsewhere = fake_server(answers_well)
    with web_server(elsewhere) as other:
        redirects: Any = lambda self: self.answer(307, {"location": f"{other}{self.path}"})  # noqa: E731
        with web_server(fake_server(redirects)) as url, pytest.raises(EngineError, match="307"):
            ask(remote(url, key="sesame"))
        with web_server(fake_server(answers_well, do_GET=redirects)) as url, pytest.raises(ModelError, match="307"):
            remote(url, key="sesame")
    assert not elsewhere.headers_of_lists
    assert not elsewhere.requests


def test_an_endpoint_that_is_not_there_is_an_error_at_once_and_another_suffices() -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ModelError, match="running") as caught:
        remote(nobody)
    assert nobody in str(caught.value)
    with web_server(fake_server(answers_well)) as url:
        assert ask(remote(nobody, url))[0].ids == (7, 8, 9)


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_a_transient_status_is_retried(status: int) -> None:
    server = fake_server(first_then(refuses_with(status)))
    with web_server(server) as url:
        assert ask(remote(url))[0].ids == (7, 8, 9)
    assert len(server.requests) == 2


def test_retry_after_is_honoured() -> None:
    moments: list[float] = []

    def busy(self: FakeServer) -> None:
        moments.append(time.monotonic())
        first_then(refuses_with(429, **{"retry-after": "1"}))(self)

    with web_server(fake_server(busy)) as url:
        assert ask(remote(url))[0].ids == (7, 8, 9)
    assert moments[1] - moments[0] >= 1


@pytest.mark.parametrize(
    ("status", "message", "retry_after", "expected", "requests"),
    [
        (429, "come back tomorrow", "86400", r"tomorrow.* for 86400 s", 1),
        (429, "never", "1e999", r"never.* for 1000000000 s", 1),
        (503, "overloaded", "0", "503: overloaded", 4),  # the first and three retries
        (503, "overloaded", "soon", "503: overloaded", 4),
    ],
)
def test_an_endpoint_that_is_busy_for_too_long_or_always_is_given_up(
    status: int, message: str, retry_after: str, expected: str, requests: int
) -> None:
    server = fake_server(refuses_with(status, message, **{"retry-after": retry_after}))
    with web_server(server) as url, pytest.raises(EngineError, match=expected) as caught:
        ask(remote(url))
    assert url in str(caught.value)
    assert len(server.requests) == requests


@pytest.mark.parametrize(
    ("status", "kind"), [(400, RequestError), (422, RequestError), (404, EngineError), (500, EngineError)]
)
def test_another_status_is_an_error_at_once(status: int, kind: type[EngineError]) -> None:
    server = fake_server(refuses_with(status, "the context is too short"))
    with web_server(server) as url, pytest.raises(EngineError, match="the context is too short") as caught:
        ask(remote(url))
    assert type(caught.value) is kind
    assert url in str(caught.value)
    assert len(server.requests) == 1


def test_an_error_of_any_length_is_read_to_a_limit() -> None:
    sent = 0

    def endless(self: FakeServer) -> None:
        nonlocal sent
        self.send_response(400)
        self.end_headers()
        with contextlib.suppress(OSError):
            while sent < 2**28:
                sent += self.wfile.write(b"no such thing " * 2**12)
        self.close_connection = True

    with web_server(fake_server(endless)) as url, pytest.raises(RequestError, match="no such thing"):
        ask(remote(url))
    assert sent < 2**28, "the connection was closed"


def page(self: Request) -> None:
    self.answer(200, {"content-type": "text/html"}, b"<html>welcome</html>")


UNREADABLE: dict[str, Callable[[FakeServer], None]] = {
    "a page": page,
    "no JSON": lambda self: self.events(end=b"data: {]\n\n"),
    "an event without end": lambda self: self.events(end=b"data: " + b"x" * (2**24 + 2**20)),
    "another choice": lambda self: self.events(chunk(1, index=5)),
    "ids that are none": lambda self: self.events({"choices": [{"index": 0, "token_ids": ["a"]}]}),
    "no ids": lambda self: self.events({"choices": [{"index": 0, "text": "hello"}]}),
    "too many ids": lambda self: self.events(chunk(*range(13))),
    "no log-probs": lambda self: self.events(chunk(1, 2, logprobs=None)),
    "an unknown reason": lambda self: self.events(chunk(1, finish="tired", logprobs={"token_logprobs": [-1]})),
    "an error amid the answer": lambda self: self.events({"error": {"message": "out of memory", "code": 500}}),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_an_answer_that_cannot_be_used_is_an_error_at_once_that_names_the_endpoint(case: str) -> None:
    server = fake_server(UNREADABLE[case])
    sampling = Sampling(max_tokens=12, logprobs=case in ("no log-probs", "an unknown reason"))
    with web_server(server) as url, pytest.raises(EngineError) as caught:
        ask(remote(url), sampling=sampling)
    assert url in str(caught.value)
    assert len(server.requests) == 1
    assert case != "no ids" or "encode" in str(caught.value)


def test_a_list_of_models_that_cannot_be_read_is_an_error_that_says_where_an_api_is() -> None:
    with (
        web_server(fake_server(answers_well, do_GET=page)) as url,
        pytest.raises(ModelError, match="cannot be read") as caught,
    ):
        remote(url)
    assert "/v1" in str(caught.value)


def test_an_event_that_says_the_endpoint_goes_down_is_retried() -> None:
    down = {"error": {"message": "the engine of this server is closed", "code": "engine_unavailable"}}
    with web_server(fake_server(first_then(lambda self: self.events(chunk(7), down)))) as url:
        assert ask(remote(url))[0].ids == (7, 8, 9)


async def test_too_few_log_probs_of_a_prompt_are_an_error() -> None:
    answer = {"choices": [{"index": 0, "text": "", "logprobs": {"token_logprobs": [-1.0]}}]}
    with web_server(fake_server(lambda self: self.answer(200, {}, json.dumps(answer).encode()))) as url:
        async with remote(url) as engine:
            with pytest.raises(EngineError, match="1 log-probabilities of a prompt of 3") as caught:
                await engine.score([1, 2, 3])
            assert "echo" in str(caught.value)
