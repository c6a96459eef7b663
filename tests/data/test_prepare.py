from __future__ import annotations

import copy
import json
import random
import re
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from corral.data.ledger import FATES, FATES_WITH_REASON, USED_FATES
from corral.data.mixture import SIDES
from corral.data.prepare import Prepared, prepare
from corral.data.row_store import RowStore
from corral.errors import DataError, ModelError
from corral.messages import Conversation, Text, record_key
from corral.progress import Progress
from corral.recipe import Data, Source, Split
from corral.storage import tree_hashes, write_json
from corral.template import Template
from tests.data.conftest import NONE_HELD_OUT, Listener, chat, chats, dialogue, source, start_script, write_rows

Prepare = Callable[..., Prepared]


def fates(**counts: int) -> dict[str, int]:
    return dict.fromkeys(FATES, 0) | counts


def sides_of(rows: Prepared) -> dict[str, str]:
    return {e.key: side for side in ("train", "validation", "test") for e in rows.side(side)}


def test_a_token_that_the_embedding_lacks_stops_the_preparation(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["kubectl"])
    template = Template.load(tokenizer, "chatml", embedding_rows=len(tiny_tokenizer))
    path = write_rows(tmp_path / "rows.jsonl", [*chats(600), chat("What is kubectl?", "A program.")])
    data = Data(sources=(source(path),))
    with pytest.raises(ModelError, match="'kubectl' with id 400"):
        prepare(data, template, tmp_path, 0, cache=tmp_path / "cache", workers=2)


def test_every_example_is_what_the_template_makes_of_its_record(
    prepared: Prepare, template: Template, tmp_path: Path
) -> None:
    rows = chats(60)
    result = prepared(source(write_rows(tmp_path / "a.jsonl", rows)))
    seen: list[int] = []
    for side in (result.train, result.validation, result.test):
        assert len(side) > 0
        for place, example in enumerate(side):
            assert example.record == Conversation.from_json(rows[example.index - 1])
            assert example.key == record_key(example.record)
            assert example.source == "a"
            assert example.sequences == (template.encode(example.record),)
            assert side.lengths[place] == len(example.sequences[0].ids)
            assert side.trained_tokens[place] == sum(example.sequences[0].trained)
            seen.append(example.index)
    assert sorted(seen) == list(range(1, 61))


def test_opening_returns_what_was_prepared(prepared: Prepare, tmp_path: Path) -> None:
    made = prepared(source(write_rows(tmp_path / "a.jsonl", chats(40))), into=tmp_path / "stage")
    opened = Prepared.open(tmp_path / "stage")
    assert list(opened.train) == list(made.train)
    assert list(opened.test) == list(made.test)
    assert opened.ledger["rows"] == 40


def test_the_same_inputs_give_the_same_bytes(prepared: Prepare, tmp_path: Path) -> None:
    rows = [*chats(50), {"messages": []}, *chats(5)]
    a = source(write_rows(tmp_path / "a.jsonl", rows), rows=30)
    b = source(write_rows(tmp_path / "b.jsonl", chats(20, start=40)))
    for name in ("one", "two"):
        prepared(a, b, into=tmp_path / name, max_length=90)
    hashes = tree_hashes(tmp_path / "one")
    assert len(hashes) == 3 + 1 + 3 * 2
    assert hashes == tree_hashes(tmp_path / "two")
    prepared(a, b, into=tmp_path / "three", max_length=90, seed=1)
    assert hashes != tree_hashes(tmp_path / "three")


def test_bytes_do_not_depend_on_the_hash_seed_of_the_process(tiny_folder: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [*chats(40), {"x": 1, "y": 2}])
    code = (
        "data = Data(sources=(Source(path='a.jsonl', rows=30, format='messages'),), duplicates='near',\n"
        "    split={'validation': 0.2, 'test': 0.2})\n"
        "prepare(data, template, Path(sys.argv[2]), 0, cache=Path(sys.argv[2] + '-cache'))\n"
    )
    for number in ("1", "2"):
        (tmp_path / number).mkdir()
        script = start_script(code, tiny_folder, tmp_path, number, PYTHONHASHSEED=number)
        _, errors = script.communicate()
        assert script.returncode == 0, errors
    assert tree_hashes(tmp_path / "1") == tree_hashes(tmp_path / "2")


def test_no_row_changes_side_when_other_sources_are_added_or_moved(prepared: Prepare, tmp_path: Path) -> None:
    a = source(write_rows(tmp_path / "a.jsonl", chats(80)))
    b = source(write_rows(tmp_path / "b.jsonl", chats(60, start=80)))
    alone = sides_of(prepared(a))
    assert Counter(alone.values()) == {"train": 48, "validation": 16, "test": 16}
    for mix in ((a, b), (b, a)):
        mixed = sides_of(prepared(*mix))
        assert Counter(mixed.values()) == {"train": 84, "validation": 28, "test": 28}
        assert alone.items() < mixed.items()


def test_added_or_removed_rows_and_caps_move_few_rows_between_sides(prepared: Prepare, tmp_path: Path) -> None:
    a = source(write_rows(tmp_path / "a.jsonl", chats(200)))
    whole = sides_of(prepared(a, split=Split(validation=0.1, test=0.1)))
    for fewer in (a.model_copy(update={"rows": 150}), source(write_rows(tmp_path / "b.jsonl", chats(190, start=10)))):
        sides = sides_of(prepared(fewer, split=Split(validation=0.1, test=0.1)))
        assert Counter(sides.values())["test"] == len(sides) // 10
        moved = [(whole[key], side) for key, side in sides.items() if whole[key] != side]
        assert len(moved) <= 10
        assert all("train" in pair for pair in moved)


def test_training_order_does_not_depend_on_the_order_of_sources_or_rows(prepared: Prepare, tmp_path: Path) -> None:
    rows = chats(60)
    a = source(write_rows(tmp_path / "a.jsonl", rows[:30]))
    b = source(write_rows(tmp_path / "b.jsonl", rows[30:]))
    shuffled = random.Random(3).sample(rows, len(rows))
    c = source(write_rows(tmp_path / "c.jsonl", shuffled))
    mixes = ((a, b), (b, a), (c,))
    keys = [[e.key for e in prepared(*mix, split=NONE_HELD_OUT).train] for mix in mixes]
    assert keys[0] == keys[1] == keys[2]
    assert [e.index for e in prepared(a).train] != sorted(e.index for e in prepared(a).train)


def test_one_of_equal_rows_is_kept_across_sources(prepared: Prepare, tmp_path: Path) -> None:
    rows = chats(30)
    reordered = [{"messages": [dict(reversed(m.items())) for m in row["messages"]], "id": 5} for row in rows[:10]]
    a = source(write_rows(tmp_path / "a.jsonl", [*rows, *rows[:7]]))
    b = source(write_rows(tmp_path / "b.jsonl", [*reordered, *chats(5, start=100)]))
    result = prepared(a, b)
    assert result.ledger["sources"]["a"]["fates"] == fates(kept=30, duplicate=7)
    assert result.ledger["sources"]["b"]["fates"]["duplicate"] == 10
    assert len(sides_of(result)) == 35 == len(result.train) + len(result.validation) + len(result.test)


def test_longer_rows_are_dropped_or_truncated_as_the_recipe_says(
    prepared: Prepare, template: Template, tmp_path: Path
) -> None:
    rows = [*chats(20), chat("Long?", "yes " * 200), chat("long " * 200, "Yes.")]
    a = source(write_rows(tmp_path / "a.jsonl", rows))
    dropped = prepared(a, max_length=90, split=NONE_HELD_OUT)
    assert dropped.ledger["sources"]["a"]["reasons"] == {
        "longer than 90 tokens": {"fate": "dropped", "count": 2, "examples": [21, 22]}
    }
    cut = prepared(a, max_length=90, split=NONE_HELD_OUT, overlong="truncate")
    assert cut.ledger["fates"] == fates(kept=20, truncated=1) | {"fully masked": 1}
    assert cut.ledger["sources"]["a"]["lost_ends"] == 1
    assert list(cut.ledger["sources"]["a"]["reasons"]) == ["fully masked: none of the first 90 tokens is trained"]
    (example,) = (e for e, fate in zip(cut.train, cut.train.fates, strict=True) if FATES[fate] == "truncated")
    whole = template.encode(example.record)
    assert example.index == 21
    assert example.sequences[0].ids == whole.ids[:90]
    assert example.sequences[0].trained == whole.trained[:90]
    assert cut.train.lengths.max() == 90


def test_rows_the_template_refuses_are_dropped_with_its_reason(prepared: Prepare, tmp_path: Path) -> None:
    rows = [*chats(20), chat("half a \ud83d pair", "x"), chat("no character \ufdd0", "x")]
    result = prepared(source(write_rows(tmp_path / "a.jsonl", rows)))
    reasons = result.ledger["sources"]["a"]["reasons"]
    assert len(reasons) == 2
    assert any("surrogate" in reason or "Unicode" in reason for reason in reasons), reasons
    assert {row["index"] for row in result.left_out} == {21, 22}


def test_five_dropped_rows_of_each_reason_are_kept_to_show(prepared: Prepare, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [*chats(20), *[{"messages": [], "n": i} for i in range(9)]])
    with path.open("a") as file:
        file.write("{broken\n")
    result = prepared(source(path))
    assert [(row["index"], row["reason"]) for row in result.left_out] == [
        *[(i, "messages is an empty list") for i in range(21, 26)],
        (30, "not valid JSON: expecting property name enclosed in double quotes"),
    ]
    assert result.left_out[0]["text"] == '{"messages": [], "n": 0}'
    assert result.left_out[0]["fate"] == "dropped"
    assert result.left_out[-1]["text"].startswith("line 30, column 2: ")


def test_a_nothing_left_error_counts_the_main_reasons_with_advice(prepared: Prepare, tmp_path: Path) -> None:
    rows = [*[{"text": str(i)} for i in range(9)], {"messages": []}]
    with pytest.raises(DataError) as caught:
        prepared(source(write_rows(tmp_path / "a.jsonl", rows), format="messages"), into=tmp_path / "stage")
    assert "no row is left to train on: 10 rows read, 10 dropped" in caught.value.what
    assert "9 × no `messages`: the row has 'text' (rows 1, 2, 3, 4, 5 …)" in caught.value.what
    assert "format" in str(caught.value.hint)
    assert json.loads((tmp_path / "stage" / "ledger.json").read_text())["fates"]["dropped"] == 10
    assert not (tmp_path / "stage" / "rows").exists()


@pytest.mark.parametrize("seed", range(4))
def test_an_empty_side_is_refused_and_the_share_in_the_hint_fills_it(
    prepared: Prepare, tmp_path: Path, seed: int
) -> None:
    a = source(write_rows(tmp_path / "a.jsonl", chats(8)))
    with pytest.raises(DataError, match=r"the test side is empty: none of the 8 usable rows .* of 0\.001") as caught:
        prepared(a, seed=seed, split=Split(validation=0, test=0.001))
    hint = str(caught.value.hint)
    assert hint.endswith("set data.split.test to 0, or add rows")
    share = float(hint.removeprefix("set data.split.test to ").split(" or more")[0])
    assert len(prepared(a, seed=seed, split=Split(validation=0, test=share)).test) >= 1
    with pytest.raises(DataError, match="the validation side is empty"):
        prepared(a, seed=seed, split=Split(validation=0.001, test=0))
    result = prepared(a, seed=seed, split=NONE_HELD_OUT)
    assert (len(result.train), len(result.validation), len(result.test)) == (8, 0, 0)


def test_a_source_that_changes_while_it_is_read_is_noticed(template: Template, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", chats(120))

    class Meddler(Progress):
        def update(self, done: int, note: str = "") -> None:
            with path.open("a") as file:
                file.write(json.dumps(chat("One more?", "Yes.")) + "\n")

    with pytest.raises(DataError, match="changed while it was read"):
        prepare(Data(sources=(source(path),)), template, tmp_path, 0, Meddler(), cache=tmp_path / "cache")
    assert not (tmp_path / "rows").exists()
    assert [p for p in (tmp_path / "cache").iterdir() if p.is_dir()] == []


def test_preparing_again_replaces_what_was_there(prepared: Prepare, tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    prepared(source(write_rows(tmp_path / "a.jsonl", chats(60))), into=stage)
    prepared(source(write_rows(tmp_path / "b.jsonl", chats(30))), into=stage)
    assert len(sides_of(Prepared.open(stage))) == 30
    assert sorted(p.name for p in stage.iterdir()) == ["ledger.json", "ledger.parquet", "left_out.jsonl", "rows"]


def test_a_missing_or_damaged_folder_is_refused_with_advice(prepared: Prepare, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Prepared.open(tmp_path)
    stage = tmp_path / "stage"
    prepared(source(write_rows(tmp_path / "a.jsonl", chats(40))), into=stage)
    (examples,) = (stage / "rows" / "test" / "examples").iterdir()
    examples.write_bytes(examples.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(DataError, match="is damaged") as caught:
            Prepared.open(stage)
    assert "run again" in str(caught.value.hint)


def test_a_digest_depends_neither_on_names_and_places_nor_on_other_sources(prepared: Prepare, tmp_path: Path) -> None:
    a, b = (write_rows(tmp_path / f"{name}.jsonl", chats(40, at)) for name, at in (("a", 0), ("b", 100)))
    rows = prepared(source(a), source(b))
    moved = tmp_path / "elsewhere" / "c.jsonl"
    moved.parent.mkdir()
    write_rows(moved, reversed(chats(40)))
    renamed = prepared(source(b), source(moved, name="third"), cache=tmp_path / "other-cache", workers=1)
    for side in SIDES:
        assert renamed.digest(side) == rows.digest(side)
        assert renamed.digest(side, ["third"]) == rows.digest(side, ["a"]) != rows.digest(side, ["b"])
        assert rows.digest(side, ["a", "b"]) == rows.digest(side)
    write_rows(b, chats(40, 200))
    changed = prepared(source(a), source(b))
    assert changed.digest("train") != rows.digest("train")
    assert changed.digest("train", ["a"]) == rows.digest("train", ["a"])


def test_the_split_has_a_seed_of_its_own(prepared: Prepare, template: Template, tmp_path: Path) -> None:
    a = source(write_rows(tmp_path / "a.jsonl", chats(60)), rows=40)
    rows, data = prepared(a, seed=3), Data(sources=(a,), split=Split(validation=0.2, test=0.2))

    def prepare_with(seed: int, split_seed: int) -> dict[str, str]:
        folder = tmp_path / f"{seed}-{split_seed}"
        folder.mkdir()
        return sides_of(prepare(data, template, folder, seed, split_seed=split_seed, cache=tmp_path / "cache"))

    same, resplit, rechosen = prepare_with(3, 3), prepare_with(3, 4), prepare_with(4, 3)
    assert same == sides_of(rows)
    assert resplit.keys() == same.keys()
    assert resplit != same
    assert rechosen.keys() != same.keys()


def test_rows_that_were_stored_without_digests_have_the_same_ones(prepared: Prepare, tmp_path: Path) -> None:
    rows = prepared(
        source(write_rows(tmp_path / "a.jsonl", chats(40))),
        source(write_rows(tmp_path / "b.jsonl", [{"text": "so it was"}])),
    )
    rows_folder = rows.folder / "rows"
    digests = [rows.digest(side, sources) for side in SIDES for sources in (None, ["b"])]
    for store in (RowStore(rows_folder / side / "examples") for side in SIDES):
        parts = list(store.read(store.positions))
        shutil.rmtree(store.folder)
        for positions, batch in parts:
            kept = [name for name in batch.schema.names if name not in ("position", "type", "digest")]
            store.save(positions, {name: batch[name] for name in kept})
    meta = json.loads((rows_folder / "prepared.json").read_text())
    write_json(rows_folder / "prepared.json", meta | {"version": 5})
    old = Prepared.open(rows.folder)
    assert [old.digest(side, sources) for side in SIDES for sources in (None, ["b"])] == digests
    assert list(old.train.select(["a"], [Conversation])) == list(rows.train.select(["a"]))


@pytest.mark.parametrize("where", ["cache", "stage"])
def test_a_full_disk_is_a_storage_error_and_leaves_no_rows(tmp_path: Path, tiny_folder: Path, where: str) -> None:
    write_rows(tmp_path / "a.jsonl", chats(400))
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "def go(folder): prepare(Data(sources=(Source(path='a.jsonl'),)), template, Path(folder), 0, cache=Path('cache'))\n"
        "if sys.argv[2] == 'stage': go('before')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n"
        "try: go('stage')\n"
        "except StorageError as error: print(error); sys.exit(error.exit_code)\n"
    )
    for name in ("stage", "before"):
        (tmp_path / name).mkdir()
    script = start_script(code, tiny_folder, tmp_path, where)
    output, errors = script.communicate()
    assert script.returncode == 2, errors
    assert "nothing half-written was left" in output
    assert where in output
    assert not [path for path in (tmp_path / "cache").rglob("*") if ".corral-tmp-" in path.name]
    assert list((tmp_path / "stage").iterdir()) == []


def test_progress_reports_reading_encoding_and_writing(prepared: Prepare, tmp_path: Path) -> None:
    a = source(write_rows(tmp_path / "a.jsonl", chats(250)), rows=150)
    listener = Listener()
    prepared(a, progress=listener)
    assert listener.starts[:2] == [("Reading rows", None), ("Encoding rows", 150)]
    assert listener.titles[2:] == ["Reading words", "Comparing with held-out rows", "Writing rows"]
    assert listener.updates[:2] == [(100, "a"), (200, "a")]
    done, note = listener.updates[2]
    assert done == 150
    assert re.fullmatch(r"a, [\d,]+ rows/s", note)
    again = Listener()
    prepared(a, progress=again)
    assert again.titles == ["Reading rows", "Comparing with held-out rows", "Writing rows"]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "bot"]), "content": st.text(max_size=30) | JUNK}
)
ROW = st.one_of(
    st.builds(chat, st.text(max_size=60), st.text(max_size=60)),
    st.fixed_dictionaries({"messages": st.lists(TURN, max_size=4)}),
    st.fixed_dictionaries({"messages": JUNK}),
    JUNK,
)
LINE = st.one_of(
    ROW.map(json.dumps), st.text(st.characters(exclude_characters="\0\n", exclude_categories=["Cs"]), max_size=20)
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(LINE, max_size=20),
    st.lists(LINE, max_size=10),
    st.sampled_from([(None, None), (3, None), (None, 2.5)]),
    st.sampled_from(["drop", "truncate"]),
)
def test_the_sums_of_the_ledger_add_up_for_any_junk(
    template: Template,
    tmp_path: Path,
    first: list[str],
    second: list[str],
    chosen: tuple[int | None, float | None],
    overlong: Any,
) -> None:
    cap, weight = chosen
    good = [json.dumps(row) for row in chats(2)]
    files = {"a": [*first, *good], "b": [*good, *second, *first, json.dumps(chats(1, start=50)[0])]}
    for name, lines in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), "utf-8", newline="\n")
    sources = (
        source(tmp_path / "a.jsonl", rows=cap, format="messages", weight=weight),
        source(tmp_path / "b.jsonl", format="messages", weight=weight and 1),
    )
    data = Data(sources=sources, split=NONE_HELD_OUT, max_length=60, overlong=overlong)
    result = prepare(data, template, tmp_path, 0, cache=tmp_path / "cache")
    ledger = result.ledger
    table = parquet.read_table(tmp_path / "ledger.parquet").to_pydict()
    assert Counter(zip(table["source"], table["fate"], strict=True)) == {
        (name, fate): n for name, entry in ledger["sources"].items() for fate, n in entry["fates"].items() if n
    }
    assert len(set(zip(table["source"], table["row"], strict=True))) == len(table["row"]) == ledger["rows"]
    for name, lines in files.items():
        entry = ledger["sources"][name]
        assert entry["rows"] == sum(1 for line in lines if line.strip()) == sum(entry["fates"].values())
        assert sum(entry["sides"].values()) == sum(entry["fates"][fate] for fate in USED_FATES)
        for fate in FATES_WITH_REASON:
            counts = [reason["count"] for reason in entry["reasons"].values() if reason["fate"] == fate]
            assert sum(counts) == entry["fates"][fate]
        for reason in entry["reasons"].values():
            assert len(reason["examples"]) == min(5, reason["count"])
    assert ledger["rows"] == sum(entry["rows"] for entry in ledger["sources"].values())
    assert ledger["fates"] == {f: sum(entry["fates"][f] for entry in ledger["sources"].values()) for f in FATES}
    assert len(result.train) == sum(ledger["fates"][fate] for fate in USED_FATES)
    assert len({e.key for e in result.train}) == len(result.train)


def test_the_wikibooks_asset_is_prepared_whole(prepared: Prepare) -> None:
    asset = Source(path="asset:wikibooks-recipes", format="wikibooks-recipes", rows=300)
    result = prepared(asset, max_length=2000)
    assert result.ledger["rows"] == 3129
    assert result.ledger["fates"]["not sampled"] == 2657
    assert len(sides_of(result)) == result.ledger["fates"]["kept"] > 250
    assert (np.asarray(result.train.trained_tokens) > 0).all()


def test_memory_stays_flat_while_a_large_file_is_read(tiny_folder: Path, tmp_path: Path) -> None:
    filler = "x" * 20_000
    write_rows(tmp_path / "a.jsonl", (row | {"filler": filler} for row in chats(4000)))
    assert (tmp_path / "a.jsonl").stat().st_size > 80e6
    code = (
        "from corral.system import peak_memory\n"
        "before = peak_memory()\n"
        "prepare(Data(sources=(Source(path='a.jsonl'),)), template, Path('.'), 0, cache=Path('cache'))\n"
        "print(peak_memory() - before)\n"
    )
    output, errors = start_script(code, tiny_folder, tmp_path).communicate()
    assert int(output) < 30e6, errors


def test_a_long_document_is_not_held_once_for_each_of_its_windows(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"{i} words of a book\n" for i in range(8000)))
    tracemalloc.start()
    try:
        book = prepared(source(tmp_path / "book.txt"), max_length=64, split=NONE_HELD_OUT, workers=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(book.train) > 1000, "many windows, so that a copy for each would be seen"
    assert peak < 300 * (tmp_path / "book.txt").stat().st_size
    assert sum(len(e.record.content) for e in book.train if isinstance(e.record, Text)) == len(
        (tmp_path / "book.txt").read_text()
    )


def sharegpt_log(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations as public logs of chats hold them: 36 % begin with the assistant (chats cut in two), 15 % end with
    the user, some have two turns of one side, a third is longer than the context, and 4 % hold an answer that is too long by
    itself, some as their only one."""
    random_ = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        words = random_.choice((4, 4, 12))
        turns = [
            {"from": side, "value": f"{number}.{i} " + "word " * random_.randint(1, words)}
            for i in range(random_.choice((1, 2, 3, 9)))
            for side in ("human", "gpt")
        ]
        if number % 25 == 0:
            turns[-1]["value"] += "word " * 400
        kind = random_.random()
        if kind < 0.36:
            turns.insert(0, {"from": "gpt", "value": f"{number}: as I said"})
        elif kind < 0.51:
            turns.append({"from": "human", "value": "thanks, bye"})
        elif kind < 0.56:
            turns.insert(1, {"from": "human", "value": "I mean, please"})
        rows.append({"conversations": turns})
    return rows


def test_over_95_percent_of_a_real_chat_log_is_trained_on(prepared: Prepare, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "log.jsonl", sharegpt_log(300))
    mended = prepared(source(path), max_length=350)
    fates = mended.ledger["fates"]
    used = sum(fates[fate] for fate in USED_FATES)
    assert used > 0.95 * 300, fates
    assert fates["trimmed"] > 30
    assert fates["split"] > 30
    assert max(len(s.ids) for example in mended.train for s in example.sequences) <= 350
    sides: dict[int, set[str]] = {}
    for side in SIDES:
        for example in mended.side(side):
            sides.setdefault(example.index, set()).add(side)
    assert all(len(of_row) == 1 for of_row in sides.values()), "the windows of a row are on one side"
    strict = prepared(source(path), max_length=350, turns="strict", overlong="drop")
    assert strict.ledger["fates"]["kept"] == fates["kept"] < 0.5 * 300


def test_weights_count_the_examples_that_split_rows_become(prepared: Prepare, tmp_path: Path) -> None:
    a = source(write_rows(tmp_path / "a.jsonl", [dialogue(10, i % 7 + 4) for i in range(30)]), weight=1)
    b = source(write_rows(tmp_path / "b.jsonl", chats(100)), weight=1)
    sources = prepared(a, b, max_length=200, split=NONE_HELD_OUT).ledger["sources"]
    assert sources["a"]["fates"]["split"] > 5
    assert abs(sources["a"]["training_examples"] - sources["b"]["training_examples"]) < 10


def test_what_follows_the_last_answer_to_be_trained_is_left_out(prepared: Prepare, tmp_path: Path) -> None:
    turns = [*chat("a?", "good")["messages"], *chat("b?", "bad")["messages"]]
    turns[3]["weight"] = 0
    (example,) = prepared(source(write_rows(tmp_path / "a.jsonl", [{"messages": turns}])), split=NONE_HELD_OUT).train
    assert example.record == Conversation.from_turns(("user", "a?"), ("assistant", "good"))


def test_a_copy_names_its_original_and_contaminated_rows_are_listed(prepared: Prepare, tmp_path: Path) -> None:
    a = source(write_rows(tmp_path / "a.jsonl", chats(30)))
    same_questions = [chat(f"What is {i} plus {i}?", "No.") for i in range(9)]
    b = source(write_rows(tmp_path / "b.jsonl", [*chats(3, start=5), *same_questions]))
    result = prepared(a, b)
    table = parquet.read_table(result.folder / "ledger.parquet").to_pylist()
    assert [row["original"] for row in table if row["fate"] == "duplicate"] == ["a row 6", "a row 7", "a row 8"]
    assert {row["original"] for row in table if row["fate"] != "duplicate"} == {None}
    assert "copy of a row 6" in [row["reason"] for row in result.left_out]
    for label, entry in result.ledger["sources"].items():
        marked = [row["row"] for row in table if row["source"] == label and row["contaminated"]]
        assert entry["contaminated"] == len(marked)
        assert entry["contaminated_rows"] == marked[:5]
    assert sum(entry["contaminated"] for entry in result.ledger["sources"].values()) > 0


def test_rows_of_several_files_are_told_by_file_and_line(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for name, first in (("a", 0), ("b", 20)):
        write_rows(tmp_path / "shards" / f"{name}.jsonl", [*chats(20, first), {"messages": []}, chats(1)[0]])
    result = prepared(source(tmp_path / "shards"))
    entry = result.ledger["sources"]["shards"]
    assert entry["reasons"]["messages is an empty list"]["examples"] == ["a.jsonl:21", "b.jsonl:21"]
    table = parquet.read_table(result.folder / "ledger.parquet").to_pylist()
    assert [(row["file"], row["row"]) for row in table] == [(f"{n}.jsonl", i) for n in "ab" for i in range(1, 23)]
    copies = {(row["file"], row["row"]): row["original"] for row in table if row["fate"] == "duplicate"}
    assert copies == {("a.jsonl", 22): "shards row a.jsonl:1", ("b.jsonl", 22): "shards row a.jsonl:1"}
    assert {example.index for example in result.train} <= {f"{n}.jsonl:{i}" for n in "ab" for i in range(1, 21)}
