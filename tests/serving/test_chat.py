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
from corral.serving.protocol import RequestLimits
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
    "tool_choice": "required",
    "response_format": {"type": "json_object"},
    "presence_penalty": 2.5,
    "frequency_penalty": -3,
    "logit_bias": {"5": 101},
    "top_logprobs": 3,  # without logprobs
    "modalities": ["text", "audio"],
    "n": 17,
    "temperature": 2.5,
    "top_p": 0,
    "max_tokens": 0,
    "stop": [f"{i}" for i in range(17)],
    "seed": 2**70,
    "web_search_options": {},
}


NEUTRAL: Any = {
    "min_p": 0,
    "repetition_penalty": 1,
    "best_of": 1,
    "top_k": -1,
    "ignore_eos": False,
    "length_penalty": 1,
    "use_beam_search": False,
    "typical_p": 1.0,
    "guided_json": None,
    "tools": [],
    "tool_choice": "none",
    "stop": "",
    "raw": False,
}
WITHOUT_EFFECT: Any = {
    "keep_alive": "5m",
    "provider": {"order": ["a"]},
    "reasoning_effort": "high",
    "verbosity": "low",
    "store": True,
    "stream_options": {"include_usage": True},
    "options": {"num_gpu": 1, "num_predict": 16},
    "chat_template_kwargs": {"enable_thinking": True},
}


def test_fields_that_change_nothing_are_ignored_and_named_in_a_header_and_one_log_line(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve("Hello")
    with caplog.at_level("INFO", "corral.serving"):
        for stream in (False, True):
            assert "x-corral-ignored" not in server.chat(**NEUTRAL, stream=stream)[2]
        assert not [record for record in caplog.records if "x-corral" in record.getMessage()]
        status, answer, headers = server.chat(**WITHOUT_EFFECT)
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "Hello")
    names = "keep_alive, provider, reasoning_effort, verbosity, store, num_gpu, enable_thinking, stream_options"
    assert sorted(headers["x-corral-ignored"].split(", ")) == sorted(names.split(", "))
    (line,) = [record.getMessage() for record in caplog.records if "x-corral" in record.getMessage()]
    assert headers["x-corral-ignored"] in line
    assert "5m" not in line


def test_many_or_strange_unknown_fields_are_named_only_as_far_as_a_header_holds(serve: Serve) -> None:
    strange = {"a\r\nb: c": 1, "": 1, "ü" * 900: 1, **{f"f{i}": 1 for i in range(30_000)}}
    status, _, headers = serve("Hello").chat(**strange)
    names = headers["x-corral-ignored"].split(", ")
    assert (status, len(names), names[0], names[-1]) == (200, 11, "a??b??c", "...")
    assert all(len(name) <= 64 for name in names)


def test_a_strict_server_refuses_unknown_fields_and_answers_longer_than_there_is_room_for(serve: Serve) -> None:
    server = serve("Hello", limits=RequestLimits(strict=True))
    unknown, long = "unknown_parameter", "context_length_exceeded"
    for changes, code in (({"colour": 1}, unknown), ({"colour": False}, unknown), ({"max_tokens": 10**6}, long)):
        status, answer, _ = server.chat(**changes)
        assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, next(iter(changes)), code)
    assert server.chat(colour=None)[0] == 200
    assert server.chat(**HABITS, max_tokens=5)[0] == 200


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_tokens": 8, "max_completion_tokens": 5}, (5, None)),
        ({"max_tokens": "7"}, (7, None)),
        ({"max_tokens": -1}, (400, None)),
        ({"n_predict": 6}, (6, None)),
        ({"options": {"num_predict": 9}}, (9, None)),
        ({"max_tokens": 3, "options": {"num_predict": 9}}, (3, None)),
        ({"max_tokens": 401}, (400, "400")),
        ({"max_tokens": 10**6}, (400, "400")),
    ],
)
def test_the_length_of_an_answer_is_the_smallest_that_was_asked_for_and_has_room(
    changes: Any, expected: tuple[int, str | None], serve: Serve
) -> None:
    features = Features(max_length=9000, vocabulary=400, logprobs=True, score=True)
    engine = Recording(features=features)
    status, answer, headers = serve(engine, limits=RequestLimits(max_tokens=400)).chat(**changes)
    assert status == 200, answer
    assert (engine.samplings[0].max_tokens, headers["x-corral-max-tokens"]) == expected


def test_a_limit_beyond_the_context_is_clamped_to_what_the_prompt_leaves(client: openai.OpenAI) -> None:
    response = client.chat.completions.with_raw_response.create(**(SETTINGS | {"max_tokens": 5000}))
    usage = response.parse().usage
    assert usage
    assert int(response.headers["x-corral-max-tokens"]) == 512 - usage.prompt_tokens


def test_the_sampling_fields_of_other_servers_reach_the_engine(serve: Serve) -> None:
    engine = Recording()
    changes: Any = {
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.2,
        "logit_bias": {"5": -100, "6": 0, "7": 2.5},
        "min_tokens": 3,
        "stop_token_ids": [9],
        "seed": -1,
        "options": {"min_p": 0.1, "top_k": 20, "repeat_penalty": 1.5, "temperature": 0.3},
        "temperature": None,
    }
    status, answer, _ = serve(engine).chat(**changes, max_tokens=10, logprobs=True, top_logprobs=2)
    assert status == 200, answer
    assert engine.samplings == [
        Sampling(
            10,
            temperature=0.3,
            top_k=20,
            min_p=0.1,
            repetition_penalty=1.2,
            frequency_penalty=0.5,
            presence_penalty=-0.5,
            logit_bias=((5, -100.0), (7, 2.5)),
            min_tokens=3,
            stop_ids=(9, *serve.template.stop_ids),
            logprobs=True,
            top_logprobs=2,
        )
    ]


def test_the_most_likely_tokens_beside_each_one_are_those_of_the_model(
    client: openai.OpenAI, tiny_served: ServedModel
) -> None:
    answer = client.chat.completions.create(**SETTINGS, logprobs=True, top_logprobs=3)
    sampling = Sampling(16, temperature=1.0, seed=5, logprobs=True, top_logprobs=3)
    (tokens,) = whole(tiny_served, sampling).tokens
    assert answer.choices[0].logprobs
    content = answer.choices[0].logprobs.content or []
    assert len(content) == len(tokens) > 3
    for shown, token in zip(content, tokens, strict=True):
        assert [top.logprob for top in shown.top_logprobs] == pytest.approx([p for _, p in token.top], rel=1e-4)
        assert [bytes(top.bytes or []) for top in shown.top_logprobs] == [
            tiny_served.answerer.template.token_bytes[id_] for id_, _ in token.top
        ]


def test_so_many_log_probs_that_a_response_would_be_huge_are_refused(serve: Serve) -> None:
    server = serve("Hello", limits=RequestLimits(logprobs=100))
    ok: Any = {"logprobs": True, "top_logprobs": 4, "max_tokens": 10, "temperature": 1}
    assert server.chat(**ok, n=2)[0] == 200
    status, answer, _ = server.chat(**ok, n=3)
    assert (status, answer["error"]["param"]) == (400, "logprobs")


def test_an_answer_that_was_begun_is_continued_as_the_model_would_have_written_it(serve: Serve) -> None:
    prompts: list[list[int]] = []

    def reply(ids: Sequence[int], sampling: Sampling, choice: int) -> list[int]:
        prompts.append([*ids])
        return [50]

    server, template = serve(ScriptedEngine(reply)), serve.template
    begun = [*ASKED, {"role": "assistant", "content": "Two plus", "prefix": True}]
    flags: list[Any] = [{}, {"continue_final_message": True, "add_generation_prompt": False}]
    for changes in flags:
        assert server.chat(messages=begun, **changes)[0] == 200
    assert server.chat(messages=[*ASKED, {"role": "assistant", "content": None}])[0] == 200
    head = template.prompt(CONVERSATION)
    expected = [*head, *template.tokenizer.backend_tokenizer.encode("Two plus", add_special_tokens=False).ids]
    assert prompts == [expected, expected, head]
    for changes, field in (
        ({"messages": begun, "continue_final_message": False}, "continue_final_message"),
        ({"messages": begun, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"continue_final_message": True}, "continue_final_message"),
    ):
        status, answer, _ = server.chat(**changes)
        assert (status, answer["error"]["param"]) == (400, field)


@pytest.mark.parametrize("field", CHANGES)
def test_unsupported_parameters_that_change_the_answer_are_refused_by_name(field: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**(SETTINGS | {field: CHANGES[field]}))
    assert caught.value.param == field
    assert f"'{caught.value.param}'" in caught.value.message
    assert caught.value.type == "invalid_request_error"


MESSAGES: list[tuple[str, Any]] = [
    ("messages[0].content", [{"role": "user", "content": None}]),
    ("messages", [{"role": "user", "content": "a\ufdd0b"}]),  # the template refuses it
    ("messages[0].role", [{"role": "tool", "content": "4", "tool_call_id": "1"}]),
    (
        "messages[0].content[0].type",
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}],
    ),
    ("messages[1].tool_calls", [*ASKED, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, *ASKED]),
    ("messages[0].type", [{"role": "user", "content": "hi", "type": "function_call"}]),
    ("messages[0].content", [{"role": "user", "content": 5}]),
]


@pytest.mark.parametrize(("param", "messages"), MESSAGES, ids=[param for param, _ in MESSAGES])
def test_invalid_messages_are_refused_by_their_position(param: str, messages: Any, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**(SETTINGS | {"messages": messages}))
    assert caught.value.param == param


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("changes", [{"messages": [{"role": "user", "content": "word " * 600}]}])
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
