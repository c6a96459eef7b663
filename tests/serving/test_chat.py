"""What OpenAI's own client gets from the server, over a real socket."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import openai
import pytest

from corral.answering.answerer import Answerer
from corral.engines.base import Features, Sampling
from corral.engines.scripted import ScriptedEngine
from corral.messages import Conversation
from corral.serving.models import ServedModel
from tests.serving.conftest import ASKED, Serve

CONVERSATION = Conversation.from_turns(("user", "What is two plus two?"))
SETTINGS: Any = {"model": "tiny", "messages": ASKED, "seed": 5, "max_tokens": 16, "temperature": 1.0}


def whole(served: ServedModel, sampling: Sampling, conversation: Conversation = CONVERSATION) -> Any:
    return asyncio.run(served.answerer.answer(conversation, sampling))


def joined(stream: Any) -> tuple[dict[int, str], dict[int, str]]:
    texts: dict[int, str] = {}
    finishes: dict[int, str] = {}
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                finishes[choice.index] = choice.finish_reason
    return texts, finishes


def test_an_answer_equals_the_answerers_for_the_same_seed(client: openai.OpenAI, tiny_served: ServedModel) -> None:
    drawn: Any = SETTINGS | {"temperature": 0.8, "top_p": 0.9}
    answer = client.chat.completions.create(**drawn, n=3, extra_body={"top_k": 40})
    expected = whole(tiny_served, Sampling(16, 3, temperature=0.8, top_p=0.9, top_k=40, seed=5))
    assert tuple(c.message.content for c in answer.choices) == expected.texts
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert len(set(expected.texts)) > 1
    assert answer.usage
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == sum(len(c.ids) for c in expected.completions)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert (answer.object, answer.model) == ("chat.completion", "tiny")


class Recording(ScriptedEngine):
    """An engine that remembers the sampling of each choice it was asked for."""

    def __init__(self, **engine: Any) -> None:
        self.samplings: list[Sampling] = []
        super().__init__(self._record, **engine)

    def _record(self, ids: Sequence[int], sampling: Sampling, choice: int) -> list[int]:
        self.samplings.append(sampling)
        return [50] * 3


@pytest.mark.parametrize(("context", "most"), [(500, None), (9000, 4096)])
def test_max_tokens_defaults_to_what_the_context_leaves(context: int, most: int | None, serve: Serve) -> None:
    features = Features(max_length=context, vocabulary=400, logprobs=True, score=True)
    engine = Recording(features=features)
    client = serve(engine).client
    answer = client.chat.completions.create(model="m", messages=ASKED, n=None, stop=None, temperature=None)
    assert answer.usage
    left = most or context - answer.usage.prompt_tokens
    assert engine.samplings == [Sampling(left, stop_ids=serve.template.stop_ids)]
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", 3)


USUAL = Sampling(512, temperature=0.3, top_p=0.8)


@pytest.mark.parametrize(
    ("own", "request_", "expected"),
    [
        (USUAL, {}, (0.3, 0.8)),
        (USUAL, {"n": 2}, (0.3, 0.8)),
        (USUAL, {"temperature": 0.0}, (0.0, 0.8)),
        (USUAL, {"temperature": 1.5, "top_p": 0.5}, (1.5, 0.5)),
        (Sampling(), {}, (0.0, 1.0)),
        (Sampling(), {"n": 2}, (1.0, 1.0)),
    ],
    ids=str,
)
def test_sampling_defaults_to_the_evaluated_settings(
    own: Sampling, request_: dict[str, Any], expected: tuple[float, float], serve: Serve
) -> None:
    engine = Recording()
    assert serve(ServedModel(Answerer(engine, serve.template, own), "m")).chat(**request_)[0] == 200
    assert {(sampling.temperature, sampling.top_p) for sampling in engine.samplings} == {expected}


def test_a_stream_adds_up_to_the_whole_answer_and_reports_usage_on_request(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**SETTINGS, n=3)
    chunks = list(client.chat.completions.create(**SETTINGS, n=3, stream=True, stream_options={"include_usage": True}))
    texts, finishes = joined(chunks)
    assert [texts[c.index] for c in answer.choices] == [c.message.content for c in answer.choices]
    assert [finishes[c.index] for c in answer.choices] == [c.finish_reason for c in answer.choices]
    assert [c.usage for c in chunks if c.usage] == [answer.usage]
    assert (chunks[-1].choices, chunks[-1].usage) == ([], answer.usage)
    assert len({c.id for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    without = client.chat.completions.create(**SETTINGS, stream=True)
    assert all("usage" not in c.model_fields_set for c in without)


def test_the_same_seed_repeats_the_answer_and_no_seed_varies_it(client: openai.OpenAI) -> None:
    def ask(**changes: Any) -> str:
        return str(client.chat.completions.create(**(SETTINGS | changes)).choices[0].message.content)

    assert ask() == ask()
    assert ask(seed=6) != ask()
    assert len({ask(seed=None) for _ in range(3)}) > 1
    assert ask(temperature=0, seed=1) == ask(temperature=0, seed=2)


async def test_the_async_client_sends_many_requests_at_once(tiny_url: str, client: openai.OpenAI) -> None:
    alone = [client.chat.completions.create(**(SETTINGS | {"seed": i})).choices[0].message.content for i in range(12)]
    async with openai.AsyncOpenAI(base_url=f"{tiny_url}/v1", api_key="none", max_retries=0) as many:

        async def ask(seed: int) -> str:
            if seed % 2:
                answer = await many.chat.completions.create(**(SETTINGS | {"seed": seed}))
                return str(answer.choices[0].message.content)
            stream = await many.chat.completions.create(**(SETTINGS | {"seed": seed}), stream=True)
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        assert await asyncio.gather(*(ask(i) for i in range(12))) == alone


@pytest.mark.parametrize("stop", ["END", ["nowhere", "END"], ["🙂 w", "d. END"]])
def test_a_stop_string_ends_the_answer_and_is_not_in_it(stop: Any, serve: Serve) -> None:
    text = "Hello 🙂 world. END and more"
    stops = [stop] if isinstance(stop, str) else stop
    cut = text[: min(text.find(s) for s in stops if s in text)]
    client = serve(serve.model(text, fingerprint="fp_1")).client
    request: Any = {"model": "m", "messages": ASKED, "stop": stop}
    answer = client.chat.completions.create(**request)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (cut, "stop")
    assert answer.system_fingerprint == "fp_1"
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert joined(chunks) == ({0: cut}, {0: "stop"})
    assert chunks[-1].usage == answer.usage


def test_log_probs_match_the_tokens_of_the_text_streamed_or_not(
    client: openai.OpenAI, tiny_served: ServedModel
) -> None:
    answer = client.chat.completions.create(**SETTINGS, logprobs=True, top_logprobs=0)
    (expected,) = whole(tiny_served, Sampling(16, temperature=1.0, seed=5, logprobs=True)).completions
    choice = answer.choices[0]
    assert choice.logprobs
    assert choice.logprobs.content
    assert [t.logprob for t in choice.logprobs.content] == pytest.approx(expected.logprobs, rel=1e-4)
    assert all(t.logprob <= 0 and math.isfinite(t.logprob) and t.top_logprobs == [] for t in choice.logprobs.content)
    data = b"".join(bytes(t.bytes or []) for t in choice.logprobs.content)
    assert data.decode("utf-8", "replace") == choice.message.content
    streamed = [
        token
        for chunk in client.chat.completions.create(**SETTINGS, logprobs=True, stream=True)
        for c in chunk.choices
        if c.logprobs
        for token in c.logprobs.content or []
    ]
    assert [(t.token, t.bytes) for t in streamed] == [(t.token, t.bytes) for t in choice.logprobs.content]


def test_content_parts_developer_messages_and_returned_messages_are_accepted(
    client: openai.OpenAI, tiny_served: ServedModel
) -> None:
    first = client.chat.completions.create(**SETTINGS).choices[0].message
    messages: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        *ASKED,
        first.model_dump(),
        {"role": "user", "content": "Why?"},
    ]
    answer = client.chat.completions.create(**(SETTINGS | {"messages": messages}))
    talk = Conversation.from_turns(
        ("system", "Be brief."), ("user", ASKED[0]["content"]), ("assistant", str(first.content)), ("user", "Why?")
    )
    assert answer.choices[0].message.content == whole(tiny_served, Sampling(16, temperature=1.0, seed=5), talk).text


HABITS: Any = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "parallel_tool_calls": True,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "tool_choice": "auto",
    "top_logprobs": 0,
}


def test_common_client_defaults_do_not_change_the_answer(client: openai.OpenAI) -> None:
    answers = [client.chat.completions.create(**SETTINGS, **extra) for extra in ({}, HABITS)]
    assert answers[0].choices == answers[1].choices
    typed: Any = [[{"type": kind, **ASKED[0]}] for kind in ("text", "message")]
    for messages in typed:
        answer = client.chat.completions.create(**(SETTINGS | {"messages": messages}))
        assert answer.choices == answers[0].choices, "as lm-eval and those who keep items send it"


CHANGES: Any = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "response_format": {"type": "json_object"},
    "presence_penalty": 0.5,
    "frequency_penalty": -1,
    "logit_bias": {"5": 1},
    "top_logprobs": 3,
    "reasoning_effort": "high",
    "modalities": ["text", "audio"],
    "store": True,
    "n": 17,
    "temperature": 2.5,
    "top_p": 0,
    "max_tokens": 0,
    "max_completion_tokens": 5,  # beside max_tokens
    "stop": ["a", "b", "c", "d", "e"],
    "seed": 2**70,
    "stream_options": {"include_usage": True},  # without a stream
}


@pytest.mark.parametrize("field", CHANGES)
def test_unsupported_parameters_that_change_the_answer_are_refused_by_name(field: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**(SETTINGS | {field: CHANGES[field]}))
    assert caught.value.param in (field, "max_tokens")
    assert f"'{caught.value.param}'" in caught.value.message
    assert caught.value.type == "invalid_request_error"


MESSAGES: list[tuple[str, Any]] = [
    ("messages[1].role", [*ASKED, {"role": "system", "content": "late"}, *ASKED]),
    ("messages", [*ASKED, {"role": "assistant", "content": "Four."}]),
    ("messages", [{"role": "user", "content": "a\ufdd0b"}]),  # the template refuses it
    ("messages[0].role", [{"role": "tool", "content": "4", "tool_call_id": "1"}]),
    (
        "messages[0].content[0].type",
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}],
    ),
    ("messages[1].tool_calls", [*ASKED, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, *ASKED]),
    ("messages[0].name", [{"role": "user", "content": "hi", "name": "Bob"}]),
    ("messages[0].type", [{"role": "user", "content": "hi", "type": "function_call"}]),
    ("messages[0].content", [{"role": "user", "content": 5}]),
]


@pytest.mark.parametrize(("param", "messages"), MESSAGES, ids=[param for param, _ in MESSAGES])
def test_invalid_messages_are_refused_by_their_position(param: str, messages: Any, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**(SETTINGS | {"messages": messages}))
    assert caught.value.param == param


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("changes", [{"max_tokens": 600}, {"messages": [{"role": "user", "content": "word " * 600}]}])
def test_a_prompt_too_long_for_the_context_is_context_length_exceeded(
    changes: Any, stream: bool, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**(SETTINGS | changes), stream=stream)
    assert caught.value.code == "context_length_exceeded"
    assert "512" in caught.value.message


@pytest.mark.parametrize(
    ("messages", "parts"),
    [
        ([{"role": "user", "content": ""}] * 30_000, ["at most 2048", "30000"]),
        ([{"role": "user", "content": "word " * 60_000}], ["262144 characters", "300000"]),
        ([{"role": "user", "content": "word " * 30_000}] * 2, ["262144 characters", "300000"]),
    ],
)
def test_oversized_messages_are_refused_with_the_limit_they_exceed(
    messages: Any, parts: list[str], client: openai.OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**(SETTINGS | {"messages": messages}))
    assert caught.value.param == "messages"
    assert [part for part in parts if part not in caught.value.message] == []


def test_another_model_is_not_found_and_the_error_lists_the_names(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'tiny'") as caught:
        client.chat.completions.create(**(SETTINGS | {"model": "gpt-5"}))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_log_probs_of_an_engine_that_has_none_are_refused(serve: Serve) -> None:
    features = Features(max_length=500, vocabulary=400, logprobs=False, score=False)
    status, answer, _ = serve(ScriptedEngine([50], features=features)).chat(logprobs=True)
    assert (status, answer["error"]["param"]) == (400, "logprobs")
