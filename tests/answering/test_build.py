"""An Answerer built from `[answer]`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from corral.answering.answerer import Answerer
from corral.answering.build import build_answerer
from corral.answering.sync import SyncAnswerer
from corral.engines.base import Sampling
from corral.engines.scripted import ScriptedEngine
from corral.errors import DataError
from corral.messages import Conversation
from corral.recipe import Answer
from corral.template import Template

QUESTION = Conversation.from_turns(("user", "How many legs has a cat?"))
EXAMPLE = Conversation.from_turns(("user", "How many legs has a bird?"), ("assistant", "Two."))


def build(template: Template, settings: Answer, *examples: Conversation) -> Answerer:
    return build_answerer(ScriptedEngine([5, 6, 7]), template, settings, examples=lambda: examples, seed=3)


def test_default_settings_sample_one_answer_and_load_no_examples(template: Template) -> None:
    def never() -> list[Conversation]:
        raise AssertionError("examples were loaded")

    answerer = build_answerer(
        ScriptedEngine([5]), template, Answer(max_tokens=9, temperature=0.5), examples=never, seed=3
    )
    assert answerer.sampling == Sampling(9, temperature=0.5, seed=3)
    assert answerer.prompting is answerer.consensus is None


def test_examples_come_from_the_run_or_from_their_own_source(template: Template, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": str(n)}) + "\n" for n in range(9)))
    named = Answer.model_validate({"shots": {"count": 2, "source": {"path": str(rows)}}})
    with SyncAnswerer(build(template, named, EXAMPLE)) as sync:
        with_rows = template.decode(sync.run(sync.answerer.encode_prompt(QUESTION)).ids)
    with SyncAnswerer(build(template, Answer.model_validate({"shots": {"count": 2}}), EXAMPLE)) as sync:
        shown = sync.run(sync.answerer.encode_prompt(QUESTION)).ids
    assert with_rows.count("?") == 3
    assert "bird" not in with_rows
    assert shown == template.prompt(Conversation((*EXAMPLE.messages, *QUESTION.messages)))
    with pytest.raises(DataError, match="no examples"):
        build(template, Answer.model_validate({"shots": {"count": 2}}))


def test_the_sampling_of_a_consensus_replaces_that_of_the_settings(template: Template) -> None:
    settings = Answer.model_validate({"consensus": {"method": "cosine", "n": 3, "stop": "never"}, "max_tokens": 4})
    answerer = build(template, settings)
    assert answerer.vote_sampling().n == 3
    assert (
        answerer.vote_sampling().temperature,
        answerer.vote_sampling().top_p,
        answerer.vote_sampling().max_tokens,
    ) == (0.7, 0.9, 4)
    with SyncAnswerer(answerer) as sync:
        answer = sync.answer(QUESTION)
    assert answer.vote is not None
    assert answer.vote.scores == pytest.approx((1.0, 1.0, 1.0))
