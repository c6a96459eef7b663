"""Sources that are for one side: a test file of the user's own stays as it is, and nothing of it is trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from corral.data.ledger import source_notes
from corral.data.mixture import SIDES, Side
from corral.data.near_duplicates import RESEMBLANCE, resemblance
from corral.data.prepare import Prepared, prepare_test_rows
from corral.errors import DataError
from corral.messages import Conversation, Preference, record_key
from corral.progress import Progress
from corral.recipe import Data, Split
from corral.template import Template
from tests.data.conftest import chat, chats, dialogue, prose, prose_words, source, word_hashes, write_rows

Prepare = Callable[..., Prepared]
DUPLICATES = ["exact", "near", "keep"]


def sources_on(rows: Prepared) -> dict[str, dict[str, int]]:
    return {side: dict(Counter(e.source for e in rows.side(side))) for side in ("train", "validation", "test")}


@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_a_test_file_is_used_as_it_is_and_no_copy_of_its_rows_is_trained_on(
    prepared: Prepare, tmp_path: Path, duplicates: str
) -> None:
    own = [*chats(12), chats(1)[0]]
    mine = source(write_rows(tmp_path / "mine.jsonl", own), side="test")
    more = source(write_rows(tmp_path / "more.jsonl", [*chats(30, 5), *chats(30, 5)]))
    rows = prepared(more, mine, duplicates=duplicates, split=Split())
    assert sources_on(rows)["test"] == {"mine": 13}
    assert not any("of the training examples" in note for note in source_notes(rows.ledger["sources"]["mine"]))
    held_out = Counter(e.key for e in rows.test)
    assert sorted(held_out.values()) == [1] * 11 + [2]
    assert not held_out.keys() & {e.key for side in ("train", "validation") for e in rows.side(side)}
    kept = 46 if duplicates == "keep" else 23
    assert len(rows.train) + len(rows.validation) == kept
    table = parquet.read_table(rows.folder / "ledger.parquet").to_pylist()
    copies = [row for row in table if row["fate"] == "duplicate" and row["original"].startswith("mine row")]
    assert sorted(row["row"] for row in copies) == [*range(1, 8), *range(31, 38)]
    assert {row["original"] for row in copies} == {f"mine row {n}" for n in range(6, 13)}


def test_a_near_copy_of_any_held_out_row_is_left_out_and_near_copies_among_them_stay(
    prepared: Prepare, tmp_path: Path
) -> None:
    words = prose_words(1, 70)
    texts = [
        " ".join(w if i not in changed else "changed" for i, w in enumerate(words)) for changed in ((), (20,), (20, 50))
    ]
    assert [resemblance(word_hashes(texts[n]), word_hashes(texts[2])) > RESEMBLANCE for n in (0, 1)] == [False, True]
    mine = source(write_rows(tmp_path / "mine.jsonl", [{"text": text} for text in texts[:2]]), side="test")
    more = source(write_rows(tmp_path / "more.jsonl", [{"text": texts[2]}, {"text": prose(2)}]))
    rows = prepared(more, mine, duplicates="near", split=Split(validation=0))
    assert sources_on(rows) == {"train": {"more": 1}, "validation": {}, "test": {"mine": 2}}
    assert rows.ledger["sources"]["more"]["fates"]["near duplicate"] == 1


def test_a_side_takes_all_rows_or_as_many_as_are_asked_for(prepared: Prepare, tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{name}.jsonl", chats(20, 100 * i)) for i, name in enumerate("abcd")]
    a, b = source(files[0], side="train"), source(files[1], side="validation")
    c, d = source(files[2], side="test", rows=5), source(files[3])
    rows = prepared(a, b, c, d, split=Split(test=0.5))
    assert sources_on(rows) == {"train": {"a": 20, "d": 10}, "validation": {"b": 20}, "test": {"c": 5, "d": 10}}
    assert sources_on(prepared(a, b, c)) == {"train": {"a": 20}, "validation": {"b": 20}, "test": {"c": 5}}


def test_what_a_row_equals_in_a_file_to_train_on_is_not_held_out(prepared: Prepare, tmp_path: Path) -> None:
    both = [source(write_rows(tmp_path / f"{name}.jsonl", chats(20))) for name in "ab"]
    both[0] = both[0].model_copy(update={"side": "train"})
    rows = prepared(*both, source(write_rows(tmp_path / "c.jsonl", chats(20, 50))), duplicates="keep")
    assert sources_on(rows)["train"]["a"] == sources_on(rows)["train"]["b"] == 20
    assert len(rows.test) + len(rows.validation) > 0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_all_rows_of_a_source_to_train_on_are_trained_on_wherever_it_stands(
    prepared: Prepare, tmp_path: Path, order: tuple[int, int]
) -> None:
    free = source(write_rows(tmp_path / "free.jsonl", chats(40)))
    mine = source(write_rows(tmp_path / "mine.jsonl", chats(10, 10)), side="train")
    rows = prepared(*((free, mine)[n] for n in order), split=Split(validation=0.2, test=0.5))
    assert sources_on(rows)["train"]["mine"] == 10
    assert len(rows.train) + len(rows.validation) + len(rows.test) == 40


@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_no_row_about_a_held_out_prompt_is_trained_on(prepared: Prepare, tmp_path: Path, duplicates: str) -> None:
    def pairs(count: int, answer: str) -> list[Any]:
        return [{"prompt": f"Which {n}?", "chosen": f"{answer} {n}", "rejected": f"no {n}"} for n in range(count)]

    mine = source(write_rows(tmp_path / "mine.jsonl", pairs(5, "this")), side="test")
    more = source(write_rows(tmp_path / "more.jsonl", pairs(20, "that")))
    rows = prepared(more, mine, duplicates=duplicates, split=Split(validation=0), contamination="ignore")
    assert sources_on(rows) == {"train": {"more": 15}, "validation": {}, "test": {"mine": 5}}
    assert rows.ledger["sources"]["more"]["fates"]["duplicate"] == 5
    table = parquet.read_table(rows.folder / "ledger.parquet").to_pylist()
    assert [row["original"] for row in table if row["fate"] == "duplicate"] == [f"mine row {n}" for n in range(1, 6)]


def about(count: int) -> tuple[list[Any], list[Any]]:
    """Pairs, and conversations that end with their better answers; every other one begins with a turn before the question."""
    pairs, answered = [], []
    for n in range(count):
        turns = [{"role": "user", "content": f"Which {n}?"}]
        if n % 2:
            turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"Hello {n}."}, *turns]
        pairs.append({"prompt": turns, "chosen": f"this {n}", "rejected": f"no {n}"})
        answered.append({"messages": [*turns, {"role": "assistant", "content": f"this {n}"}]})
    return pairs, answered


def test_conversations_are_on_the_side_of_the_pairs_about_their_prompt(prepared: Prepare, tmp_path: Path) -> None:
    pairs, answered = about(40)
    both = [source(write_rows(tmp_path / f"{name}.jsonl", rows)) for name, rows in (("a", pairs), ("b", answered))]
    rows = prepared(*both, split=Split(validation=0.2, test=0.2), contamination="ignore")

    def prompts(side: Side, name: str) -> set[str]:
        found: set[str] = set()
        for e in rows.side(side).select([name]):
            prompt = e.record.prompt if isinstance(e.record, Preference) else e.record
            assert isinstance(prompt, Conversation)
            found.add(record_key(prompt if name == "a" else prompt.split_answer()[0]))
        return found

    assert all(prompts(side, "a") == prompts(side, "b") for side in SIDES)
    assert all(len(rows.side(side)) for side in SIDES)
    alone = prepared(both[1], split=Split(validation=0.2, test=0.2), contamination="ignore")
    assert sources_on(alone) == {"train": {"b": 24}, "validation": {"b": 8}, "test": {"b": 8}}


def test_a_conversation_about_the_prompt_of_a_pair_in_a_test_file_is_left_out(
    prepared: Prepare, tmp_path: Path
) -> None:
    pairs, answered = about(20)
    mine = source(write_rows(tmp_path / "mine.jsonl", pairs[:5]), side="test")
    more = source(write_rows(tmp_path / "more.jsonl", answered))
    rows = prepared(more, mine, split=Split(validation=0), contamination="ignore")
    assert sources_on(rows) == {"train": {"more": 15}, "validation": {}, "test": {"mine": 5}}
    assert rows.ledger["sources"]["more"]["fates"]["duplicate"] == 5


def test_the_rest_of_a_capped_test_file_may_be_trained_on(prepared: Prepare, tmp_path: Path) -> None:
    mine = source(write_rows(tmp_path / "mine.jsonl", chats(10)), side="test", rows=4)
    rows = prepared(mine, source(write_rows(tmp_path / "more.jsonl", chats(10))), split=Split(validation=0))
    assert (len(rows.test), len(rows.train)) == (4, 6)


def test_a_training_row_that_shares_a_passage_with_a_test_file_is_found(prepared: Prepare, tmp_path: Path) -> None:
    mine = source(write_rows(tmp_path / "mine.jsonl", [chat("Which?", prose(1))]), side="test")
    leaked = [*chats(20), chat("Another?", f"So: {prose(1)} Good.")]
    more = source(write_rows(tmp_path / "more.jsonl", leaked))
    assert prepared(more, mine, split=Split()).ledger["sources"]["more"]["contaminated_rows"] == [21]


@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_a_source_may_consist_of_copies_alone(prepared: Prepare, tmp_path: Path, duplicates: str) -> None:
    one, same, other = (
        source(write_rows(tmp_path / f"{name}.jsonl", chats(20, start)))
        for name, start in (("one", 0), ("same", 0), ("other", 50))
    )
    mine = same.model_copy(update={"side": "test"})
    rows = prepared(one, mine, other, duplicates=duplicates, split=Split(validation=0))
    assert sources_on(rows) == {"train": {"other": 20}, "validation": {}, "test": {"same": 20}}
    if duplicates != "keep":
        rows = prepared(one, same, duplicates=duplicates, split=Split(test=0.5))
        assert sources_on(rows)["test"] == {"one": 10}
        assert rows.ledger["sources"]["same"]["fates"]["duplicate"] == 20


@pytest.mark.parametrize("duplicates", DUPLICATES)
@pytest.mark.parametrize("side", [None, "test"])
def test_a_source_of_which_no_row_can_be_used_is_named(
    prepared: Prepare, tmp_path: Path, duplicates: str, side: str | None
) -> None:
    more = source(write_rows(tmp_path / "more.jsonl", chats(20)))
    broken = source(write_rows(tmp_path / "broken.jsonl", [{"foo": 1}] * 3), side=side, format="messages")
    with pytest.raises(DataError, match="all 3 rows of the source 'broken' are lost") as caught:
        prepared(more, broken, duplicates=duplicates)
    assert "`format`" in str(caught.value.hint)
    long = source(write_rows(tmp_path / "long.jsonl", [chat(f"Q {n}", "so " * 500) for n in range(3)]), side=side)
    with pytest.raises(DataError, match="all 3 rows of the source 'long' are lost") as caught:
        prepared(more, long, duplicates=duplicates, max_length=100)
    assert "raise data.max_length (it is 100)" in str(caught.value.hint)


def test_a_test_file_without_usable_rows_is_refused(prepared: Prepare, tmp_path: Path) -> None:
    more, copy = (source(write_rows(tmp_path / f"{name}.jsonl", chats(20))) for name in ("more", "copy"))
    long = write_rows(tmp_path / "mine.jsonl", [chat("Q", "so " * 500)])
    with pytest.raises(DataError, match=r"the only row of the source 'mine' is lost|none of its 1 rows can be used"):
        prepared(more, source(long, side="test"), max_length=100)
    with pytest.raises(DataError, match="no row is left to train on"):
        prepared(more, copy.model_copy(update={"side": "test"}), split=Split())


def test_a_file_to_evaluate_on_is_prepared_as_it_is_and_says_what_was_trained_on(
    prepared: Prepare, template: Template, tmp_path: Path
) -> None:
    trained = prepared(source(write_rows(tmp_path / "a.jsonl", [*chats(30), chat("Which?", prose(1))])), split=Split())
    leaked = chat("Another?", f"So: {prose(1)} Good.")
    keys = {e.key for e in trained.train}
    equal = next(row for row in chats(30) if record_key(Conversation.from_json(row)) in keys)
    lines: list[Any] = [*chats(5, 100), leaked, equal, equal, {"messages": "none"}]
    mine = source(write_rows(tmp_path / "mine.jsonl", lines))
    data = Data(sources=(source(tmp_path / "a.jsonl"),))
    expected = {"report": [6, 7, 8], "ignore": [7, 8]}
    for contamination, marked in expected.items():
        folder = tmp_path / contamination
        folder.mkdir()
        settings = data.model_copy(update={"contamination": contamination})
        rows = prepare_test_rows(
            mine, settings, template, folder, 0, trained.train, Progress(), cache=tmp_path / "cache"
        )
        assert sources_on(rows) == {"train": {}, "validation": {}, "test": {"mine": 8}}
        entry = rows.ledger["sources"]["mine"]
        assert entry["trained_on_rows"] == marked
        assert entry["fates"]["dropped"] == 1
        assert f"{len(marked)} test rows share passages with rows that were trained on" in str(source_notes(entry))
    none = source(write_rows(tmp_path / "none.jsonl", [chat("Q", "so " * 2000)] * 2))
    with pytest.raises(DataError, match="all 2 rows of the source 'none' are lost"):
        prepare_test_rows(none, data, template, tmp_path, 0, trained.train, cache=tmp_path / "cache")


def test_a_row_of_which_windows_were_trained_on_is_one_that_was_trained_on(
    prepared: Prepare, template: Template, tmp_path: Path
) -> None:
    long = dialogue(4, 20)
    more = source(write_rows(tmp_path / "more.jsonl", [long]))
    trained = prepared(more, split=Split(validation=0, test=0), max_length=150).train
    assert len(trained) > 1
    mine = source(write_rows(tmp_path / "mine.jsonl", [long, *chats(3)]))
    data = Data(sources=(more,), max_length=1000, contamination="ignore")
    (tmp_path / "own").mkdir()
    rows = prepare_test_rows(mine, data, template, tmp_path / "own", 0, trained, cache=tmp_path / "cache")
    assert rows.ledger["sources"]["mine"]["trained_on_rows"] == [1]
