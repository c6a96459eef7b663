"""What a server does with a question: prompting, votes, limits; as OpenAI's client meets it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import openai
import pytest

from corral.answering.answerer import Answerer
from corral.answering.consensus import Consensus
from corral.engines.base import Features, Sampling
from corral.engines.scripted import ScriptedEngine
from corral.messages import Conversation
from corral.prompting.few_shot import STEP_BY_STEP, Prompting
from corral.serving.generation import arrange_system, finish_reason
from corral.serving.models import ServedModel
from corral.serving.protocol import Refused, RequestLimits
from corral.template import Template
from tests.serving.conftest import ASKED, Serve

SAID = ("The answer is 4.", "The answer is 5.", "The answer is 4.")


class Candidates(ScriptedEngine):
    """An engine that gives each choice a text of its own, and remembers the sampling and the prompt of each request."""

    def __init__(self, template: Template, texts: Sequence[str] = SAID, **engine: Any) -> None:
        encode = template.tokenizer.backend_tokenizer.encode
        self._ids = [encode(text, add_special_tokens=False).ids for text in texts]
        self.samplings: list[Sampling] = []
        self.prompts: list[list[int]] = []
        super().__init__(self._give, **engine)

    def _give(self, ids: Sequence[int], sampling: Sampling, choice: int) -> Iterator[int]:
        if choice == 0:
            self.samplings.append(sampling)
            self.prompts.append([*ids])
        return iter(self._ids[choice % len(self._ids)])


def chat(client: openai.OpenAI, consensus: dict[str, Any] | None = None, **changes: Any) -> Any:
    request: Any = {"model": "m", "messages": ASKED} | changes
    if consensus:
        request["extra_body"] = {"consensus": consensus}
    return client.chat.completions.create(**request)


def vote_of(answer: Any) -> dict[str, Any]:
    return answer.model_extra["consensus"]


def test_a_vote_returns_its_winner_and_lists_every_candidate(tiny_template: Template, serve: Serve) -> None:
    engine = Candidates(tiny_template)
    client = serve(engine).client
    answer = chat(client, {"method": "majority", "n": 3, "stop": "never"})
    plain = chat(client)
    assert [(c.index, c.message.content, c.finish_reason) for c in answer.choices] == [(0, SAID[0], "stop")]
    candidates = [
        {"text": text, "finish_reason": "stop", "score": score, "result": result}
        for text, score, result in zip(SAID, (2 / 3, 1 / 3, 2 / 3), ("4", "5", "4"), strict=True)
    ]
    assert vote_of(answer) == {"method": "majority", "winner": 0, "candidates": candidates, "cancelled": 0}
    assert answer.usage.completion_tokens == sum(len(tiny_template.tokenizer.tokenize(text)) for text in SAID)
    assert [(s.n, s.temperature, s.top_p) for s in engine.samplings] == [(3, 0.7, 0.9), (1, 0.0, 1.0)]
    assert "consensus" not in (plain.model_extra or {})


def test_a_stream_with_a_vote_sends_the_winner_and_ends_with_the_vote(tiny_template: Template, serve: Serve) -> None:
    client = serve(Candidates(tiny_template, ("wrong", "right", "right"))).client
    wish = {"method": "rouge-l", "n": 3, "stop": "never"}
    whole = chat(client, wish)
    chunks = list(chat(client, wish, stream=True, stream_options={"include_usage": True}))
    assert {choice.index for chunk in chunks for choice in chunk.choices} == {0}
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == "right"
    ends = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert [vote_of(chunk) for chunk in ends] == [vote_of(whole)]
    assert [chunk for chunk in chunks if "consensus" in (chunk.model_extra or {})] == ends
    assert chunks[-1].usage == whole.usage


def test_log_probs_of_a_long_winner_come_in_several_chunks_so_that_others_are_served_between(
    tiny_template: Template, serve: Serve
) -> None:
    long = "The answer is five. " * 10
    client = serve(Candidates(tiny_template, (long, long))).client
    wish = {"method": "rouge-l", "n": 2, "stop": "never"}
    whole = chat(client, wish, logprobs=True).choices[0]
    chunks = [chunk.choices[0] for chunk in chat(client, wish, stream=True, logprobs=True)]
    parts = [choice.logprobs.content for choice in chunks if choice.logprobs]
    assert len(parts) > 2
    assert max(map(len, parts)) == 16
    assert [token for part in parts for token in part] == whole.logprobs.content
    assert "".join(choice.delta.content or "" for choice in chunks) == whole.message.content == long


def test_candidates_that_cannot_change_the_choice_are_reported_as_cancelled(
    tiny_template: Template, serve: Serve
) -> None:
    long = "The answer is 5. " * 50
    engine = Candidates(tiny_template, (SAID[0], long, SAID[0], long, SAID[0]), delay_seconds=0.001)
    vote = vote_of(chat(serve(engine).client, {"method": "majority", "n": 5}))
    assert vote["cancelled"] == 2
    assert [each["finish_reason"] for each in vote["candidates"]] == ["stop", "cancelled"] * 2 + ["stop"]
    assert [each["score"] for each in vote["candidates"]] == [1.0, None] * 2 + [1.0]


def test_the_servers_vote_setting_is_the_default_for_requests(tiny_template: Template, serve: Serve) -> None:
    engine = Candidates(tiny_template)
    consensus = Consensus("majority", 3, temperature=0.6, top_p=0.8, stop="never")
    client = serve(ServedModel(Answerer(engine, tiny_template, consensus=consensus), "m")).client
    changes: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "top_p": 0.5},
        {"extra_body": {"consensus": {"method": "rouge-l", "n": 2}}},
        {"extra_body": {"consensus": None}},
        {"n": 2},
        {"temperature": 0},
    ]
    answers = [chat(client, **each) for each in changes]
    methods = [(answer.model_extra or {}).get("consensus", {}).get("method") for answer in answers]
    assert methods == ["majority", "majority", "rouge-l", None, None, None]
    drawn = [(s.n, s.temperature, s.top_p) for s in engine.samplings]
    assert drawn == [(3, 0.6, 0.8), (3, 0.9, 0.5), (2, 0.6, 0.8), (1, 0, 1), (2, 1, 1), (1, 0, 1)]


WISHES: Any = {
    "n": {"n": 2, "consensus": {"method": "majority"}},
    "temperature": {"temperature": 0, "consensus": {"method": "majority"}},
    "consensus.n": {"consensus": {"method": "majority", "n": 17}},
    "consensus.method": {"consensus": {"method": "cosine"}},
    "consensus": {"consensus": {"method": "rouge-l", "stop": "adaptive"}},
}


@pytest.mark.parametrize("param", WISHES)
def test_an_impossible_vote_is_refused_by_name(param: str, tiny_template: Template, serve: Serve) -> None:
    engine = Candidates(tiny_template)
    status, answer, _ = serve(engine).chat(**WISHES[param])
    assert (status, answer["error"]["param"]) == (400, param)
    assert not engine.samplings


def test_a_vote_by_meaning_uses_the_servers_embeddings(tiny_template: Template, serve: Serve) -> None:
    def embed(texts: Sequence[str]) -> Any:
        return np.array([[1.0, 0.0] if "4" in text else [0.0, 1.0] for text in texts])

    client = serve(serve.model(Candidates(tiny_template), embed=embed)).client
    answer = chat(client, {"method": "cosine", "n": 3, "stop": "never"})
    assert [each["score"] for each in vote_of(answer)["candidates"]] == [0.5, 0.0, 0.5]


EXAMPLES = [Conversation.from_turns(("user", f"What is {i} plus {i}?"), ("assistant", f"{2 * i}.")) for i in range(6)]


def test_the_prompting_of_the_model_applies_and_its_examples_are_counted(tiny_template: Template, serve: Serve) -> None:
    engine = Candidates(tiny_template)
    answerer = Answerer(engine, tiny_template, prompting=Prompting(EXAMPLES, 2, reasoning=True))
    answer = chat(serve(ServedModel(answerer, "m")).client, max_tokens=16)
    conversation = Conversation.from_turns(("user", ASKED[0]["content"]))
    expected = asyncio.run(answerer.encode_prompt(conversation, Sampling(16))).ids
    assert engine.prompts == [expected]
    assert answer.usage.prompt_tokens == len(expected)
    text = tiny_template.tokenizer.decode(expected)
    assert STEP_BY_STEP in text
    assert text.count("<|im_start|>assistant") == 3


def test_examples_are_dropped_to_fit_the_requested_answer(tiny_template: Template, serve: Serve) -> None:
    features = Features(max_length=200, vocabulary=400, logprobs=True, score=True)
    engine = Candidates(tiny_template, features=features)
    answerer = Answerer(engine, tiny_template, Sampling(20), prompting=Prompting(EXAMPLES, 2))
    client = serve(ServedModel(answerer, "m")).client
    for most in (None, 170):
        chat(client, max_tokens=most)
    chat(client, max_tokens=199)
    chat(client, max_tokens=9999)
    with_examples, without, clamped, usual = map(len, engine.prompts)
    assert without + 170 <= 200 < with_examples + 170
    assert (clamped, usual) == (without, with_examples), "a limit beyond the context is no wish for a long answer"
    assert [sampling.max_tokens for sampling in engine.samplings[2:]] == [200 - clamped, 200 - usual]
    assert without == len(tiny_template.prompt(Conversation.from_turns(("user", ASKED[0]["content"]))))


@pytest.mark.parametrize(
    ("limits", "changes", "param"),
    [
        (RequestLimits(max_tokens=8, strict=True), {"max_tokens": 9}, "max_tokens"),
        (RequestLimits(max_tokens=8, strict=True), {"max_completion_tokens": 9}, "max_tokens"),
        (RequestLimits(prompt_tokens=8, strict=True), {}, "messages"),
    ],
)
def test_more_tokens_than_the_servers_limit_are_refused_by_a_strict_server(
    limits: RequestLimits, changes: Any, param: str, tiny_template: Template, serve: Serve
) -> None:
    engine = Candidates(tiny_template)
    server = serve(engine, limits=limits)
    status, answer, _ = server.chat(**changes)
    assert (status, answer["error"]["param"]) == (400, param)
    assert "8" in answer["error"]["message"]
    assert server.complete(prompt="word " * 20, max_tokens=9)[0] == 400
    assert server.complete(prompt="word " * 20, max_tokens=9, echo=True, logprobs=0)[0] == 400
    assert not engine.samplings


LATE = Conversation.from_turns(("user", "a"), ("system", "Be brief."), ("user", "b"), ("system", "Be kind."))


def test_system_messages_stay_where_they_are_if_the_template_renders_them_there(tiny_template: Template) -> None:
    assert tiny_template.renders_any_system
    assert arrange_system(tiny_template, LATE) == LATE


def test_system_messages_become_one_at_the_start_for_a_template_that_takes_no_others(tiny_tokenizer: Any) -> None:
    template = Template.load(tiny_tokenizer, "llama-2")
    assert not template.renders_any_system
    whole = Conversation.from_turns(("system", "Be brief.\n\nBe kind."), ("user", "a"), ("user", "b"))
    assert arrange_system(template, LATE) == whole
    alone = Conversation.from_turns(("system", "Say hello."))
    assert not template.renders_system_alone
    assert arrange_system(template, alone) == Conversation.from_turns(("user", "Say hello."))
    usual = Conversation.from_turns(("system", "Be brief."), ("user", "a"))
    assert arrange_system(template, usual) == usual


def test_later_system_messages_and_one_alone_are_answered(serve: Serve) -> None:
    server = serve("Hello")
    for messages in ([*ASKED, {"role": "system", "content": "Be brief."}], [{"role": "system", "content": "Hi."}]):
        assert server.chat(messages=messages)[0] == 200


def test_an_answer_that_was_begun_is_continued_after_the_examples_of_the_model(
    tiny_template: Template, serve: Serve
) -> None:
    engine = Candidates(tiny_template)
    answerer = Answerer(engine, tiny_template, prompting=Prompting(EXAMPLES, 2, reasoning=True))
    client = serve(ServedModel(answerer, "m")).client
    chat(client, max_tokens=16)
    chat(client, max_tokens=16, messages=[*ASKED, {"role": "assistant", "content": "Two"}])
    asked, begun = engine.prompts
    assert begun[: len(asked)] == asked
    assert tiny_template.decode(begun[len(asked) :]) == "Two"


def test_answers_without_max_tokens_are_bounded_by_the_servers_limit(tiny_template: Template, serve: Serve) -> None:
    engine = Candidates(tiny_template)
    chat(serve(engine, limits=RequestLimits(max_tokens=8)).client)
    assert [sampling.max_tokens for sampling in engine.samplings] == [8]


def test_an_answer_that_the_engine_cancelled_is_503_with_retry_after() -> None:
    with pytest.raises(Refused) as caught:
        finish_reason("cancelled")
    assert (caught.value.status, (caught.value.retry_seconds or 0) >= 1) == (503, True)
