"""Mixtures, duplicates, contamination and the loss budget, from files to sides and ledger."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from corral.data.prepare import Prepared, prepare
from corral.errors import DataError, GateError
from corral.messages import Conversation
from corral.recipe import Data, Split
from corral.template import Template
from tests.data.conftest import NONE_HELD_OUT, chat, chats, prose, source, write_rows

Prepare = Callable[..., Prepared]


def fates_of(result: Prepared, name: str = "a") -> dict[str, int]:
    return {fate: n for fate, n in result.ledger["sources"][name]["fates"].items() if n}


def table(folder: Path) -> list[dict[str, Any]]:
    return parquet.read_table(folder / "ledger.parquet").to_pylist()


def test_near_duplicates_are_left_out_across_sources_if_the_recipe_says_so(prepared: Prepare, tmp_path: Path) -> None:
    rows = [chat(f"Question {i}: {prose(i)}", prose(100 + i)) for i in range(20)]
    nearly = [chat(f"question {i} {prose(i)}!", prose(100 + i) + " indeed") for i in range(5)]
    a = source(write_rows(tmp_path / "a.jsonl", [*rows, nearly[0], rows[3]]))
    b = source(write_rows(tmp_path / "b.jsonl", [*nearly[1:], *chats(6)]))
    settings = {"split": NONE_HELD_OUT, "max_length": 2000}
    exact = prepared(a, b, **settings)
    assert fates_of(exact) == {"kept": 21, "duplicate": 1}
    near = prepared(a, b, duplicates="near", into=tmp_path / "near", **settings)
    assert fates_of(near) == {"kept": 20, "duplicate": 1, "near duplicate": 1}
    assert fates_of(near, "b")["near duplicate"] == 4
    assert [x["row"] for x in table(tmp_path / "near") if x["fate"] == "near duplicate"] == [21, 1, 2, 3, 4]
    keep = prepared(a, b, duplicates="keep", **settings)
    assert fates_of(keep) == {"kept": 22}
    shown = [row for row in near.left_out if row["fate"] == "near duplicate"]
    assert "question 0" in shown[0]["text"]
    assert shown[0]["reason"] == "copy of a row 1"


def test_copies_that_are_kept_are_all_on_one_side(prepared: Prepare, tmp_path: Path) -> None:
    a = source(write_rows(tmp_path / "a.jsonl", chats(60) * 3))
    for split in (Split(validation=0.2, test=0.2), Split(validation=10, test=20)):
        result = prepared(a, duplicates="keep", split=split)
        sides = [{e.key for e in result.side(side)} for side in ("train", "validation", "test")]
        assert sum(map(len, sides)) == 60
        assert len(result.train) == 3 * len(sides[0])


def test_numbers_of_held_out_rows_are_exact_and_in_proportion_to_the_sources(prepared: Prepare, tmp_path: Path) -> None:
    a = source(write_rows(tmp_path / "a.jsonl", [*chats(90), {"messages": []}]))
    b = source(write_rows(tmp_path / "b.jsonl", chats(30, start=200)))
    result = prepared(a, b, split=Split(validation=12, test=24))
    assert (len(result.train), len(result.validation), len(result.test)) == (84, 12, 24)
    assert Counter(e.source for e in result.test) == {"a": 18, "b": 6}
    assert Counter(e.source for e in result.validation) == {"a": 9, "b": 3}
    with pytest.raises(DataError, match="all 120 usable rows are held out"):
        prepared(a, b, split=Split(validation=0, test=500))
    with pytest.raises(DataError, match="the validation side is empty"):
        prepared(a, b, split=Split(validation=0.0001, test=30))


def test_a_repeated_source_is_repeated_in_training_only(prepared: Prepare, tmp_path: Path) -> None:
    a = source(write_rows(tmp_path / "a.jsonl", chats(40)), repeat=3)
    b = source(write_rows(tmp_path / "b.jsonl", chats(40, start=100)))
    result = prepared(a, b)
    ledger = result.ledger["sources"]
    counted = Counter(e.source for e in result.train)
    assert counted == {"a": 3 * ledger["a"]["sides"]["train"], "b": ledger["b"]["sides"]["train"]}
    assert set(Counter(e.key for e in result.train if e.source == "a").values()) == {3}
    assert {*Counter(e.key for e in result.test).values(), *Counter(e.key for e in result.validation).values()} == {1}
    once = prepared(a.model_copy(update={"repeat": 1}), b)
    firsts = list(dict.fromkeys(e.key for e in result.train))
    assert set(firsts) == {e.key for e in once.train}


def test_weights_make_the_largest_mixture_in_proportion_and_the_rest_is_not_sampled(
    prepared: Prepare, tmp_path: Path
) -> None:
    a = source(write_rows(tmp_path / "a.jsonl", [*chats(100), chats(1)[0], {"messages": []}]), weight=1)
    b = source(write_rows(tmp_path / "b.jsonl", chats(100, start=200)), weight=3)
    into = tmp_path / "mixed"
    mixed = prepared(a, b, into=into)
    assert Counter(e.source for e in mixed.train) == {"a": 20, "b": 60}
    assert fates_of(mixed) == {"kept": 60, "dropped": 1, "duplicate": 1, "not sampled": 40}
    assert fates_of(mixed, "b") == {"kept": 100}
    why = "beyond the weight 1 of 4, which takes 20 of 60 training rows"
    assert mixed.ledger["sources"]["a"]["reasons"][why]["count"] == 40
    left = [row for row in table(into) if row["fate"] == "not sampled"]
    assert {(row["source"], row["reason"], row["side"]) for row in left} == {("a", why, None)}
    shares = [mixed.ledger["sources"][name]["training_share"] for name in "ab"]
    assert shares == [0.25, 0.75]
    # The rows held out are those of the same sources without weights, and the mixture is a part of theirs.
    plain = prepared(*(s.model_copy(update={"weight": None}) for s in (a, b)))
    for side in ("validation", "test"):
        assert [e.key for e in mixed.side(side)] == [e.key for e in plain.side(side)]
    assert {e.key for e in mixed.train} < {e.key for e in plain.train}
    assert "training_share" in plain.ledger["sources"]["a"]


def test_a_repeated_source_lasts_longer_in_a_mixture(prepared: Prepare, tmp_path: Path) -> None:
    a = source(write_rows(tmp_path / "a.jsonl", chats(60)), weight=3)
    b = source(write_rows(tmp_path / "b.jsonl", chats(10, start=100)), weight=1, repeat=2)
    mixed = prepared(a, b, split=NONE_HELD_OUT)
    assert Counter(e.source for e in mixed.train) == {"a": 60, "b": 20}
    assert set(Counter(e.key for e in mixed.train if e.source == "b").values()) == {2}
    once = prepared(a, b.model_copy(update={"repeat": 1}), split=NONE_HELD_OUT)
    assert Counter(e.source for e in once.train) == {"a": 30, "b": 10}


def test_a_weight_neither_counts_as_loss_nor_hides_one(prepared: Prepare, tmp_path: Path) -> None:
    a = source(write_rows(tmp_path / "a.jsonl", [*chats(90), *[{"messages": []}] * 10]), weight=1)
    b = source(write_rows(tmp_path / "b.jsonl", chats(90, start=100)), weight=9)
    mixed = prepared(a, b, split=NONE_HELD_OUT, max_loss=0.06)
    entry = mixed.ledger["sources"]["a"]
    assert (entry["asked"], entry["lost"], entry["sides"]["train"]) == (100, 10, 10)
    with pytest.raises(GateError) as caught:
        prepared(a, b, split=NONE_HELD_OUT, max_loss=0.05)
    assert "10 × messages is an empty list" in caught.value.what
    assert "beyond the weight" not in caught.value.what


def test_training_rows_that_share_passages_with_held_out_rows_are_reported_or_dropped(
    prepared: Prepare, tmp_path: Path
) -> None:
    # Each question stands twice, with other words around it: rows n and n + 40.
    asked = [chat(f"{start}{prose(i)}", f"{start}answer {i}.") for start in ("", "Please: ") for i in range(40)]
    a, split = source(write_rows(tmp_path / "a.jsonl", asked)), Split(validation=6, test=6)
    reported = prepared(a, split=split, into=tmp_path / "reported")
    held_out = {e.index for e in (*reported.validation, *reported.test)}
    partners = {n + 40 if n <= 40 else n - 40 for n in held_out} - held_out
    assert len(partners) > 5
    assert {x["row"] for x in table(tmp_path / "reported") if x["contaminated"]} == partners
    assert partners <= {e.index for e in reported.train}
    assert reported.ledger["sources"]["a"]["contaminated"] == len(partners)
    assert fates_of(reported) == {"kept": 80}
    dropped = prepared(a, split=split, into=tmp_path / "dropped", contamination="drop")
    assert {x["row"] for x in table(tmp_path / "dropped") if x["fate"] == "contaminated"} == partners
    assert fates_of(dropped) == {"kept": 80 - len(partners), "contaminated": len(partners)}
    assert {e.index for e in dropped.train} == {e.index for e in reported.train} - partners
    assert [e.index for e in dropped.test] == [e.index for e in reported.test]
    assert prepared(a, split=split, contamination="ignore").ledger["sources"]["a"]["contaminated"] == 0


def test_too_many_losses_stop_the_run_and_list_the_worst_reasons(prepared: Prepare, tmp_path: Path) -> None:
    rows = [*chats(90), *[{"messages": []}] * 4, *[chat(f"Long {i}?", "yes " * 300) for i in range(6)]]
    a, stage = source(write_rows(tmp_path / "a.jsonl", rows)), tmp_path / "stage"
    with pytest.raises(GateError) as caught:
        prepared(a, into=stage, max_loss="9%")
    assert caught.value.exit_code == 4
    lines = caught.value.what.splitlines()
    assert lines[0] == "10.00% of the rows asked for are lost (10 of 100); `data.max_loss` allows 9.00%"
    assert lines[1].startswith("  a: 6 × longer than 1024 tokens (rows 95, 96")
    assert lines[2].startswith("  a: 4 × messages is an empty list")
    assert str(stage) in str(caught.value.where)
    assert json.loads((stage / "ledger.json").read_text())["rows"] == 100
    assert len(table(stage)) == 100
    assert not (stage / "rows").exists()
    assert len(prepared(a, max_loss=0.1).train) > 0
    with pytest.raises(GateError, match="6 × truncated"):
        prepared(a, max_loss=0.05, overlong="truncate")


def test_rows_left_out_on_purpose_are_not_lost_and_a_cap_scales_unreadable_rows(
    prepared: Prepare, tmp_path: Path
) -> None:
    rows = [*chats(100), *chats(50), *[{"messages": []}] * 20]
    a = source(write_rows(tmp_path / "a.jsonl", rows), rows=10)
    entry = prepared(a, split=NONE_HELD_OUT, max_loss=0.17).ledger["sources"]["a"]
    assert (entry["asked"], entry["lost"]) == (12, 2)
    with pytest.raises(GateError, match=r"16\.67%"):
        prepared(a, split=NONE_HELD_OUT, max_loss=0.16)


def test_preferences_and_feedback_train_on_their_answers_only_and_texts_on_all(
    prepared: Prepare, template: Template, tmp_path: Path
) -> None:
    prompt = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"},
    ]
    pair = {"prompt": prompt, "chosen": [{"role": "assistant", "content": "yes"}]}
    pair |= {"rejected": [{"role": "assistant", "content": "no no"}]}
    judged = [{"prompt": f"q{i}", "completion": "good", "label": i % 2 == 0} for i in range(4)]
    long = " ".join(f"word{i}" for i in range(100))
    result = prepared(
        source(write_rows(tmp_path / "pairs.jsonl", [pair]), format="preference"),
        source(write_rows(tmp_path / "judged.jsonl", judged), format="feedback"),
        source(
            write_rows(tmp_path / "texts.jsonl", [{"text": "hello <|im_end|> there"}, {"text": long}]), format="text"
        ),
        split=NONE_HELD_OUT,
        max_length=64,
    )
    assert (result.ledger["fates"]["kept"], result.ledger["fates"]["split"]) == (6, 1)
    by_source: dict[str, list[Any]] = {}
    for example in result.train:
        by_source.setdefault(example.source, []).append(example)
    (preference,) = by_source["pairs"]
    asked = Conversation.from_turns(("user", "a?"), ("assistant", "b"), ("user", "c?"))
    for sequence, answer in zip(preference.sequences, ("yes", "no no"), strict=True):
        assert sequence.ids == template.encode(asked.add("assistant", answer)).ids
        assert sequence.trained.index(True) == len(template.prompt(asked))
        assert template.decode([i for i, t in zip(sequence.ids, sequence.trained, strict=True) if t]) == answer
    assert {example.record.score for example in by_source["judged"]} == {0.0, 1.0}
    (short,) = (e for e in by_source["texts"] if e.record.content.startswith("hello"))
    assert all(short.sequences[0].trained)
    assert 2 not in short.sequences[0].ids[:-1]
    windows = [e for e in by_source["texts"] if e is not short]
    assert {e.index for e in windows} == {2}
    assert len({e.key for e in windows}) == len(windows) > 1, "each window is an example of its own"
    assert all(len(e.sequences) == 1 and len(e.sequences[0].ids) <= 64 for e in windows)
    windows.sort(key=lambda e: long.index(e.record.content))
    assert "".join(e.record.content for e in windows) == long
    rest = [
        i for e in windows for i, trained in zip(e.sequences[0].ids, e.sequences[0].trained, strict=True) if trained
    ]
    assert template.decode(rest) == long


def test_the_ledger_names_the_format_and_why_it_was_taken(prepared: Prepare, tmp_path: Path) -> None:
    entry = prepared(source(write_rows(tmp_path / "a.jsonl", chats(40)))).ledger["sources"]["a"]
    assert entry["format"] == "messages"
    assert "messages" in entry["why"]
    assert entry["trained_tokens"] > 0


def test_each_mixture_has_its_own_proportions(template: Template, tmp_path: Path) -> None:
    sources = [
        source(write_rows(tmp_path / f"{name}.jsonl", chats(20, 100 * i)), weight=weight)
        for i, (name, weight) in enumerate({"a": 2, "b": 1, "c": 8, "d": 1}.items())
    ]
    data = Data(sources=tuple(sources), split=NONE_HELD_OUT)
    rows = prepare(data, template, tmp_path, 0, mixtures=[("a", "b"), ("c", "d")], cache=tmp_path / "cache").train
    assert {name: len(rows.select([name])) for name in "abcd"} == {"a": 20, "b": 10, "c": 20, "d": 3}
