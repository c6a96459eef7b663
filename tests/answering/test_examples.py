from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from corral.answering.examples import source_examples, training_examples, training_examples_digest
from corral.data import cache
from corral.data.example_store import Example
from corral.data.source_rows import SourceRows
from corral.errors import DataError, StorageError
from corral.messages import Conversation, Record, Text
from corral.recipe import Source
from corral.run.directory import Run
from corral.storage import read_write_lock
from corral.template import Encoded
from tests.data.conftest import write_examples


def test_nothing_is_removed_from_the_cache_while_examples_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORRAL_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "MAX_BYTES", 0)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Hi?", "completion": "Hello."}) + "\n")
    records = SourceRows.records

    def check_lock(rows: SourceRows, positions: Any) -> Iterator[Record]:
        with pytest.raises(StorageError), read_write_lock(tmp_path / "prepared.lock", "write", wait=False):
            pass
        return records(rows, positions)

    monkeypatch.setattr(SourceRows, "records", check_lock)
    for _ in range(2):
        (example,) = source_examples(Source(path=str(path)))
        assert [message.content for message in example.messages] == ["Hi?", "Hello."]
        assert len([folder for folder in (tmp_path / "prepared").iterdir() if folder.is_dir()]) == 1


def write_run(folder: Path, *records: Record) -> Run:
    """A run with these rows to train on."""
    rows = folder / "prepare" / "rows"
    rows.mkdir(parents=True)
    (folder / "recipe.toml").touch()
    sequence = Encoded((1, 2), (False, True))
    examples = [Example(f"{record!r}", "rows", i, (sequence,), record) for i, record in enumerate(records)]
    sides = {"train": examples, "validation": [], "test": []}
    for side, of_side in sides.items():
        write_examples(rows / side, of_side)
    counts = {side: len(of_side) for side, of_side in sides.items()}
    (rows / "prepared.json").write_text(json.dumps({"version": 5, "examples": counts}))
    return Run(folder)


def test_the_examples_of_a_run_are_the_conversations_that_it_trains_on(tmp_path: Path) -> None:
    asked = [Conversation.from_turns(("user", f"{i}?"), ("assistant", f"{i}")) for i in range(3)]
    mixed = write_run(tmp_path / "mixed", *asked, *(Text(f"document {i}") for i in range(300)))
    assert {example.messages for example in training_examples(mixed, 0)} == {each.messages for each in asked}
    digests = [training_examples_digest(each) for each in (mixed, write_run(tmp_path / "other", *asked))]
    assert digests[0] != digests[1]
    assert digests[0] == training_examples_digest(mixed)


def test_a_run_without_prepared_rows_has_no_examples_to_show(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").touch()
    for read in (training_examples_digest, lambda run: training_examples(run, 0)):
        with pytest.raises(DataError, match="no prepared rows to show"):
            read(Run(tmp_path))
