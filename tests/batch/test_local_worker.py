"""Prompts answered on this machine: whole rows, and engines that fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from corral.answering.answerer import Answerer
from corral.answering.consensus import Consensus
from corral.batch.local_worker import COMPLETIONS_IN_FLIGHT, answer_locally, answer_row, prompts_in_flight
from corral.batch.prompts import Prompt
from corral.engines.base import Sampling
from corral.engines.scripted import Reply, ScriptedEngine
from corral.errors import EngineError, StorageError
from corral.messages import Conversation
from corral.template import Template


def prompt(index: int, text: str = "Hi?") -> Prompt:
    return Prompt(index, {"id": f"q{index}"}, Conversation.from_turns(("user", text)))


def ids(template: Template, text: str) -> list[int]:
    return template.tokenizer.encode(text, add_special_tokens=False)


def answer(answerer: Answerer, request: Prompt, seed: int = 0) -> dict[str, Any]:
    return asyncio.run(answer_row(answerer, request, seed))


def test_a_row_holds_the_answer_and_its_tokens(template: Template) -> None:
    engine = ScriptedEngine(lambda *_: ids(template, "Four.") * 3)
    answered = answer(Answerer(engine, template, Sampling(4)), prompt(3))
    text = template.tokenizer.decode((ids(template, "Four.") * 3)[:4])
    size = len(template.prompt(Conversation.from_turns(("user", "Hi?"))))
    assert answered == {
        "index": 3,
        "id": "q3",
        "answer": text,
        "finish": "length",
        "prompt_tokens": size,
        "tokens": 4,
    }


def test_a_row_of_a_vote_holds_all_candidates(template: Template) -> None:
    words = ["It is five.", "It is four.", "It is four, yes."]
    engine = ScriptedEngine(lambda _, __, choice: ids(template, words[choice]))
    consensus = Consensus("rouge-l", n=3, stop="never")
    answered = answer(Answerer(engine, template, Sampling(32), consensus=consensus), prompt(0))
    assert answered["candidates"] == words
    assert answered["winner"] == 1
    assert answered["answer"] == words[1]
    assert answered["votes"][1] == max(answered["votes"])
    assert answered["finishes"] == ["stop"] * 3
    assert answered["tokens"] == sum(len(ids(template, word)) for word in words)


def test_candidates_that_are_not_needed_are_cancelled(template: Template) -> None:
    def reply(_: Sequence[int], __: Sampling, choice: int) -> list[int]:
        return ids(template, "Answer: 4" if choice < 2 else "No answer. " * 9)

    answerer = Answerer(ScriptedEngine(reply), template, Sampling(99), consensus=Consensus("majority", n=3))
    answered = answer(answerer, prompt(0))
    assert answered["finishes"] == ["stop", "stop", "cancelled"]
    assert answered["result"] == "4"
    assert answered["results"] == ["4", "4", None]


def test_the_seed_of_a_row_follows_from_the_seed_and_its_index(template: Template) -> None:
    seeds: list[int | None] = []

    def reply(_: Sequence[int], sampling: Sampling, choice: int) -> list[int]:
        seeds.append(sampling.seed)
        return [5]

    answerer = Answerer(ScriptedEngine(reply), template)
    for seed, index in ((0, 0), (0, 1), (1, 0), (0, 0)):
        answer(answerer, prompt(index), seed)
    assert seeds[0] == seeds[3]
    assert len(set(seeds)) == 3


def test_a_prompt_that_the_engine_refuses_is_a_bad_row(template: Template) -> None:
    engine = ScriptedEngine([5])
    engine.features = replace(engine.features, max_length=100)
    answerer = Answerer(engine, template, Sampling(8))
    assert "exceed" in answer(answerer, prompt(0, "word " * 200))["error"]


@pytest.mark.parametrize("choices", [1, 5, 1000])
def test_as_many_completions_are_in_flight_as_keep_an_engine_full(choices: int, template: Template) -> None:
    most = 0

    class Counting(ScriptedEngine):
        def submit(self, *args: Any) -> Any:
            nonlocal most
            submitted = super().submit(*args)
            most = max(most, len(self._requests))
            return submitted

    taken = 0

    def prompts() -> Iterator[Prompt]:
        nonlocal taken
        for i in range(700):
            taken += 1
            yield prompt(i)

    done: list[int] = []

    def keep(answered: Any) -> None:
        done.append(answered["index"])
        assert taken - len(done) <= prompts_in_flight(choices), "prompts are read only when they can be answered"

    answer_locally(lambda: Answerer(Counting([5, 6]), template), choices, 0, prompts(), keep)
    assert sorted(done) == list(range(700))
    assert most == prompts_in_flight(choices)
    assert prompts_in_flight(choices) * choices >= COMPLETIONS_IN_FLIGHT


def failing(template: Template, fails: Callable[[str], bool]) -> Callable[[], Answerer]:
    """An engine that fails for some prompts, and all that is under way with them."""

    def reply(prompt_ids: Sequence[int], _: Sampling, __: int) -> list[int]:
        text = template.tokenizer.decode(list(prompt_ids))
        if fails(text):
            for request in list(engine._requests):
                request.generation.fail(EngineError("the process ended"))
        return [5]

    script: Reply = reply
    engine = ScriptedEngine(script)
    return lambda: Answerer(engine, template)


@pytest.mark.parametrize("breaking", [{39}, {37, 38, 39}, {0, 1, 2, 3}, {3, 25}, set(range(40))])
@pytest.mark.parametrize("choices", [1, 20, 320])
def test_rows_that_break_the_engine_are_bad_wherever_they_stand(
    template: Template, breaking: set[int], choices: int
) -> None:
    rows: list[Any] = []
    prompts = iter([prompt(i, "break it" if i in breaking else "Hi?") for i in range(40)])
    engine = failing(template, lambda text: "break it" in text)
    answer_locally(engine, choices, 0, prompts, rows.append)
    assert sorted(row["index"] for row in rows) == list(range(40)), "each row once"
    assert {row["index"]: row["error"] for row in rows if "error" in row} == dict.fromkeys(
        breaking, "the process ended"
    )


@pytest.mark.parametrize("times", [1, 2, 3, 4])
def test_a_row_is_bad_only_if_it_breaks_the_engine_beside_others_and_twice_alone(
    template: Template, times: int
) -> None:
    failed = 0

    def fails(text: str) -> bool:
        nonlocal failed
        failed += "break it" in text
        return "break it" in text and failed <= times

    kept: list[Any] = []
    answer_locally(failing(template, fails), 1, 0, iter([prompt(0, "break it"), prompt(1)]), kept.append)
    assert {row["index"]: "error" in row for row in kept} == {0: times > 2, 1: False}
    assert failed == min(times + 1, 3)


def requests_for(template: Template, rows: int, breaks: Callable[[str], bool]) -> tuple[list[dict[str, Any]], int, int]:
    """(finished rows, requests, rounds in which the engine was asked) of a batch that an engine fails on."""
    kept: list[dict[str, Any]] = []
    asked: list[int] = []

    class Watched(ScriptedEngine):
        def submit(self, *args: Any) -> Any:
            submitted = super().submit(*args)
            asked.append(len(self._requests))
            return submitted

    def reply(prompt_ids: Sequence[int], _: Sampling, __: int) -> list[int]:
        if breaks(template.tokenizer.decode(list(prompt_ids))):
            for request in list(engine._requests):
                request.generation.fail(EngineError("the process ended"))
        return [5]

    engine = Watched(reply, delay_seconds=0.002)
    prompts = iter([prompt(i, f"Hi {i}?") for i in range(rows)])
    answer_locally(lambda: Answerer(engine, template), 1, 0, prompts, kept.append)
    return kept, len(asked), asked.count(1)


def test_one_bad_row_among_all_in_flight_is_found_by_halving(template: Template) -> None:
    kept, requests, rounds = requests_for(template, COMPLETIONS_IN_FLIGHT, lambda text: "Hi 200?" in text)
    assert [row["index"] for row in kept if "error" in row] == [200]
    assert len(kept) == COMPLETIONS_IN_FLIGHT
    assert requests < 3.5 * COMPLETIONS_IN_FLIGHT
    assert rounds < 40, "not a round for each row"


def test_after_a_crash_that_no_row_caused_all_rows_are_asked_once_more(template: Template) -> None:
    crashes = iter([False] * 100 + [True])
    kept, requests, rounds = requests_for(template, COMPLETIONS_IN_FLIGHT, lambda _: next(crashes, False))
    assert not [row for row in kept if "error" in row]
    assert requests <= 2 * COMPLETIONS_IN_FLIGHT
    assert rounds < 4


def test_an_engine_whose_servers_say_how_much_they_take_gets_that_and_a_quarter_in_waiting() -> None:
    assert prompts_in_flight(1, 512) == prompts_in_flight(5, 512) == 640
    assert prompts_in_flight(5) == 64


def test_a_row_that_broke_the_engine_is_asked_again_alone(template: Template) -> None:
    in_flight: list[int] = []

    class Watched(ScriptedEngine):
        def submit(self, ids: Sequence[int], sampling: Sampling) -> Any:
            submitted = super().submit(ids, sampling)
            if "break it" in template.tokenizer.decode(list(ids)):
                in_flight.append(len(self._requests))
            return submitted

    def reply(prompt_ids: Sequence[int], _: Sampling, __: int) -> list[int]:
        if "break it" in template.tokenizer.decode(list(prompt_ids)):
            raise RuntimeError("broken")
        return [5, 6, 7]

    prompts = iter([prompt(i, "break it" if i in (3, 30) else "Hi?") for i in range(60)])
    kept: list[Any] = []
    answer_locally(lambda: Answerer(Watched(reply, delay_seconds=0.001), template), 20, 0, prompts, kept.append)
    assert len(kept) == 60
    assert sorted(in_flight)[:4] == [1, 1, 1, 1]
    assert sorted(in_flight)[4] > 1


def test_an_engine_that_fails_on_every_prompt_ends_the_batch(template: Template) -> None:
    kept: list[int] = []
    requests = 0

    def fails(_: str) -> bool:
        nonlocal requests
        requests += 1
        return requests > 10

    with pytest.raises(EngineError, match="the process ended"):
        answer_locally(
            failing(template, fails), 80, 0, iter([prompt(i) for i in range(500)]), lambda r: kept.append(r["index"])
        )
    assert len(kept) <= 10, "no row is bad because the engine is broken"
    assert requests < 60


def test_the_last_row_is_not_bad_if_the_engine_fails_on_a_plain_question_too(template: Template) -> None:
    kept: list[Any] = []
    with pytest.raises(EngineError):
        answer_locally(failing(template, lambda _: True), 1, 0, iter([prompt(0)]), kept.append)
    assert not kept


def test_a_row_that_cannot_be_stored_ends_the_batch(template: Template) -> None:
    def keep(_: Any) -> None:
        raise StorageError("the disk is full")

    work = partial(answer_locally, lambda: Answerer(ScriptedEngine([5]), template), 1, 0)
    with pytest.raises(StorageError, match="full"):
        work(iter([prompt(i) for i in range(50)]), keep)
