"""What an answer depends on: one value, by which finished rows and batches are recognised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from corral.answering.identity import (
    AnswerIdentity,
    differing_conditions,
    examples_digest,
    identify_model,
    weights_identity,
)
from corral.model.naming import ModelFiles
from corral.recipe import Answer
from corral.recipe.answer import Shots
from corral.template import Template

MODEL = AnswerIdentity("w", "t" * 64, "k" * 64, "openvino", "float32", "cpu", version="1.2.3")


def asked(settings: dict[str, Any] | None = None, seed: int | None = 0, examples: str = "") -> AnswerIdentity:
    return MODEL.asked(Answer.model_validate(settings or {}), seed, examples)


def test_what_is_hashed_stays_the_same_so_that_finished_rows_are_recognised() -> None:
    """If this fails on purpose, finished rows are measured again: raise the version in the module."""
    assert MODEL.digest == "0fe1fb9901d88f26"
    assert asked().digest == "181a0a1a7d43348a"
    assert asked({"temperature": 0.5, "shots": {"count": 2}}, 3, "abc").digest == "74d60a0c98b94c43"


@pytest.mark.parametrize("name", ["weights", "template", "tokenizer", "engine", "dtype", "endpoints"])
def test_all_that_decides_the_answer_changes_the_digest(name: str) -> None:
    other: Any = ("http://localhost:1/v1",) if name == "endpoints" else "another"
    assert replace(asked(), **{name: other}).digest != asked().digest
    assert replace(MODEL, **{name: other}).digest != MODEL.digest


def test_device_and_version_are_recorded_and_change_no_digest() -> None:
    elsewhere = replace(asked(), device="cuda", version="2.0.0")
    assert elsewhere.digest == asked().digest
    assert list(differing_conditions(asked().conditions(), elsewhere.conditions())) == [
        ("corral", "1.2.3", "2.0.0"),
        ("device", "cpu", "cuda"),
    ]


SHOWN, VOTE = {"shots": {"count": 1}}, {"consensus": {"method": "majority"}}
WITHOUT_EFFECT: dict[str, tuple[AnswerIdentity, AnswerIdentity]] = {
    "the seed, if nothing is sampled": (asked(seed=0), asked(seed=1)),
    "the recipe's own seed": (asked({"seed": 4}), asked()),
    "top_p at temperature 0": (asked({"top_p": 0.5}), asked()),
    "settings of a vote that is not held": (asked({"consensus": {"n": 9, "stop": "never"}}), asked()),
    "sampling that a vote replaces": (asked({"temperature": 0.3, "top_p": 0.4} | VOTE), asked(VOTE)),
    "examples that are not shown": (asked({"shots": {"choose": "similar"}}, examples="a"), asked(examples="b")),
    "where the examples lie": (
        asked({"shots": {"count": 1, "source": {"path": "a.jsonl", "name": "mine"}}}, examples="a"),
        asked({"shots": {"count": 1, "source": {"path": "b.jsonl"}}}, examples="a"),
    ),
}
WITH_EFFECT: dict[str, tuple[AnswerIdentity, AnswerIdentity]] = {
    "the seed of samples": (asked({"temperature": 0.5}, seed=0), asked({"temperature": 0.5}, seed=1)),
    "the seed of a vote": (asked(VOTE, seed=0), asked(VOTE, seed=1)),
    "the seed of the choice of examples": (asked(SHOWN, seed=0), asked(SHOWN, seed=1)),
    "no seed": (asked({"temperature": 0.5}, seed=0), asked({"temperature": 0.5}, seed=None)),
    "the examples": (asked(SHOWN, examples="a"), asked(SHOWN, examples="b")),
    "how many are shown": (asked(SHOWN), asked({"shots": {"count": 2}})),
    "how examples are read": (
        asked({"shots": {"count": 1, "source": {"path": "a.jsonl", "rows": 4}}}),
        asked({"shots": {"count": 1, "source": {"path": "a.jsonl"}}}),
    ),
    "the length of an answer": (asked({"max_tokens": 9}), asked()),
    "a request for reasoning": (asked({"reasoning": True}), asked()),
    "top_p of samples": (asked({"temperature": 0.5, "top_p": 0.5}), asked({"temperature": 0.5})),
    "the candidates of a vote": (asked({"consensus": {"method": "majority", "n": 9}}), asked(VOTE)),
    "how its text is asked for": (asked(), MODEL),
}


@pytest.mark.parametrize("case", WITHOUT_EFFECT)
def test_what_has_no_effect_is_in_no_digest_and_no_condition(case: str) -> None:
    one, other = WITHOUT_EFFECT[case]
    assert one.digest == other.digest
    assert one.conditions() == other.conditions()


@pytest.mark.parametrize("case", WITH_EFFECT)
def test_what_has_an_effect_is_in_the_digest_and_can_be_named(case: str) -> None:
    one, other = WITH_EFFECT[case]
    assert one.digest != other.digest
    assert list(differing_conditions(one.conditions(), other.conditions()))


def test_a_likelihood_depends_on_nothing_of_how_answers_are_asked_for() -> None:
    assert asked(SHOWN, 7, "a").scoring() == asked({"temperature": 1.0}).scoring() == MODEL


def test_differing_conditions_are_named_within_their_tables() -> None:
    one, other = asked({"max_tokens": 9}).conditions(), asked(VOTE, seed=5).conditions()
    named = {name: values for name, *values in differing_conditions(one, other)}
    assert named["answer.max_tokens"] == [9, 256]
    assert named["answer.consensus.method"] == ["none", "majority"]
    assert named["seed"] == [None, 5]
    assert "model" not in named


def test_a_model_is_identified_by_weights_template_tokenizer_and_engine(tiny_folder: Path, template: Template) -> None:
    files = ModelFiles(tiny_folder, None)
    model = identify_model(weights_identity(files), template, "transformers", dtype="float32", device="cpu")
    assert model.template == template.digest
    assert identify_model(weights_identity(files), template, "transformers", dtype="float32", device="cpu") == model
    assert model.conditions().keys() == {"corral", "model", "template", "tokenizer", "engine", "dtype", "device"}


def test_the_digest_of_examples_follows_the_rows_they_come_from(tmp_path: Path) -> None:
    def digest(**changes: Any) -> str:
        shots = {"count": 2, "source": {"path": str(tmp_path / "rows.jsonl")}} | changes
        return examples_digest(Shots.model_validate(shots), lambda: "the run's")

    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    before = digest()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "c"}\n')
    assert digest() != before
    assert (digest(source=None), digest(count=0)) == ("the run's", "")
