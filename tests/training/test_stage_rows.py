"""Which rows a training stage takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from corral.data.example_store import Example
from corral.data.prepare import Prepared
from corral.errors import DataError
from corral.messages import Conversation, Preference, Record, Text
from corral.recipe import Train
from corral.template import Encoded
from corral.training.stage_rows import StageRows, check_rows_taken
from tests.data.conftest import write_examples

ASKED = Conversation.from_turns(("user", "q"))
ANSWERED, PAIR = ASKED.add("assistant", "a"), Preference(ASKED, "better", "worse")


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
