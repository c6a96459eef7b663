"""What the types of requests hold by themselves: a body that is wrong is judged as fast as one that is right."""

from __future__ import annotations

import inspect
import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import openai
import pytest
from pydantic import ValidationError

from corral.serving.chat import ChatRequest
from corral.serving.embeddings import EmbeddingRequest
from corral.serving.protocol import Refused, StrictModel, validation_error
from corral.serving.responses_protocol import CreateConversation, CreateItems, ResponsesRequest
from corral.serving.text_choices import CompletionRequest
from tests.serving.conftest import CHAT, Serve

MANY = 30_000
UNKNOWN = {f"a{i}": 1 for i in range(MANY)}
HALVES = {f"\ud800{i}": "" for i in range(MANY)}
USER: dict[str, Any] = {"role": "user", "content": "x"}
PART = {"type": "text", "text": ""}
TEXT = {"model": "m", "prompt": "x"}


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [*messages], **fields}


def user(content: Sequence[Any]) -> dict[str, Any]:
    return {"role": "user", "content": content}


# (kind, body, the field that is told, a word of why)
WRONG: dict[str, tuple[type[StrictModel], Any, str, str]] = {
    "numbers for messages": (ChatRequest, chat(*[1] * MANY), "messages[0]", "valid dictionary"),
    "empty messages": (ChatRequest, chat(*[{}] * MANY), "messages[0].role", "required"),
    "too many messages": (ChatRequest, chat(*[USER] * MANY), "messages", "at most 2048"),
    "numbers for parts": (ChatRequest, chat(user([1] * 1000)), "messages[0].content[0]", "valid dictionary"),
    "empty parts of messages": (
        ChatRequest,
        chat(*[user([{}] * 1000)] * 2000),
        "messages",
        "more than 4096 parts",
    ),
    "too many parts": (ChatRequest, chat(user([PART] * 2000)), "messages[0].content", "at most 1024"),
    "numbers for stops": (ChatRequest, chat(USER, stop=[1] * MANY), "stop[0]", "string"),
    "too many stops": (ChatRequest, chat(USER, stop=["a"] * MANY), "stop", "at most 16"),
    "a refused one among unknown fields": (ChatRequest, chat(USER, **UNKNOWN, tools=[1]), "tools", "leave it out"),
    "a refused one in a message": (
        ChatRequest,
        chat(USER | UNKNOWN | {"tool_calls": [1]}),
        "messages[0].tool_calls",
        "leave it out",
    ),
    "numbers for input": (ResponsesRequest, {"model": "m", "input": [1] * MANY}, "input[0]", "valid dictionary"),
    "too much input": (ResponsesRequest, {"model": "m", "input": [USER] * MANY}, "input", "at most 2048"),
    "wrong metadata": (ResponsesRequest, {"model": "m", "input": "x", "metadata": UNKNOWN}, "metadata", "16"),
    "metadata of halves": (CreateConversation, {"metadata": HALVES}, "metadata", "16"),
    "numbers for items": (CreateConversation, {"items": [1] * MANY}, "items[0]", "valid dictionary"),
    "numbers for new items": (CreateItems, {"items": [1] * MANY}, "items[0]", "valid dictionary"),
    "lists that are no prompts": (CompletionRequest, {"model": "m", "prompt": [[[]]] * MANY}, "prompt", "at most 64"),
    "too many prompts": (CompletionRequest, {"model": "m", "prompt": ["a"] * MANY}, "prompt", "at most 64"),
    "negative ids": (CompletionRequest, TEXT | {"stop_token_ids": [-1] * MANY}, "stop_token_ids[0]", "equal to 0"),
    "nulls for texts": (EmbeddingRequest, {"model": "m", "input": [None] * MANY}, "input", "list of texts"),
    "too many texts": (EmbeddingRequest, {"model": "m", "input": ["a"] * MANY}, "input", "at most 1024"),
    "a number of 4000 digits": (CompletionRequest, TEXT | {"top_k": 10**4000}, "top_k", "less than"),
    "an id of 4000 digits": (
        CompletionRequest,
        TEXT | {"stop_token_ids": [10**4000]},
        "stop_token_ids[0]",
        "less than",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_validation_stops_after_a_few_errors_and_reports_the_first(case: str) -> None:
    kind, body, param, why = WRONG[case]
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() < 50
    refused = validation_error([{**fault, "loc": ("body", *fault["loc"])} for fault in caught.value.errors()])
    assert (refused.status, refused.where) == (400, param)
    assert why in refused.what
    assert refused.what.startswith(f"{param!r}")


def test_the_largest_invalid_bodies_at_once_leave_the_server_responsive(serve: Serve) -> None:
    body = f'{{"model": "m", "messages": [{",".join(["1"] * 520_000)}]}}'
    server = serve("Hello")
    statuses: list[int] = []
    slowest = 0.0
    threads = [threading.Thread(target=lambda: statuses.append(server.call("POST", CHAT, body)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        began = time.monotonic()
        assert server.call("GET", "/health")[0] == 200
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.02)
    assert statuses == [400] * 4
    assert slowest < 1


def test_ignored_parameters_accept_any_value() -> None:
    habits = {"metadata": UNKNOWN | HALVES, "prompt_cache_options": {"a": [None]}}
    assert [*ChatRequest.model_validate(chat(USER, **habits)).notes.ignored] == [*habits]


def test_what_is_noted_of_one_request_is_not_told_of_the_next() -> None:
    first = ChatRequest.model_validate(chat(USER | {"name": "Ann"}, colour=1))
    assert ([*first.notes.ignored], first.notes.unknown) == (["colour", "name"], "colour")
    with pytest.raises(ValidationError):
        ChatRequest.model_validate(chat(USER, flavour=1, n=0))
    second = ChatRequest.model_validate(chat(USER, colour=None, raw=False))
    assert ([*second.notes.ignored], second.notes.unknown) == ([], "raw")


def test_an_error_says_which_kind_of_value_was_sent() -> None:
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(chat(USER, temperature="hot"))
    refused = validation_error([{**fault, "loc": ("body", *fault["loc"])} for fault in caught.value.errors()])
    assert "valid number (text was sent)" in refused.what


def test_an_error_quotes_only_the_start_and_end_of_a_long_value(serve: Serve) -> None:
    long, server = "m" * 900_000, serve("Hello")
    status, answer, _ = server.chat(model=long)
    assert status == 404
    assert len(json.dumps(answer)) < 5000
    assert "mmm … mmm" in answer["error"]["message"]
    short = Refused(400, "a" * 1000, param="p").body().error
    assert (short.message, short.param) == ("a" * 1000, "p")


@pytest.mark.parametrize("create", ["chat.completions", "completions"])
def test_every_parameter_of_openais_client_is_known_to_the_protocol(create: str) -> None:
    client = openai.OpenAI(api_key="none")
    method, model = {
        "chat.completions": (client.chat.completions.create, ChatRequest),
        "completions": (client.completions.create, CompletionRequest),
    }[create]
    known = set(inspect.signature(method).parameters) - {"extra_headers", "extra_query", "extra_body", "timeout"}
    assert len(known) > 15
    assert known - set(model.model_fields) - set(model.only) - set(model.ignored) == set()
