"""The Answerer: conversations in, text out, over any engine, async and sync."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from corral.answering.answerer import Answer, Answerer, TextDelta
from corral.answering.consensus import Ballot, Candidate, Consensus, Method
from corral.answering.sync import SyncAnswerer
from corral.engines.base import Completion, Generation, Sampling
from corral.engines.scripted import ScriptedEngine
from corral.engines.transformers import TransformersEngine
from corral.errors import EngineError, TemplateError
from corral.messages import Conversation, Role
from corral.model.loading import load_model, load_tokenizer
from corral.model.packed_forward import score
from corral.prompting.few_shot import Prompting, insert_examples
from corral.prompting.prompt import Prompt
from corral.template import Template
from corral.template.decoding import StopStringCutter, TokenBytes

QUESTION = Conversation.from_turns(("user", "What is two plus two?"))


@pytest.fixture
def answerer(tiny_folder: Path) -> Answerer:
    return Answerer(TransformersEngine(load_model(tiny_folder)), Template.load(load_tokenizer(tiny_folder)))


def test_streamed_text_equals_the_whole_answer_for_every_choice(answerer: Answerer) -> None:
    sampling = Sampling(max_tokens=24, n=3, temperature=1.0, seed=4)
    with SyncAnswerer(answerer) as sync:
        whole = sync.answer(QUESTION, sampling)
        texts = ["", "", ""]
        finishes = 0
        for delta in sync.stream(QUESTION, sampling):
            texts[delta.choice] += delta.text
            finishes += delta.finish is not None
    assert tuple(texts) == whole.texts
    assert finishes == 3
    assert len(set(texts)) > 1


def test_only_the_answer_of_a_conversation_is_scored(answerer: Answerer, tiny_folder: Path) -> None:
    talk = QUESTION.add("assistant", "Four.")
    encoded = answerer.template.encode(talk)
    with SyncAnswerer(answerer) as sync:
        scored = sync.score(talk)
    first = encoded.trained.index(True)
    (expected,) = score(load_model(tiny_folder), [encoded.ids], [first])
    trained = [p for p, t in zip(expected, encoded.trained[first:], strict=True) if t]
    assert scored.tokens == len(trained)
    assert scored.nll == pytest.approx(-sum(trained), rel=1e-4)


def test_leaving_a_stream_early_cancels_the_request(answerer: Answerer) -> None:
    with SyncAnswerer(answerer) as sync:
        for _ in sync.stream(QUESTION, Sampling(max_tokens=300, temperature=1.0)):
            break
        assert sync.answer(QUESTION, Sampling(max_tokens=4)).completions


def test_many_conversations_at_once(answerer: Answerer) -> None:
    async def work() -> list[str]:
        questions = [Conversation.from_turns(("user", f"{i}?")) for i in range(20)]
        answers = await asyncio.gather(*(answerer.answer(c, Sampling(max_tokens=6)) for c in questions))
        return [a.text for a in answers]

    with SyncAnswerer(answerer) as sync:
        assert len(sync.run(work())) == 20


def test_errors_of_template_and_engine_reach_the_caller(answerer: Answerer) -> None:
    with SyncAnswerer(answerer) as sync:
        with pytest.raises(TemplateError):
            sync.answer(QUESTION.add("user", "non\ufdd0character"))
        with pytest.raises(EngineError, match="exceed"):
            sync.answer(QUESTION, Sampling(max_tokens=10**6))
        with pytest.raises(EngineError, match="exceed"):
            list(sync.stream(QUESTION, Sampling(max_tokens=10**6)))


def cut(text: str, stops: list[str]) -> tuple[str, int]:
    """(text before the stop string that is complete first, where that string ends), on the whole text."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    return (text[: min(ends)[1]], min(ends)[0]) if ends else (text, -1)


def ids_of(tokenizer: Any, text: str, *, by_byte: bool) -> list[int]:
    if not by_byte:
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    pieces = TokenBytes(tokenizer.backend_tokenizer)
    id_of_byte = {pieces[i]: i for i in range(len(tokenizer)) if len(pieces[i]) == 1}
    return [id_of_byte[bytes([b])] for b in text.encode()]


def ask(answerer: Answerer, sampling: Sampling, stops: list[str]) -> tuple[Answer, list[TextDelta]]:
    async def work() -> tuple[Answer, list[TextDelta]]:
        return await answerer.answer(QUESTION, sampling, stops), [
            d async for d in answerer.stream(QUESTION, sampling, stops)
        ]

    return asyncio.run(work())


WORDS = st.text(st.sampled_from("ab \né🙂"), max_size=24)
STOPS = st.lists(st.text(st.sampled_from("ab \né🙂"), min_size=1, max_size=5), max_size=4)


def test_tokens_carry_the_most_likely_ids_at_their_places(tiny_tokenizer: Any) -> None:
    ids = ids_of(tiny_tokenizer, "hello", by_byte=True)
    for count in (0, 3):
        sampling = Sampling(logprobs=True, top_logprobs=count)
        answer, deltas = ask(Answerer(ScriptedEngine(ids), Template.load(tiny_tokenizer, "chatml")), sampling, [])
        expected = [tuple((id_ + i, -0.5 - i) for i in range(count)) for id_ in ids]
        assert [token.top for token in answer.tokens[0]] == expected
        assert [token.top for delta in deltas for token in delta.tokens] == expected


@given(text=WORDS, stops=STOPS, chunk=st.integers(1, 7), by_byte=st.booleans(), logprobs=st.booleans())
@example(text="a🙂b", stops=["🙂b", "a🙂c"], chunk=1, by_byte=True, logprobs=True)
@example(text="abab", stops=["bab", "abab", "ba\n"], chunk=3, by_byte=False, logprobs=True)
def test_streaming_in_any_chunks_is_the_whole_text_cut_at_the_first_stop_string(
    text: str, stops: list[str], chunk: int, by_byte: bool, logprobs: bool, template: Template
) -> None:
    ids = ids_of(template.tokenizer, text, by_byte=by_byte)
    engine = ScriptedEngine(ids, chunk=chunk)
    answer, deltas = ask(Answerer(engine, template), Sampling(max_tokens=500, n=2, logprobs=logprobs), stops)
    expected, end = cut(text, stops)
    assert answer.texts == (expected, expected)
    for choice, completion in enumerate(answer.completions):
        mine = [d for d in deltas if d.choice == choice]
        assert "".join(d.text for d in mine) == expected
        assert [d.finish for d in mine if d.finish] == ["stop"] == [mine[-1].finish]
        # Of the ids, those that completed the stop string are the last; of the tokens, those that begin in the text.
        sizes = list(accumulate((len(template.token_bytes[i]) for i in ids), initial=0))
        used = next(i for i, size in enumerate(sizes) if size >= len(text[:end].encode())) if end >= 0 else len(ids)
        assert completion.ids == tuple(ids[:used])
        assert completion.logprobs == ((-0.5,) * used if logprobs else None)
        tokens = [token for d in mine for token in d.tokens]
        if logprobs:
            begins = [len(text.encode()[:size].decode(errors="ignore")) for size in sizes[:used]]
            assert [t.id for t in tokens] == [i for i, at in zip(ids, begins, strict=False) if at < len(expected)]
            assert tuple(tokens) == answer.tokens[choice]
            assert b"".join(t.data for t in tokens).decode(errors="ignore").startswith(expected)
        else:
            assert tokens == []
            assert answer.tokens == ()


@given(text=WORDS, stops=STOPS, chunk=st.integers(1, 7))
def test_only_text_that_may_become_a_stop_string_is_held_back(
    text: str, stops: list[str], chunk: int, tiny_tokenizer: Any
) -> None:
    """After each push, all text is emitted but for its longest suffix that begins a stop string."""
    cutter = StopStringCutter(stops)
    given_text = ""
    for at in range(0, len(text), chunk):
        given_text += cutter.push(text[at : at + chunk])
        if cutter.stopped:
            break
        so_far = text[: at + chunk]
        held = next((i for i in range(len(so_far)) if any(s.startswith(so_far[i:]) for s in stops)), len(so_far))
        assert given_text == so_far[:held]
    assert given_text + cutter.finish() == cut(text, stops)[0]


async def test_a_stop_string_cancels_its_choice_in_the_engine_while_others_go_on(tiny_tokenizer: Any) -> None:
    texts = {0: "one END" + " more" * 50, 1: "two" + " more" * 50}
    cancelled: list[int | None] = []

    class Watched(ScriptedEngine):
        def submit(self, ids: Any, sampling: Sampling) -> Generation:
            generation = super().submit(ids, sampling)
            cancel = generation.cancel
            generation.cancel = lambda choice=None: (cancelled.append(choice), cancel(choice))[1]  # type: ignore[method-assign]
            return generation

    engine = Watched(lambda ids, sampling, choice: ids_of(tiny_tokenizer, texts[choice], by_byte=True))
    answerer = Answerer(engine, Template.load(tiny_tokenizer, "chatml"))
    stream = answerer.start(Prompt([1, 2, 3]), Sampling(max_tokens=100, n=2), ["END"])
    answer = await stream.collect()
    assert answer.texts == ("one ", texts[1][:100])
    assert [c.finish for c in answer.completions] == ["stop", "length"]
    assert (stream.prompt_tokens, stream.completion_tokens) == (3, len("one END") + 100)
    assert cancelled[0] == 0


def test_special_tokens_and_half_characters_carry_their_log_probs(tiny_tokenizer: Any) -> None:
    half = ids_of(tiny_tokenizer, "🙂", by_byte=True)[:2]
    engine = ScriptedEngine([0, *half])  # 0 is a special token, and none that ends an answer
    answer, _ = ask(Answerer(engine, Template.load(tiny_tokenizer, "chatml")), Sampling(logprobs=True), [])
    assert answer.text == "\ufffd"
    assert [t.data for t in answer.tokens[0]] == [b"", b"\xf0", b"\x9f"]


def test_an_empty_stop_string_is_refused(answerer: Answerer) -> None:
    with SyncAnswerer(answerer) as sync, pytest.raises(EngineError, match="empty"):
        sync.answer(QUESTION, stop=[""])


def replying(template: Template, *texts: str) -> ScriptedEngine:
    """An engine whose choices reply with these texts, one each."""
    return ScriptedEngine(lambda ids, sampling, choice: template.tokenizer.encode(texts[choice % len(texts)]))


def test_with_consensus_the_answer_is_the_winner_and_holds_all_choices(template: Template) -> None:
    seen: list[Sampling] = []
    texts = ("It is 5", "It makes 18", "I say 18", "18", "maybe 4")

    def reply(ids: Sequence[int], sampling: Sampling, choice: int) -> list[int]:
        seen.append(sampling)
        return template.tokenizer.encode(texts[choice])

    answerer = Answerer(ScriptedEngine(reply), template, consensus=Consensus("majority", 5, stop="never"))
    with SyncAnswerer(answerer) as sync:
        answer = sync.answer(QUESTION, Sampling(max_tokens=30, seed=3))
        streamed = list(sync.stream(QUESTION, Sampling(max_tokens=30, seed=3)))
    assert {(s.n, s.temperature, s.top_p, s.max_tokens, s.seed) for s in seen} == {(5, 0.7, 0.9, 30, 3)}
    assert answer.texts == texts
    assert answer.vote is not None
    assert answer.vote.results == ("5", "18", "18", "18", "4")
    assert answer.text == texts[answer.vote.winner] == "It makes 18"
    assert [d.text for d in streamed] == ["It makes 18"]
    assert streamed[0].finish == "stop"


def test_choices_that_cannot_change_the_vote_are_cancelled_in_the_engine(template: Template) -> None:
    drawn: list[int] = []

    def reply(ids: Sequence[int], sampling: Sampling, choice: int) -> Iterator[int]:
        for id_ in template.tokenizer.encode("18" if choice < 3 else "a very long story " * 40):
            drawn.append(id_)
            yield id_

    with SyncAnswerer(Answerer(ScriptedEngine(reply), template, consensus=Consensus("majority", 5))) as sync:
        answer = sync.answer(QUESTION, Sampling(max_tokens=500))
        assert answer.vote is not None
        assert (answer.vote.cancelled, answer.text) == (2, "18")
        assert [c.finish for c in answer.completions] == ["stop"] * 3 + ["cancelled"] * 2
        assert answer.vote.scores[3:] == (None, None)
        before = len(drawn)
        sync.run(asyncio.sleep(0.1))
        assert len(drawn) == before, "the engine still works for nobody"


@pytest.mark.parametrize("method", ["majority", "rouge-l", "rouge-l+math"])
def test_answers_are_read_and_compared_without_blocking_the_event_loop(template: Template, method: Method) -> None:
    readers: set[int] = set()

    class LoggingBallot(Ballot):
        def _result(self, text: str) -> str | None:
            readers.add(threading.get_ident())
            return super()._result(text)

        def _agreement_decided(self, against: float) -> bool:
            readers.add(threading.get_ident())
            return super()._agreement_decided(against)

    class LoggingConsensus(Consensus):
        def new_ballot(self, n: int | None = None) -> Ballot:
            return LoggingBallot(self, n or self.n)

    answerer = Answerer(replying(template, "1", "2", "1"), template, consensus=LoggingConsensus(method, 3))
    assert asyncio.run(answerer.answer(QUESTION)).text == "1"
    assert readers
    assert threading.get_ident() not in readers


def test_a_choice_ended_by_a_stop_string_votes_with_the_text_before_it(template: Template) -> None:
    engine = replying(template, "18 END 4", "18 END 5", "7 END 18")
    with SyncAnswerer(Answerer(engine, template, consensus=Consensus("majority", 3, stop="never"))) as sync:
        answer = sync.answer(QUESTION, Sampling(max_tokens=50), stop=["END"])
    assert answer.vote is not None
    assert answer.vote.results == ("18", "18", "7")


def test_as_many_examples_are_shown_as_fit_into_the_context(tiny_folder: Path, template: Template) -> None:
    shots = [Conversation.from_turns(("user", f"question {i}?"), ("assistant", "an answer " * 20)) for i in range(3)]
    prompting = Prompting(shots, 3)
    one = len(template.prompt(insert_examples(shots[:1], QUESTION)))
    features = replace(ScriptedEngine([5]).features, max_length=one + 50 + 10)
    answerer = Answerer(ScriptedEngine([5], features=features), template, prompting=prompting)
    with SyncAnswerer(answerer) as sync:
        roomy = sync.answer(QUESTION, Sampling(max_tokens=10))
        narrow = sync.answer(QUESTION, Sampling(max_tokens=100))
    assert abs(roomy.prompt_tokens - one) < 10, "one example fits, three do not"
    assert narrow.prompt_tokens == len(template.prompt(QUESTION))
    assert (len(roomy.prompt.examples), narrow.prompt.examples) == (1, ())
    assert roomy.prompt.ids == template.prompt(insert_examples(roomy.prompt.examples, QUESTION))


SHOTS = [Conversation.from_turns(("user", f"question {i}?"), ("assistant", "an answer")) for i in range(3)]
TURNS: list[tuple[Role, str]] = [("user", ""), ("assistant", "")] * 60
LONG = {
    "text": (Conversation.from_turns(("user", "word " * 1000)), None),
    "turns": (Conversation.from_turns(*TURNS, ("user", "")), None),
    "examples": (Conversation.from_turns(("user", "word " * 1000)), Prompting(SHOTS, 2)),
}


@pytest.mark.parametrize("case", LONG)
def test_a_long_prompt_is_encoded_without_blocking_the_event_loop(
    case: str, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation, prompting = LONG[case]
    answerer = Answerer(ScriptedEngine([5]), template, prompting=prompting)
    may_go_on = threading.Event()
    render = template.prompt

    def held(conversation: Conversation) -> list[int]:
        assert may_go_on.wait(10), "the loop was blocked"
        return render(conversation)

    async def ask() -> list[int]:
        asyncio.get_running_loop().call_later(0.01, may_go_on.set)
        return await answerer.encode_prompt(conversation)

    expected = asyncio.run(answerer.encode_prompt(conversation))
    monkeypatch.setattr(template, "prompt", held)
    assert asyncio.run(ask()) == expected


def test_a_short_prompt_is_encoded_without_a_thread(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    render = template.prompt

    def seen(conversation: Conversation) -> list[int]:
        threads.append(threading.current_thread())
        return render(conversation)

    monkeypatch.setattr(template, "prompt", seen)
    answerer = Answerer(ScriptedEngine([5]), template)
    assert asyncio.run(answerer.encode_prompt(QUESTION)).ids == render(QUESTION)
    assert threads == [threading.current_thread()]


def test_examples_before_a_conversation_are_not_scored(tiny_folder: Path, answerer: Answerer) -> None:
    template = answerer.template
    shots = [Conversation.from_turns(("user", "What is one plus one?"), ("assistant", "Two."))]
    talk = QUESTION.add("assistant", "Four.")
    with SyncAnswerer(Answerer(answerer.engine, template, prompting=Prompting(shots, 1, reasoning=True))) as sync:
        scored = sync.score(talk)
    whole = template.encode(Conversation((*shots[0].messages, *talk.messages)))
    start = len(template.prompt(Conversation((*shots[0].messages, *QUESTION.messages))))
    (expected,) = score(load_model(tiny_folder), [whole.ids], [start])
    trained = [p for p, t in zip(expected, whole.trained[start:], strict=True) if t]
    assert scored.tokens == len(trained) == sum(template.encode(talk).trained)
    assert scored.nll == pytest.approx(-sum(trained), rel=1e-4)


def test_a_result_is_what_follows_the_marker(template: Template) -> None:
    with SyncAnswerer(Answerer(replying(template, "2 + 2.\nAnswer: 4", "four"), template)) as sync:
        answer = sync.answer(QUESTION, Sampling(max_tokens=50, n=2))
    assert answer.result == "4"
    assert replace(answer, texts=("four",)).result == "four"


VOTE_TEXTS = ("Answer: 4", "four it is", "Answer: 4", "")


def voted(method: Method | None) -> Answer:
    """Four choices, of which the last was cancelled."""
    ballot = Consensus(method or "majority").new_ballot(4)
    for index, text in enumerate(VOTE_TEXTS[:3]):
        ballot.add(index, Candidate(text, -0.5))
    finishes = ("stop", "length", "stop", "cancelled")
    completions = tuple(Completion((5,), None, finish) for finish in finishes)
    return Answer(VOTE_TEXTS, completions, Prompt([1, 2, 3]), 3, vote=ballot.vote() if method else None)


def test_the_fields_of_a_vote_hold_every_candidate_and_the_results_that_were_counted() -> None:
    fields = voted("majority").vote_fields()
    assert fields == {
        "candidates": list(VOTE_TEXTS),
        "finishes": ["stop", "length", "stop", "cancelled"],
        "votes": [1.0, 0.0, 1.0, None],
        "results": ["4", None, "4", None],
        "winner": 0,
    }
    compared = voted("rouge-l").vote_fields()
    assert compared.keys() == fields.keys() - {"results"}
    assert compared["votes"][3] is None
    assert voted(None).vote_fields() == {}
