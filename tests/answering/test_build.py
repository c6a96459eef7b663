"""From `[answer]` to an Answerer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from corral.answering.answerer import Answerer
from corral.answering.build import compose, examples_identity, training_identity
from corral.answering.sync import blocking
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
    return compose(ScriptedEngine([5, 6, 7]), template, settings, examples=lambda: examples, seed=3)


def test_plain_settings_ask_for_one_answer_and_read_no_examples(template: Template) -> None:
    def never() -> list[Conversation]:
        raise AssertionError("no examples are needed")

    answerer = compose(ScriptedEngine([5]), template, Answer(max_tokens=9, temperature=0.5), examples=never, seed=3)
    assert answerer.sampling == Sampling(9, temperature=0.5, seed=3)
    assert answerer.prompting is answerer.consensus is None


def test_examples_come_from_the_run_or_from_a_source_of_their_own(template: Template, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": str(n)}) + "\n" for n in range(9)))
    named = Answer.model_validate({"shots": {"count": 2, "source": {"path": str(rows)}}})
    with blocking(make(template, named, EXAMPLE)) as face:
        with_rows = template.decode(face.run(face.answerer.prompt(ASKED)))
    with blocking(make(template, Answer.model_validate({"shots": {"count": 2}}), EXAMPLE)) as face:
        shown = face.run(face.answerer.prompt(ASKED))
    assert with_rows.count("?") == 3
    assert "bird" not in with_rows
    assert shown == template.prompt(Conversation((*EXAMPLE.messages, *ASKED.messages)))
    with pytest.raises(DataError, match="no examples"):
        make(template, Answer.model_validate({"shots": {"count": 2}}))


def test_where_examples_come_from_is_known_by_its_rows(tmp_path: Path) -> None:
    def shots(**changes: Any) -> Shots:
        return Shots.model_validate({"count": 2, "source": {"path": str(tmp_path / "rows.jsonl")}} | changes)

    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    before = examples_identity(shots())
    assert before
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "c"}\n')
    assert examples_identity(shots()) not in ("", before)
    assert examples_identity(shots(count=0)) == examples_identity(shots(source=None)) == ""

    (tmp_path / "recipe.toml").write_text("")
    run = Run(tmp_path)
    with pytest.raises(DataError, match="no prepared rows"):
        training_identity(run)
    (tmp_path / "prepare").mkdir()
    (tmp_path / "prepare" / "stage.json").write_text('{"fingerprint": "abc"}')
    assert training_identity(run) == "abc"


def test_consensus_takes_the_place_of_the_sampling(template: Template) -> None:
    settings = Answer.model_validate({"consensus": {"method": "cosine", "n": 3, "stop": "never"}, "max_tokens": 4})
    answerer = make(template, settings)
    assert answerer.several().n == 3
    assert (answerer.several().temperature, answerer.several().top_p, answerer.several().max_tokens) == (0.7, 0.9, 4)
    with blocking(answerer) as face:
        answer = face.answer(ASKED)
    assert answer.vote is not None
    assert answer.vote.scores == pytest.approx((1.0, 1.0, 1.0))
