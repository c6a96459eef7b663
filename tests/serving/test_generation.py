"""What a server does with a question: prompting, votes, limits; as OpenAI's client meets it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import openai
import pytest

from corral.answering.answerer import Answerer
from corral.answering.consensus import Consensus
from corral.engines.base import Features, Generation, Sampling
from corral.engines.scripted import ScriptedEngine
from corral.errors import EngineUnavailableError
from corral.messages import Conversation
from corral.prompting.few_shot import STEP_BY_STEP, Prompting
from corral.serving.generation import ServedModel, finish_reason
from corral.serving.protocol import Refused, RequestLimits
from corral.template import Template
from tests.serving.conftest import openai_client, serve_in_thread
from tests.serving.test_app import CHAT, call

ASKED: Any = [{"role": "user", "content": "What is two plus two?"}]
SAID = ("The answer is 4.", "The answer is 5.", "The answer is 4.")


class Candidates:
    """An engine that gives each choice a text of its own, and how it was asked."""

    def __init__(self, template: Template, texts: Sequence[str] = SAID, **engine: Any) -> None:
        encode = template.tokenizer.backend_tokenizer.encode
        self._ids = [encode(text, add_special_tokens=False).ids for text in texts]
        self.asked: list[Sampling] = []
        self.prompts: list[list[int]] = []
        self.engine = ScriptedEngine(self._reply, **engine)

    def _reply(self, ids: Sequence[int], sampling: Sampling, choice: int) -> Iterator[int]:
        if choice == 0:
            self.asked.append(sampling)
            self.prompts.append([*ids])
        return iter(self._ids[choice % len(self._ids)])


def vote_of(answer: Any) -> dict[str, Any]:
    return answer.model_extra["consensus"]


def test_a_vote_returns_its_winner_and_lists_every_candidate(tiny_template: Template) -> None:
    said = Candidates(tiny_template)
    served = ServedModel(Answerer(said.engine, tiny_template), "m")
    wish = {"method": "majority", "n": 3, "stop": "never"}
    with serve_in_thread(served) as url, openai_client(url) as client:
        answer = client.chat.completions.create(model="m", messages=ASKED, extra_body={"consensus": wish})
        plain = client.chat.completions.create(model="m", messages=ASKED)
    assert [(c.index, c.message.content, c.finish_reason) for c in answer.choices] == [(0, SAID[0], "stop")]
    candidates = [
        {"text": text, "finish_reason": "stop", "score": score, "result": result}
        for text, score, result in zip(SAID, (2 / 3, 1 / 3, 2 / 3), ("4", "5", "4"), strict=True)
    ]
    assert vote_of(answer) == {"method": "majority", "winner": 0, "candidates": candidates, "cancelled": 0}
    assert answer.usage
    assert answer.usage.completion_tokens == sum(len(tiny_template.tokenizer.tokenize(text)) for text in SAID)
    assert [(s.n, s.temperature, s.top_p) for s in said.asked] == [(3, 0.7, 0.9), (1, 0.0, 1.0)]
    assert "consensus" not in (plain.model_extra or {})


def test_a_stream_with_a_vote_sends_the_winner_and_ends_with_the_vote(tiny_template: Template) -> None:
    said = Candidates(tiny_template, ("wrong", "right", "right"))
    served = ServedModel(Answerer(said.engine, tiny_template), "m")
    body = {"consensus": {"method": "rouge-l", "n": 3, "stop": "never"}}
    with serve_in_thread(served) as url, openai_client(url) as client:
        asked: Any = {"model": "m", "messages": ASKED, "extra_body": body}
        whole = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert {choice.index for chunk in chunks for choice in chunk.choices} == {0}
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == "right"
    ends = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert [vote_of(chunk) for chunk in ends] == [vote_of(whole)]
    assert [chunk for chunk in chunks if "consensus" in (chunk.model_extra or {})] == ends
    assert chunks[-1].usage == whole.usage


def test_candidates_that_cannot_change_the_choice_are_reported_as_cancelled(tiny_template: Template) -> None:
    long = "The answer is 5. " * 50
    said = Candidates(tiny_template, (SAID[0], long, SAID[0], long, SAID[0]), delay_seconds=0.001)
    served = ServedModel(Answerer(said.engine, tiny_template), "m")
    with serve_in_thread(served) as url, openai_client(url) as client:
        answer = client.chat.completions.create(
            model="m", messages=ASKED, extra_body={"consensus": {"method": "majority", "n": 5}}
        )
    vote = vote_of(answer)
    assert vote["cancelled"] == 2
    assert [each["finish_reason"] for each in vote["candidates"]] == ["stop", "cancelled"] * 2 + ["stop"]
    assert [each["score"] for each in vote["candidates"]] == [1.0, None] * 2 + [1.0]


def test_the_servers_vote_setting_is_the_default_for_requests(tiny_template: Template) -> None:
    said = Candidates(tiny_template)
    consensus = Consensus("majority", 3, temperature=0.6, top_p=0.8, stop="never")
    served = ServedModel(Answerer(said.engine, tiny_template, consensus=consensus), "m")
    changes: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "top_p": 0.5},
        {"extra_body": {"consensus": {"method": "rouge-l", "n": 2}}},
        {"extra_body": {"consensus": None}},
        {"n": 2},
        {"temperature": 0},
    ]
    with serve_in_thread(served) as url, openai_client(url) as client:
        answers = [client.chat.completions.create(model="m", messages=ASKED, **each) for each in changes]
    methods = [(answer.model_extra or {}).get("consensus", {}).get("method") for answer in answers]
    assert methods == ["majority", "majority", "rouge-l", None, None, None]
    drawn = [(s.n, s.temperature, s.top_p) for s in said.asked]
    assert drawn == [(3, 0.6, 0.8), (3, 0.9, 0.5), (2, 0.6, 0.8), (1, 0, 1), (2, 1, 1), (1, 0, 1)]


WISHES: Any = {
    "n": {"n": 2, "consensus": {"method": "majority"}},
    "temperature": {"temperature": 0, "consensus": {"method": "majority"}},
    "consensus.n": {"consensus": {"method": "majority", "n": 17}},
    "consensus.method": {"consensus": {"method": "cosine"}},
    "consensus": {"consensus": {"method": "rouge-l", "stop": "adaptive"}},
    "consensus.shots": {"consensus": {"method": "rouge-l", "shots": "/etc/passwd"}},
}


@pytest.mark.parametrize("param", WISHES)
def test_an_impossible_vote_is_refused_by_name(param: str, tiny_template: Template) -> None:
    said = Candidates(tiny_template)
    served = ServedModel(Answerer(said.engine, tiny_template), "m")
    with serve_in_thread(served) as url, openai_client(url) as client, pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=ASKED, extra_body=WISHES[param])
    assert caught.value.param == param
    assert not said.asked


def test_a_vote_by_meaning_uses_the_servers_embeddings(tiny_template: Template) -> None:
    def embed(texts: Sequence[str]) -> Any:
        return np.array([[1.0, 0.0] if "4" in text else [0.0, 1.0] for text in texts])

    said = Candidates(tiny_template)
    served = ServedModel(Answerer(said.engine, tiny_template), "m", embed=embed)
    body = {"consensus": {"method": "cosine", "n": 3, "stop": "never"}}
    with serve_in_thread(served) as url, openai_client(url) as client:
        answer = client.chat.completions.create(model="m", messages=ASKED, extra_body=body)
    assert [each["score"] for each in vote_of(answer)["candidates"]] == [0.5, 0.0, 0.5]


EXAMPLES = [Conversation.from_turns(("user", f"What is {i} plus {i}?"), ("assistant", f"{2 * i}.")) for i in range(6)]


def test_the_prompting_of_the_model_applies_and_its_examples_are_counted(tiny_template: Template) -> None:
    said = Candidates(tiny_template)
    prompting = Prompting(EXAMPLES, 2, reasoning=True)
    answerer = Answerer(said.engine, tiny_template, prompting=prompting)
    with serve_in_thread(ServedModel(answerer, "m")) as url, openai_client(url) as client:
        answer = client.chat.completions.create(model="m", messages=ASKED, max_tokens=16)
    conversation = Conversation.from_turns(("user", ASKED[0]["content"]))
    expected = asyncio.run(answerer.encode_prompt(conversation, Sampling(16)))
    assert said.prompts == [expected]
    assert answer.usage
    assert answer.usage.prompt_tokens == len(expected)
    text = tiny_template.tokenizer.decode(expected)
    assert STEP_BY_STEP in text
    assert text.count("<|im_start|>assistant") == 3


def test_examples_are_dropped_to_fit_the_requested_answer(tiny_template: Template) -> None:
    features = Features(max_length=200, vocabulary=400, logprobs=True, score=True)
    said = Candidates(tiny_template, features=features)
    answerer = Answerer(said.engine, tiny_template, Sampling(20), prompting=Prompting(EXAMPLES, 2))
    with serve_in_thread(ServedModel(answerer, "m")) as url, openai_client(url) as client:
        for most in (None, 170):
            client.chat.completions.create(model="m", messages=ASKED, max_tokens=most)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="m", messages=ASKED, max_tokens=199)
    with_examples, without = map(len, said.prompts)
    assert without + 170 <= 200 < with_examples + 170
    assert without == len(tiny_template.prompt(Conversation.from_turns(("user", ASKED[0]["content"]))))


@pytest.mark.parametrize(
    ("limits", "changes", "param"),
    [
        (RequestLimits(max_tokens=8), {"max_tokens": 9}, "max_tokens"),
        (RequestLimits(max_tokens=8), {"max_completion_tokens": 9}, "max_tokens"),
        (RequestLimits(prompt_tokens=8), {}, "messages"),
    ],
)
def test_more_tokens_than_the_servers_limit_are_refused(
    limits: RequestLimits, changes: Any, param: str, tiny_template: Template
) -> None:
    said = Candidates(tiny_template)
    served = ServedModel(Answerer(said.engine, tiny_template), "m", limits)
    with serve_in_thread(served) as url, openai_client(url) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="m", messages=ASKED, **changes)
        assert caught.value.param == param
        assert "8" in caught.value.message
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="m", prompt="word " * 20, max_tokens=9)
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="m", prompt="word " * 20, max_tokens=9, echo=True, logprobs=0)
    assert not said.asked


def test_answers_without_max_tokens_are_bounded_by_the_servers_limit(tiny_template: Template) -> None:
    said = Candidates(tiny_template)
    with (
        serve_in_thread(ServedModel(Answerer(said.engine, tiny_template), "m", RequestLimits(max_tokens=8))) as url,
        openai_client(url) as c,
    ):
        c.chat.completions.create(model="m", messages=ASKED)
    assert [sampling.max_tokens for sampling in said.asked] == [8]


class Away(ScriptedEngine):
    """An engine that cannot compute just now."""

    def submit(self, ids: Sequence[int], sampling: Sampling) -> Generation:
        raise EngineUnavailableError("http://10.0.0.7:8000 cannot be reached")


class Broken(ScriptedEngine):
    """An engine that lost what it computes with."""

    @property
    def ready(self) -> bool:
        return False


def test_a_closed_or_broken_engine_gives_503_with_retry_after(
    tiny_template: Template,
) -> None:
    closed = ScriptedEngine([40])
    asyncio.run(closed.close())
    faults: list[tuple[int, dict[str, str]]] = []
    for engine, method, path in ((closed, "POST", CHAT), (Broken([40]), "GET", "/health/ready")):
        served = ServedModel(Answerer(engine, tiny_template), "m")
        with serve_in_thread(served) as url:
            status, _, headers = call(url, method, path, json.dumps({"model": "m", "messages": ASKED}))
            faults.append((status, headers))
    for status, headers in faults:
        assert status == 503
        assert int(headers["retry-after"]) >= 1
    with pytest.raises(Refused) as caught:
        finish_reason("cancelled")
    assert (caught.value.status, (caught.value.retry_seconds or 0) >= 1) == (503, True)


@pytest.mark.parametrize("stream", [False, True])
def test_an_unreachable_engine_gives_503_with_retry_after_and_hides_its_address(
    stream: bool, tiny_template: Template
) -> None:
    served = ServedModel(Answerer(Away([1]), tiny_template), "m")
    with (
        serve_in_thread(served) as url,
        openai_client(url) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.chat.completions.create(model="m", messages=ASKED, stream=stream)
    assert (caught.value.status_code, caught.value.code) == (503, "engine_unavailable")
    assert int(caught.value.response.headers["retry-after"]) > 0
    assert "10.0.0.7" not in json.dumps(caught.value.body)
