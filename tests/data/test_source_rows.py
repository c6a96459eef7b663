from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from corral.data.ledger import EXAMPLES_PER_REASON
from corral.data.source_rows import RowSettings, SourceRows, load_source_rows
from corral.data.sources import text_files
from corral.errors import DataError
from corral.messages import Conversation, Feedback, Preference, Record, Text, record_key
from corral.progress import Progress
from corral.recipe import Source
from tests.data.conftest import Listener, chat, chats, source, write_rows


def rows_of(path: Path, **settings: object) -> SourceRows:
    return load_source_rows(source(path, **settings), path.parent / "cache", Progress())


def test_usable_rows_are_kept_as_records_and_the_others_with_their_reasons(tmp_path: Path) -> None:
    rows = [*chats(60), {"messages": []}, *chats(5, start=60), {"messages": 3}, {"messages": []}]
    found = rows_of(write_rows(tmp_path / "a.jsonl", rows))
    assert (len(found), found.format) == (68, "messages")
    records = list(found.records(found.usable))
    usable = [row for row in rows if isinstance(row["messages"], list) and row["messages"]]
    assert records == [Conversation.from_json(row) for row in usable]
    assert [bytes(key).hex() for key in found.keys(found.usable)] == [record_key(record) for record in records]
    assert found.name_rows(found.usable) == [*range(1, 61), *range(62, 67)]
    why = {n: found.reasons[r] for n, r in enumerate(found.reason.tolist(), start=1) if r >= 0}
    assert why[61] == why[68] == "messages is an empty list"
    assert set(why) == {61, 67, 68}
    some = np.array([65, 3, 4, 0])
    assert list(found.records(some)) == [records[i] for i in (64, 3, 4, 0)]


def test_a_second_load_reads_the_cache_and_not_the_source(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", chats(60))
    listener = Listener()
    many = source(write_rows(path, chats(250)))
    first = load_source_rows(many, tmp_path / "cache", listener)
    assert [done for done, _ in listener.updates] == [100, 200]
    again = load_source_rows(many, tmp_path / "cache", listener)
    assert [done for done, _ in listener.updates] == [100, 200]
    assert again.identity == first.identity
    assert (again.keys(again.usable) == first.keys(first.usable)).all()


def test_every_row_keeps_its_reason_and_each_kind_has_a_few_examples(tmp_path: Path) -> None:
    rows = [chat("a", "b"), *({"messages": [{"role": f"r{i}", "content": "x"}]} for i in range(400))]
    found = rows_of(write_rows(tmp_path / "a.jsonl", rows), format="messages")
    assert found.usable.tolist() == [0]
    assert [found.reasons[number] for number in found.reason[1:]] == found.reasons
    assert all(f"'r{i}'" in reason for i, reason in enumerate(found.reasons))
    assert len(found.examples) == EXAMPLES_PER_REASON


def test_rows_of_an_unknown_format_are_refused_with_their_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        rows_of(write_rows(tmp_path / "a.jsonl", [{"foo": 1, "bar": 2}] * 3))
    assert "foo" in str(caught.value)
    assert not list((tmp_path / "cache").glob("rows-*"))


def test_the_parts_of_a_long_document_are_of_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_DOCUMENT", 100)
    for name, line in (("a", "one\n"), ("b", "two\n")):
        (tmp_path / f"{name}.txt").write_text("".join(f"{i} {line}" for i in range(60)))
    found = load_source_rows(Source(path=str(tmp_path)), tmp_path / "cache", Progress())
    groups = [bytes(key) for key in found.keys(found.usable, "group_key")]
    assert len(groups) > 6
    assert len(set(groups)) == 2
    assert found.files == ["a.txt", "b.txt"]


def test_rows_as_long_as_books_are_taken_few_at_a_time(tmp_path: Path) -> None:
    rows = [chat("Why?", "x" * length) for length in (10, 3_000_000, 3_000_000, 3_000_000, 10, 10)]
    found = rows_of(write_rows(tmp_path / "a.jsonl", rows))
    pieces = [piece.tolist() for piece in found.split(found.usable)]
    assert [row for piece in pieces for row in piece] == [*range(6)]
    assert max(sum(1 <= row <= 3 for row in piece) for piece in pieces) <= 2


def test_rows_lose_their_own_system_messages_where_one_replaces_them(tmp_path: Path) -> None:
    system, question = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}
    path = write_rows(
        tmp_path / "a.jsonl",
        [
            {"messages": [system, question, {"role": "assistant", "content": "So."}]},
            {"messages": [question, {"role": "assistant", "content": "So."}]},
            {
                "messages": [
                    system,
                    {"role": "assistant", "content": "Hi."},
                    question,
                    {"role": "assistant", "content": "So."},
                ]
            },
        ],
    )
    preferences = write_rows(tmp_path / "b.jsonl", [{"prompt": [system, question], "chosen": "So.", "rejected": "No."}])
    feedback = write_rows(tmp_path / "c.jsonl", [{"prompt": [system, question], "completion": "So.", "label": True}])
    texts = write_rows(tmp_path / "d.jsonl", [{"text": "system"}])
    asked = Conversation.from_turns(("user", "Why?"))
    led = Conversation.from_turns(("system", "Be kind."), ("user", "Why?"))

    def read(file: Path, *, keep_system: bool) -> list[Record]:
        found = load_source_rows(source(file), tmp_path / "cache", Progress(), RowSettings(keep_system=keep_system))
        return list(found.records(found.usable))

    for keep_system, prompt in ((True, led), (False, asked)):
        answered = prompt.add("assistant", "So.")
        assert read(path, keep_system=keep_system) == [answered, asked.add("assistant", "So."), answered]
        assert read(preferences, keep_system=keep_system) == [Preference(prompt, "So.", "No.")]
        assert read(feedback, keep_system=keep_system) == [Feedback(prompt, "So.", 1.0)]
        assert read(texts, keep_system=keep_system) == [Text("system")]
