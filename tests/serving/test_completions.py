"""What OpenAI's own client, and plain requests with vLLM's extensions, get from `/v1/completions`."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Sequence
from typing import Any

import openai
import pytest

from corral.engines.base import Completion, Features, Sampling
from corral.engines.scripted import ScriptedEngine
from corral.serving.completions import start_completions
from corral.serving.models import PlainTextTokenizer, ServedModel
from corral.serving.protocol import RequestLimits
from corral.serving.text_choices import ChoiceBuilder, CompletionRequest
from corral.template import Template
from tests.serving.conftest import COMPLETIONS, Serve, call

TEXT = "What is two plus two? Ünïcode"
SETTINGS: Any = {"model": "tiny", "prompt": TEXT, "seed": 5, "max_tokens": 16}


def ids_of(template: Template, text: str) -> list[int]:
    return template.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


async def generate(served: ServedModel, ids: Sequence[int], sampling: Sampling) -> list[Completion]:
    return await served.answerer.engine.submit(ids, sampling).completions()


def post(url: str, body: Any) -> tuple[int, Any]:
    """(status, body) of one request; of a stream, the data of its events."""
    return call(url, "POST", COMPLETIONS, body)[:2]


def joined(chunks: Sequence[Any]) -> list[dict[str, Any]]:
    """The choices of a stream, put together by hand."""
    choices: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        whole = choices.setdefault(choice["index"], {"text": "", "token_ids": [], "lists": {}, "finish": []})
        whole["text"] += choice["text"]
        whole["token_ids"] += choice["token_ids"] or []
        whole["finish"] += [choice["finish_reason"]] if choice["finish_reason"] else []
        for name, values in (choice["logprobs"] or {}).items():
            whole["lists"].setdefault(name, []).extend(values or [])
    return [choices[i] for i in sorted(choices)]


async def test_a_completion_is_what_the_engine_generates(client: openai.OpenAI, tiny_served: ServedModel) -> None:
    template = tiny_served.answerer.template
    answer = client.completions.create(**SETTINGS, n=3, temperature=0.8, top_p=0.9, extra_body={"top_k": 40})
    sampling = Sampling(16, 3, temperature=0.8, top_p=0.9, top_k=40, seed=5, stop_ids=template.stop_ids)
    expected = await generate(tiny_served, ids_of(template, TEXT), sampling)
    assert [choice.text for choice in answer.choices] == [template.decode(each.ids) for each in expected]
    assert [choice.finish_reason for choice in answer.choices] == [each.finish for each in expected]
    assert len({choice.text for choice in answer.choices}) > 1
    assert answer.usage
    assert answer.usage.prompt_tokens == len(ids_of(template, TEXT))
    assert answer.usage.completion_tokens == sum(len(each.ids) for each in expected)
    assert (answer.object, answer.model) == ("text_completion", "tiny")


def test_a_stream_adds_up_to_the_whole_answer_and_reports_usage_on_request(client: openai.OpenAI) -> None:
    answer = client.completions.create(**SETTINGS, n=3)
    chunks = list(client.completions.create(**SETTINGS, n=3, stream=True, stream_options={"include_usage": True}))
    texts = [
        "".join(c.text for chunk in chunks for c in chunk.choices if c.index == i) for i in range(len(answer.choices))
    ]
    assert texts == [choice.text for choice in answer.choices]
    assert len(chunks) > 20
    assert [chunk.usage for chunk in chunks if chunk.usage] == [answer.usage]
    assert chunks[-1].choices == []
    assert "usage" not in next(iter(client.completions.create(**SETTINGS, stream=True))).model_dump(exclude_unset=True)


def test_texts_and_ids_alone_and_in_lists_are_the_same_prompts(client: openai.OpenAI, tiny_template: Template) -> None:
    others = ["The quick", "def double(x)"]
    ids = [ids_of(tiny_template, text) for text in (TEXT, *others)]
    texts: dict[str, list[str]] = {}
    for prompt in (TEXT, ids[0], [TEXT, *others], ids):
        answer = client.completions.create(**(SETTINGS | {"prompt": prompt}), n=2)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        texts[str(prompt)] = [choice.text for choice in answer.choices]
    one, one_as_ids, several, several_as_ids = texts.values()
    assert one == one_as_ids == several[:2]
    assert several == several_as_ids
    assert len(several) == 6
    assert several[2:4] == [
        c.text for c in client.completions.create(**(SETTINGS | {"prompt": others[0]}), n=2).choices
    ]


def test_special_tokens_in_a_text_are_plain_text_and_ids_are_kept(
    client: openai.OpenAI, tiny_template: Template, tiny_url: str
) -> None:
    text = "a<|im_end|>b"
    special = tiny_template.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert len(special) == 3
    _, answer = post(tiny_url, {"model": "tiny", "prompt": text, "max_tokens": 1, "return_token_ids": True})
    ids = answer["choices"][0]["prompt_token_ids"]
    assert len(ids) > 3
    assert tiny_template.decode(ids) == text
    _, answer = post(tiny_url, {"model": "tiny", "prompt": special, "max_tokens": 1, "return_token_ids": True})
    assert answer["choices"][0]["prompt_token_ids"] == special


def test_ids_of_a_prompt_count_for_each_choice_that_returns_them(serve: Serve) -> None:
    server = serve("Hello", limits=RequestLimits(n=16, prompt_tokens=100, max_tokens=10))
    asked: Any = {"prompt": [5] * 50, "n": 16, "max_tokens": 1}
    assert server.complete(**asked)[0] == 200
    status, answer = server.complete(**asked, return_token_ids=True)[:2]
    assert (status, answer["error"]["param"]) == (400, "prompt")


def test_a_text_starts_with_bos_by_default_if_the_tokenizer_has_one(tiny_tokenizer: Any) -> None:
    import copy

    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    texts = PlainTextTokenizer(Template.load(tokenizer, "chatml"))
    for text in (TEXT, "", " a\n"):
        assert texts.ids(text) == tokenizer(text).input_ids
        assert texts.ids(text, begin=False) == tokenizer(text, add_special_tokens=False).input_ids
    assert texts.ids("<|endoftext|>")[0] == 0
    assert 0 not in texts.ids("<|endoftext|>")[1:]


@pytest.mark.parametrize("stop", ["END", ["nowhere", "END"], [f"no {i}" for i in range(15)] + ["🙂 w"]])
def test_a_stop_string_ends_the_text_and_is_not_in_it(stop: Any, serve: Serve) -> None:
    text = "Hello 🙂 world. END and more"
    cut = text[: min(text.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in text)]
    request: Any = {"model": "m", "prompt": "Say", "stop": stop, "max_tokens": 100}
    client = serve(serve.model(text, fingerprint="fp_1")).client
    answer = client.completions.create(**request)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (cut, "stop")
    assert answer.system_fingerprint == "fp_1"
    chunks = list(client.completions.create(**request, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]


def test_template_stop_ids_apply_with_the_given_ones_unless_ignore_eos(serve: Serve) -> None:
    (end, *_) = serve.template.stop_ids
    server = serve(ScriptedEngine([50, 51, end, 52, 53], chunk=2))
    for extra, ids, finish in (
        ({}, [50, 51], "stop"),
        ({"stop_token_ids": [51]}, [50], "stop"),
        ({"ignore_eos": True}, [50, 51, end, 52, 53], "length"),
        ({"ignore_eos": True, "stop_token_ids": [52]}, [50, 51, end], "stop"),
    ):
        status, answer = server.complete(prompt=[9], max_tokens=5, return_token_ids=True, **extra)
        assert status == 200, answer
        choice = answer["choices"][0]
        assert (choice["token_ids"], choice["finish_reason"]) == (ids, finish)
        assert answer["usage"]["completion_tokens"] == len(ids)


def test_a_completion_may_finish_a_character_begun_in_the_prompt(serve: Serve) -> None:
    token_to_id = serve.template.tokenizer.backend_tokenizer.token_to_id
    ids = [id_ for id_ in map(token_to_id, "ðŁĻĤ") if id_ is not None]  # the bytes of 🙂, one by one
    assert len(ids) == 4
    _, answer = serve(ScriptedEngine(ids[2:])).complete(prompt=ids[:2], echo=True, logprobs=0)
    (choice,) = answer["choices"]
    assert choice["text"] == "🙂"
    assert choice["logprobs"]["tokens"] == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x99", "bytes:\\x82"]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_no_new_tokens_is_the_engines_score_of_the_prompt(
    stream: bool, tiny_url: str, tiny_served: ServedModel
) -> None:
    ids = [1, *ids_of(tiny_served.answerer.template, TEXT)]
    body = {"model": "tiny", "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0, "stream": stream}
    status, answer = post(tiny_url, body)
    assert status == 200, answer
    choice = (answer[0] if stream else answer)["choices"][0]
    assert len(answer) == 2 if stream else answer["usage"]["completion_tokens"] == 0
    first, *others = choice["logprobs"]["token_logprobs"]
    assert first is None
    assert others == pytest.approx(asyncio.run(tiny_served.answerer.engine.score(ids)), abs=1e-5)
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    offsets = choice["logprobs"]["text_offset"]
    pieces = [TEXT[a:b] for a, b in itertools.pairwise([*offsets, len(TEXT)])]
    assert "".join(pieces) == TEXT
    assert [t for t, p in zip(choice["logprobs"]["tokens"], pieces, strict=True) if t != p and "bytes:" not in t] == [
        "<|im_start|>"
    ]


@pytest.mark.parametrize("extra", [{}, {"echo": True}, {"echo": True, "logprobs": 1}, {"n": 3, "logprobs": 0}], ids=str)
def test_a_stream_with_ids_and_log_probs_is_the_whole_answer(extra: Any, tiny_url: str) -> None:
    body: Any = SETTINGS | {"prompt": [TEXT, "The"], "max_tokens": 8, "return_token_ids": True, "temperature": 0.7}
    _, whole = post(tiny_url, body | extra)
    _, events = post(tiny_url, body | extra | {"stream": True})
    assert events[-1] == "[DONE]"
    for choice, streamed in zip(whole["choices"], joined(events[:-1]), strict=True):
        assert streamed["text"] == choice["text"]
        assert streamed["token_ids"] == choice["token_ids"]
        assert streamed["finish"] == [choice["finish_reason"]]
        for name, values in (choice["logprobs"] or {}).items():
            if name == "top_logprobs":
                assert len(streamed["lists"][name]) == len(values or [])
            elif name == "token_logprobs":
                known = [value for value in values if value is not None]
                assert [v for v in streamed["lists"][name] if v is not None] == pytest.approx(known, abs=1e-4)
            else:
                assert streamed["lists"][name] == values


def test_the_most_likely_tokens_of_an_answer_are_those_of_the_model(tiny_url: str, tiny_served: ServedModel) -> None:
    body = {"model": "tiny", "prompt": TEXT, "max_tokens": 4, "logprobs": 3, "seed": 3, "ignore_eos": True}
    template = tiny_served.answerer.template
    for temperature in (0, 1):
        choice = post(tiny_url, body | {"temperature": temperature, "return_token_ids": True})[1]["choices"][0]
        ids, logprobs = ids_of(template, TEXT), choice["logprobs"]
        scores = asyncio.run(tiny_served.answerer.engine.score_top([*ids, *choice["token_ids"]], len(ids), 3))
        for score, own, tops in zip(scores, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
            assert own == pytest.approx(score.logprob, abs=1e-4)
            assert max(tops.values()) == pytest.approx(score.top[0][1], abs=1e-4)
            assert 1 <= len(tops) <= 4
        if temperature == 0:
            assert [max(tops.values()) for tops in logprobs["top_logprobs"]] == logprobs["token_logprobs"]
        named = body | {"temperature": temperature, "return_tokens_as_token_ids": True}
        logprobs = post(tiny_url, named)[1]["choices"][0]["logprobs"]
        assert logprobs["tokens"] == [f"token_id:{id_}" for id_ in choice["token_ids"]]
        for score, own, tops in zip(scores, logprobs["tokens"], logprobs["top_logprobs"], strict=True):
            assert set(tops) == {own, *(f"token_id:{id_}" for id_, _ in score.top)}


def lm_eval_reads(answer: Any, context: int) -> tuple[float, bool]:
    """A sum of log-probs and "greedy", read out of the answer in the places where lm-eval 0.4.13 reads them."""
    logprobs = answer["choices"][0]["logprobs"]
    values = logprobs["token_logprobs"][context:-1]
    most = [max(each.values()) for each in logprobs["top_logprobs"][context:-1]]
    return sum(values), values == most


async def test_lm_evals_log_likelihoods_are_right_even_where_the_model_would_stop(
    tiny_url: str, tiny_served: ServedModel
) -> None:
    engine, template = tiny_served.answerer.engine, tiny_served.answerer.template
    context = ids_of(template, TEXT)
    (greedy,) = await generate(tiny_served, context, Sampling(5))
    for ids in ([*context, *greedy.ids], [*context, *greedy.ids[:3], 60, 61], [*context, 44]):
        # As lm-eval asks: one token is drawn beside those scored, and left out by the place where it must stand.
        body: Any = {"model": "tiny", "prompt": [ids], "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
        (own,) = await generate(tiny_served, context, Sampling(len(ids) - len(context)))
        (after,) = await generate(tiny_served, ids, Sampling(1))
        for ends in ([], list(after.ids)):
            status, answer = post(tiny_url, body | {"seed": 1234, "stop_token_ids": ends})
            assert status == 200, answer
            assert answer["choices"][0]["finish_reason"] == ("stop" if ends else "length")
            total, is_greedy = lm_eval_reads(answer, len(context))
            assert total == pytest.approx(sum(await engine.score(ids, len(context))), abs=1e-4)
            assert is_greedy == (list(own.ids) == ids[len(context) :])


def test_an_engine_without_alternatives_gives_its_own_greedy_tokens_and_refuses_more(serve: Serve) -> None:
    features = Features(max_length=500, vocabulary=400, logprobs=True, score=True)
    server = serve(ScriptedEngine([50, 51], features=features, name="plain"))
    body: Any = {"prompt": [9], "max_tokens": 2, "ignore_eos": True}
    for temperature in (0, 1):
        logprobs = server.complete(**body, logprobs=1, temperature=temperature)[1]["choices"][0]["logprobs"]
        own = [{token: value} for token, value in zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)]
        assert logprobs["top_logprobs"] == (own if temperature == 0 else [None] * 2)
    for changes, field in (
        ({"logprobs": 2}, "logprobs"),
        ({"logprobs": 1, "echo": True}, "logprobs"),
        ({"min_p": 0.1}, "min_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"logit_bias": {"50": 1}}, "logit_bias"),
        ({"min_tokens": 1}, "min_tokens"),
    ):
        status, answer = server.complete(**body, **changes)
        assert (status, answer["error"]["param"]) == (400, field), answer
        assert "'plain'" in answer["error"]["message"]


REFUSED: Any = {
    "prompt": [[], [1, "a"], [[1], []], [1.5], [True], {"text": "a"}, None, 5, "a\ufdd0b", "", [-1], [10**6]],
    "max_tokens": [0, -3, 2.5, "many"],
    "logprobs": [21, -1, True],
    "n": [17, 0],
    "stop": [[f"{i}" for i in range(17)], "x" * 300],
    "stop_token_ids": [[-1], [1] * 129, "a"],
    "best_of": [2],
    "suffix": ["!"],
    "repetition_penalty": [0, -1],
    "min_p": [1.1],
    "logit_bias": [{"50": 101}, {"a": 1}, {"-5": 1}, {"1000000": 1}, {str(i): 1 for i in range(2000)}, [50]],
    "use_beam_search": [True],
    "typical_p": [0.9],
    "temperature": [3],
    "seed": [2**63],
}


@pytest.mark.parametrize("field", REFUSED)
def test_invalid_or_unsupported_parameters_are_refused_by_name(field: str, tiny_url: str) -> None:
    for value in REFUSED[field]:
        status, answer = post(tiny_url, SETTINGS | {field: value})
        assert status == 400, (value, answer)
        assert str(answer["error"]["param"]).startswith(field), (value, answer)
        assert answer["error"]["type"] == "invalid_request_error"


def test_unknown_models_and_too_many_or_too_long_prompts_are_refused(tiny_url: str) -> None:
    assert post(tiny_url, SETTINGS | {"model": "gpt"})[0] == 404
    assert post(tiny_url, SETTINGS | {"prompt": ["a"] * 65})[1]["error"]["param"] == "prompt"
    for body in ({"prompt": [50] * 512, "max_tokens": 1}, {"prompt": [50] * 512}):
        status, answer = post(tiny_url, SETTINGS | body | {"stream": True})
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    scored = {"prompt": [50] * 512, "max_tokens": 0, "echo": True, "logprobs": 0}
    assert post(tiny_url, SETTINGS | scored)[0] == 200
    assert post(tiny_url, SETTINGS | scored | {"prompt": [50] * 513})[0] == 400


def test_hundreds_of_thousands_of_token_ids_are_refused_at_once(tiny_url: str) -> None:
    status, answer = post(tiny_url, SETTINGS | {"prompt": [7] * 300_000})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


SMALL = RequestLimits(prompt_tokens=10, n=2, max_tokens=5)
SCORED = {"prompt": [[50] * 8] * 2, "max_tokens": 0, "echo": True, "logprobs": 1}


@pytest.mark.parametrize(
    ("limits", "body", "param"),
    [
        (RequestLimits(), {"prompt": ["a"] * 4, "n": 16}, None),
        (RequestLimits(), {"prompt": ["a"] * 5, "n": 13}, "n"),
        (RequestLimits(), {"prompt": ["a"] * 64}, None),
        (RequestLimits(), {"prompt": ["a"] * 64, "n": 2}, "n"),
        (SMALL, {"prompt": [50] * 10, "max_tokens": 5, "n": 2}, None),
        (SMALL, {"prompt": [[50] * 5] * 2, "max_tokens": 5}, None),
        (SMALL, {"prompt": [[50] * 6] * 2, "max_tokens": 5}, "prompt"),
        (SMALL, {"prompt": [[50] * 2] * 2}, None),
        (SMALL, {"prompt": [[50] * 3] * 3}, "prompt"),
        (SMALL, SCORED | {"prompt": [[50] * 10] * 2}, None),
        (SMALL, SCORED | {"prompt": [[50] * 10] * 3}, "prompt"),
        (SMALL, {"prompt": [50] * 10, "max_tokens": 1, "n": 2, "echo": True}, "prompt"),
        (RequestLimits(logprobs=32), SCORED, None),
        (RequestLimits(logprobs=31), SCORED, "logprobs"),
        (RequestLimits(logprobs=31), SCORED | {"logprobs": 0}, None),
        (RequestLimits(logprobs=31), {"prompt": [[50] * 8] * 2, "max_tokens": 1, "logprobs": 1}, None),
        (RequestLimits(), SCORED | {"prompt": [[50] * 2000] * 17, "logprobs": 20}, "logprobs"),
        (RequestLimits(prompt_characters=20), {"prompt": ["a" * 20, "a"]}, None),
        (RequestLimits(prompt_characters=20), {"prompt": ["a", "a" * 21]}, "prompt"),
    ],
)
def test_total_choices_and_tokens_and_characters_of_each_prompt_are_bounded(
    limits: RequestLimits, body: Any, param: str | None, serve: Serve
) -> None:
    choices: list[int] = []

    def reply(ids: Sequence[int], sampling: Sampling, choice: int) -> list[int]:
        choices.append(choice)
        return [50]

    status, answer = serve(ScriptedEngine(reply), limits=limits).complete(**body)
    if param is None:
        assert status == 200, answer
    else:
        assert (status, answer["error"]["param"]) == (400, param), answer
        assert not choices


async def test_a_long_prompt_is_echoed_without_blocking_the_event_loop(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = Features(max_length=16384, vocabulary=400, logprobs=True, score=True)
    served = serve.model(ScriptedEngine([50], features=features, logprob=-0.1))
    may_go_on = threading.Event()
    prompt_part = ChoiceBuilder.prompt_part

    def held(*arguments: Any) -> Any:
        assert may_go_on.wait(10), "the loop stood still"
        return prompt_part(*arguments)

    monkeypatch.setattr(ChoiceBuilder, "prompt_part", held)
    request = CompletionRequest.model_validate(
        {"model": "m", "prompt": [50] * 8000, "max_tokens": 0, "echo": True, "logprobs": 0}
    )
    handler = await start_completions(served, request)
    asyncio.get_running_loop().call_later(0.01, may_go_on.set)
    (choice,) = json.loads(await handler.result())["choices"]
    assert len(choice["logprobs"]["tokens"]) == 8000


async def test_long_texts_are_tokenised_without_blocking_the_event_loop(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve.model(ScriptedEngine([50]))
    may_go_on = threading.Event()
    ids = served.plain_text.ids

    def held(text: str, *, begin: bool = True) -> list[int]:
        assert may_go_on.wait(10), "the loop stood still"
        return ids(text, begin=begin)

    monkeypatch.setattr(served.plain_text, "ids", held)
    asyncio.get_running_loop().call_later(0.01, may_go_on.set)
    request = CompletionRequest.model_validate({"model": "m", "prompt": ["word " * 500] * 2, "return_token_ids": True})
    answer = json.loads(await (await start_completions(served, request)).result())
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [ids("word " * 500)] * 2


def test_log_probs_of_an_engine_that_has_none_are_refused(serve: Serve) -> None:
    features = Features(max_length=500, vocabulary=400, logprobs=True, score=False)
    server = serve(ScriptedEngine([50], features=features))
    assert server.complete(prompt="a", logprobs=0)[0] == 200
    status, answer = server.complete(prompt="a", logprobs=0, echo=True)
    assert (status, answer["error"]["param"]) == (400, "logprobs")
