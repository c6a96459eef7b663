"""From `[answer]` to an Answerer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from corral.answering.answerer import Answerer
from corral.answering.build import build_answerer
from corral.answering.identity import source_examples_digest, training_examples_digest
from corral.answering.sync import SyncAnswerer
from corral.engines.base import Sampling
from corral.engines.scripted import ScriptedEngine
from corral.errors import DataError
from corral.messages import Conversation
from corral.recipe import Answer
from corral.recipe.answer import Shots
from corral.run.directory import Run
from corral.template import Template

ASKED = Conversation.from_turns(("user", "How many legs has a cat?"))
EXAMPLE = Conversation.from_turns(("user", "How many legs has a bird?"), ("assistant", "Two."))


def make(template: Template, settings: Answer, *examples: Conversation) -> Answerer:
    return build_answerer(ScriptedEngine([5, 6, 7]), template, settings, examples=lambda: examples, seed=3)


def test_plain_settings_ask_for_one_answer_and_read_no_examples(template: Template) -> None:
    def never() -> list[Conversation]:
        raise AssertionError("no examples are needed")

    answerer = build_answerer(
        ScriptedEngine([5]), template, Answer(max_tokens=9, temperature=0.5), examples=never, seed=3
    )
    assert answerer.sampling == Sampling(9, temperature=0.5, seed=3)
    assert answerer.prompting is answerer.consensus is None


def test_examples_come_from_the_run_or_from_a_source_of_their_own(template: Template, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": str(n)}) + "\n" for n in range(9)))
    named = Answer.model_validate({"shots": {"count": 2, "source": {"path": str(rows)}}})
    with SyncAnswerer(make(template, named, EXAMPLE)) as sync:
        with_rows = template.decode(sync.run(sync.answerer.encode_prompt(ASKED)))
    with SyncAnswerer(make(template, Answer.model_validate({"shots": {"count": 2}}), EXAMPLE)) as sync:
        shown = sync.run(sync.answerer.encode_prompt(ASKED))
    assert with_rows.count("?") == 3
    assert "bird" not in with_rows
    assert shown == template.prompt(Conversation((*EXAMPLE.messages, *ASKED.messages)))
    with pytest.raises(DataError, match="no examples"):
        make(template, Answer.model_validate({"shots": {"count": 2}}))


def test_where_examples_come_from_is_known_by_its_rows(tmp_path: Path) -> None:
    def shots(**changes: Any) -> Shots:
        return Shots.model_validate({"count": 2, "source": {"path": str(tmp_path / "rows.jsonl")}} | changes)

    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    before = source_examples_digest(shots())
    assert before
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "c"}\n')
    assert source_examples_digest(shots()) not in ("", before)
    assert source_examples_digest(shots(count=0)) == source_examples_digest(shots(source=None)) == ""

    (tmp_path / "recipe.toml").write_text("")
    run = Run(tmp_path)
    with pytest.raises(DataError, match="no prepared rows"):
        training_examples_digest(run)
    (tmp_path / "prepare").mkdir()
    (tmp_path / "prepare" / "stage.json").write_text('{"fingerprint": "abc"}')
    assert training_examples_digest(run) == "abc"


def test_consensus_takes_the_place_of_the_sampling(template: Template) -> None:
    settings = Answer.model_validate({"consensus": {"method": "cosine", "n": 3, "stop": "never"}, "max_tokens": 4})
    answerer = make(template, settings)
    assert answerer.vote_sampling().n == 3
    assert (
        answerer.vote_sampling().temperature,
        answerer.vote_sampling().top_p,
        answerer.vote_sampling().max_tokens,
    ) == (0.7, 0.9, 4)
    with SyncAnswerer(answerer) as sync:
        answer = sync.answer(ASKED)
    assert answer.vote is not None
    assert answer.vote.scores == pytest.approx((1.0, 1.0, 1.0))
