"""The model, its context and what the endpoints return are found out before the first request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from corral.engines.base import Sampling
from corral.errors import InputError, ModelError
from tests.conftest import web_server
from tests.engines.remote.fake_server import (
    FakeServer,
    answers_well,
    ask,
    fake_server,
    knows_fields,
    refuses_with,
    remote,
)


def entry(name: str = "m", length: int | None = None, **more: Any) -> dict[str, Any]:
    return {"id": name} | ({} if length is None else {"max_model_len": length}) | more


TWO = [entry("a", 100), entry("b", 200)]
CHAT_AND_EMBEDDINGS = [entry("m", 8192), entry("e", 256, task="embeddings")]
LISTS: dict[
    str, tuple[list[list[dict[str, Any]]], dict[str, Any], tuple[str, int] | tuple[type[Exception], str, str]]
] = {
    "several models and no name": ([TWO], {}, (ModelError, "a, b", "name one")),
    "several models and another name": ([TWO], {"model": "c"}, (ModelError, "a, b", "name one")),
    "one of several models": ([TWO], {"model": "b"}, ("b", 200)),
    "the only chat model": ([CHAT_AND_EMBEDDINGS], {}, ("m", 8192)),
    "different models": (
        [[entry("m", 9)], [entry("other")]],
        {},
        (ModelError, "no model 'm'; it has: other", "name one"),
    ),
    "the shortest context": ([[entry(length=8192)], [entry(length=50)]], {}, ("m", 50)),
    "a context that one does not list": ([[entry(length=9)], [entry()]], {}, (InputError, "context", "max_length")),
    "a context that none lists": ([[entry()]], {"max_length": 77}, ("m", 77)),
    "a known context that is shorter": ([[entry()], [entry(length=8192)]], {"max_length": 77}, ("m", 77)),
    "a known context that is longer": ([[entry()], [entry(length=8192)]], {"max_length": 9000}, ("m", 8192)),
}


@pytest.mark.parametrize("case", LISTS)
def test_the_model_and_its_context_are_those_that_all_endpoints_list(case: str) -> None:
    lists, options, expected = LISTS[case]
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(web_server(fake_server(answers_well, models=models))) for models in lists]
        if isinstance(expected[0], str):
            engine = remote(*urls, **options)
            assert (engine.model, engine.features.max_length) == expected
            asyncio.run(engine.close())
        else:
            kind, message, hint = expected
            with pytest.raises(kind, match=message) as caught:
                remote(*urls, **options)
            assert hint in str(caught.value)
            assert kind is InputError or urls[-1] in str(caught.value)


IDS: dict[str, Any] = dict.fromkeys(
    ("return_token_ids", "ignore_eos", "stop_token_ids", "top_k", "min_p", "repetition_penalty")
)
CAPABILITIES: dict[str, tuple[Callable[[FakeServer], None], tuple[bool, bool, bool], int]] = {
    "all of it": (
        knows_fields(**IDS, logprobs=1, echo=True, return_tokens_as_token_ids=True),
        (True, True, True),
        1,
    ),
    "log-probs of the prompt": (knows_fields(**IDS, logprobs=0, echo=True), (True, True, False), 2),
    "log-probs of what it draws": (knows_fields(**IDS, logprobs=0), (True, False, False), 3),
    "ids": (knows_fields(**IDS), (False, False, False), 4),
    "text": (knows_fields(), (False, False, False), 5),
}


@pytest.mark.parametrize("case", CAPABILITIES)
def test_a_probe_of_one_token_finds_what_a_server_returns_and_answers_come_in_every_case(case: str) -> None:
    answer, expected, requests = CAPABILITIES[case]
    server = fake_server(answer)
    with web_server(server) as url:
        engine = remote(url, probe=True, encode=lambda text: [ord(c) for c in text])
        features = engine.features
        assert (features.logprobs, features.score, features.score_top) == expected
        assert ("top_logprobs" in features.honours) == features.score_top
        assert ("min_p" in features.honours) == (case != "text"), "vLLM's extensions go to servers that know them"
        assert len(server.requests) == requests
        assert {body["max_tokens"] for body in server.requests} == {1}
        (done,) = ask(engine, sampling=Sampling(max_tokens=2, seed=1))
    assert (done.ids, done.finish) == ((98, 99), "length")


@pytest.mark.parametrize(
    ("answer", "message", "hint"),
    [
        (knows_fields(), "no token ids", "encode"),
        (refuses_with(404, "no such thing"), "no such thing", "/v1/completions"),
        (refuses_with(400, "no such thing"), "no such thing", "/v1/completions"),
    ],
)
def test_a_probe_refuses_a_server_that_returns_no_ids_or_takes_none(answer: Any, message: str, hint: str) -> None:
    with web_server(fake_server(answer)) as url, pytest.raises(ModelError, match=message) as caught:
        remote(url, probe=True)
    assert hint in str(caught.value.hint)


def test_a_server_too_busy_for_a_probe_is_taken_to_give_all() -> None:
    with web_server(fake_server(refuses_with(503))) as url:
        engine = remote(url, probe=True, retries=0)
        assert engine.features.logprobs
        asyncio.run(engine.close())
