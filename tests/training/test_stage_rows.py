"""Which rows a training stage takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from corral.data.example_store import Example
from corral.data.prepare import Prepared
from corral.errors import DataError
from corral.messages import Conversation, Feedback, Preference, Record, Text
from corral.recipe import Train
from corral.template import Encoded
from corral.training.stage_rows import StageRows, check_rows_taken
from tests.data.conftest import write_examples

ASKED = Conversation.from_turns(("user", "q"))
ANSWERED, PAIR = ASKED.add("assistant", "a"), Preference(ASKED, "better", "worse")
SCORED = Feedback(ASKED, "a", 0.5)


def prepared_rows(folder: Path, *sources: tuple[str, Record]) -> Prepared:
    """Six rows on the training side, three for validation and none for testing of each source."""
    folder.mkdir(exist_ok=True)
    sides = {
        side: [
            Example(f"{count}{i}{n:062x}", label, n, (Encoded((n, 7), (False, True)),), record)
            for i, (label, record) in enumerate(sources)
            for n in range(count)
        ]
        for side, count in (("train", 6), ("validation", 3), ("test", 0))
    }
    return Prepared(folder, **{side: write_examples(folder / side, examples) for side, examples in sides.items()})


def test_a_stage_takes_the_rows_of_its_sources_and_of_the_kind_of_its_objective(tmp_path: Path) -> None:
    prepared = prepared_rows(tmp_path, ("chats", ANSWERED), ("texts", Text("t")), ("pairs", PAIR))
    everything, some = (StageRows.select(prepared, Train(sources=names), 1) for names in (None, ("texts", "pairs")))
    assert {e.source for e in everything.train} == {e.source for e in everything.validation} == {"chats", "texts"}
    assert {e.source for e in some.train} == {e.source for e in some.validation} == {"texts"}
    assert (len(everything.lengths), len(some.lengths)) == (18, 9)
    assert everything.digest != some.digest


def test_a_stage_without_rows_is_refused_with_what_its_objective_takes(tmp_path: Path) -> None:
    prepared = prepared_rows(tmp_path, ("chats", ANSWERED), ("pairs", PAIR))
    expected = "training stage 2 has no row to train on: `sft` takes a conversation or a document, and .* side in pairs"
    with pytest.raises(DataError, match=expected):
        StageRows.select(prepared, Train(sources=("pairs",)), 2)


def test_rows_that_no_stage_takes_are_refused(tmp_path: Path) -> None:
    chats, pairs = ("chats", ANSWERED), ("pairs", PAIR)
    check_rows_taken(prepared_rows(tmp_path / "one", chats), [Train()])
    stages = [Train(sources=("chats",)), Train(sources=("more",))]
    check_rows_taken(prepared_rows(tmp_path / "two", chats, ("more", ANSWERED)), stages)
    for name, sources in (("three", (chats, pairs)), ("four", (pairs,))):
        with pytest.raises(
            DataError, match=r"row \d holds a better and a worse answer, and no training stage takes"
        ) as e:
            check_rows_taken(prepared_rows(tmp_path / name, *sources), [Train()])
        assert e.value.where == "pairs"


def test_a_stage_that_stops_early_needs_validation_rows_of_its_own(tmp_path: Path) -> None:
    prepared = prepared_rows(tmp_path, ("chats", ANSWERED), ("more", ANSWERED))
    bare = dataclasses.replace(prepared, validation=prepared.validation.select(["more"]))
    with pytest.raises(DataError, match="training stage 1 has no validation row, and its `early_stopping` needs some"):
        StageRows.select(bare, Train(sources=("chats",), early_stopping=2), 1)
    assert len(StageRows.select(bare, Train(sources=("chats", "more"), early_stopping=2), 1).validation)


def test_an_objective_of_single_answers_takes_both_answers_of_pairs_and_scored_answers(tmp_path: Path) -> None:
    def rows(count: int, first: int) -> list[Example]:
        pairs = [
            Example(f"1{n:063x}", "pairs", n, tuple(Encoded((n, 70 + k), (False, True)) for k in range(2)), PAIR)
            for n in range(first, first + count)
        ]
        scored = Example(f"2{first:063x}", "scored", first, (Encoded((first, 80), (False, True)),), SCORED)
        return [*pairs, scored]

    sides = {"train": rows(4, 10), "validation": rows(2, 20), "test": []}
    prepared = Prepared(tmp_path, **{side: write_examples(tmp_path / side, some) for side, some in sides.items()})
    ulma, kto, dpo = (StageRows.select(prepared, Train(objective=name), 1) for name in ("ulma", "kto", "dpo"))
    assert [len(side) for stage in (ulma, kto, dpo) for side in (stage.train, stage.validation)] == [9, 5, 9, 5, 4, 2]
    assert all(isinstance(e.record, Feedback) for e in (*ulma.train, *kto.validation))
    assert (sum(ulma.train.lengths), sum(kto.train.lengths), sum(kto.train.loss_lengths)) == (18, 36, 18)
    assert ulma.lengths == kto.lengths == 14 * [2]
    only = StageRows.select(prepared, Train(objective="ulma", sources=("pairs",)), 1)
    assert ({e.source for e in only.train}, len(only.train)) == ({"pairs"}, 8)
    check_rows_taken(prepared, [Train(objective="kto")])


def test_kto_is_refused_if_a_side_has_rows_of_one_prompt_only(tmp_path: Path) -> None:
    prompts = {"train": range(4), "validation": range(1), "test": range(0)}
    sides = {
        side: [
            Example(f"{n:064x}", "pairs", n, (Encoded((n, 7), (False, True)), Encoded((n, 8), (False, True))), PAIR)
            for n in numbers
        ]
        for side, numbers in prompts.items()
    }
    prepared = Prepared(tmp_path, **{side: write_examples(tmp_path / side, rows) for side, rows in sides.items()})
    with pytest.raises(DataError, match="all validation rows of training stage 3 have one prompt"):
        StageRows.select(prepared, Train(objective="kto"), 3)
    assert len(StageRows.select(prepared, Train(objective="ulma"), 3).validation) == 2


def test_pairs_that_contradict_each_other_leave_an_objective_of_single_answers_no_row(tmp_path: Path) -> None:
    a, b = (Encoded((1, token), (False, True)) for token in (7, 8))
    pairs = [Example(f"{n:064x}", "pairs", n, answers, PAIR) for n, answers in enumerate(((a, b), (b, a)))]
    sides = {"train": pairs, "validation": [], "test": []}
    prepared = Prepared(tmp_path, **{side: write_examples(tmp_path / side, rows) for side, rows in sides.items()})
    with pytest.raises(DataError, match="each of the 2 answers is chosen in one pair and rejected in another"):
        StageRows.select(prepared, Train(objective="ulma"), 1)
    assert len(StageRows.select(prepared, Train(objective="dpo"), 1).train) == 2


def scored_rows(folder: Path, *scores: float) -> Prepared:
    rows = [
        Example(f"{n:064x}", "scored", n, (Encoded((n, 7), (False, True)),), Feedback(ASKED, "a", score))
        for n, score in enumerate(scores)
    ]
    sides = {"train": rows, "validation": [], "test": []}
    folder.mkdir(exist_ok=True)
    return Prepared(folder, **{side: write_examples(folder / side, some) for side, some in sides.items()})


@pytest.mark.parametrize("objective", ["kto", "ulma"])
def test_answers_of_one_class_are_refused_with_the_threshold(objective: str, tmp_path: Path) -> None:
    rows = scored_rows(tmp_path, 0.5, 0.7, 1.0)
    with pytest.raises(
        DataError, match=r"all 3 answers of training stage 1 are good: their scores are at least 0\.5"
    ) as e:
        check_rows_taken(rows, [Train(objective=objective)])
    assert e.value.where == f"train.0.{objective}.threshold"
    between = Train.model_validate({"objective": objective, objective: {"threshold": 0.6}})
    assert len(StageRows.select(rows, between, 1).train) == 3
    above = Train.model_validate({"objective": objective, objective: {"threshold": 1.0}})
    with pytest.raises(DataError, match="all 2 answers of training stage 1 are bad: their scores are below 1"):
        StageRows.select(scored_rows(tmp_path / "bad", 0.0, 0.7), above, 1)


def test_rows_that_no_stage_takes_are_refused_with_the_objectives_that_would(tmp_path: Path) -> None:
    for name, record, takers in (("pairs", PAIR, "dpo, ipo, orpo, simpo, kto, ulma"), ("scored", SCORED, "kto, ulma")):
        rows = prepared_rows(tmp_path / name, ("chats", ANSWERED), (name, record))
        with pytest.raises(DataError) as e:
            check_rows_taken(rows, [Train()])
        assert f"({takers})" in str(e.value.hint)
