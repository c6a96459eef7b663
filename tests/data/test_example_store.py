from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.data.example_store import Example, ExampleStore
from corral.data.ledger import FATES
from corral.data.row_store import RowStore
from corral.errors import DataError
from corral.messages import (
    RECORD_TYPES,
    Conversation,
    Feedback,
    Preference,
    Record,
    Text,
    record_from_json,
    record_to_json,
)
from corral.template import Encoded
from tests.data.conftest import write_examples

IDS = st.integers(0, 2**32 - 1)
SEQUENCE = st.lists(st.tuples(IDS, st.booleans()), min_size=1, max_size=12).map(
    lambda tokens: Encoded(tuple(i for i, _ in tokens), tuple(t for _, t in tokens))
)


def example(number: int, *sequences: Encoded) -> Example:
    record = Conversation.from_turns(("user", f"Frage {number} 🙂"), ("assistant", "東京\n\u2028"))
    return Example(f"{number:064x}", "süß", number, sequences, record)


@given(st.lists(st.lists(SEQUENCE, min_size=1, max_size=3), max_size=12))
def test_examples_with_one_or_more_sequences_round_trip(
    tmp_path_factory: pytest.TempPathFactory, sequences: list[list[Encoded]]
) -> None:
    examples = [example(i, *several) for i, several in enumerate(sequences)]
    rows = write_examples(tmp_path_factory.mktemp("rows") / "side", examples, truncated={0, 3})
    assert sorted(rows, key=lambda e: e.index) == examples
    for i, e in enumerate(rows):
        assert rows.lengths[i] == sum(len(s.ids) for s in e.sequences)
        assert rows.trained_tokens[i] == sum(sum(s.trained[1:]) for s in e.sequences)
        assert FATES[rows.fates[i]] == ("truncated" if e.index in (0, 3) else "kept")
    figures, all_sequences = (
        rows.sequence_figures(),
        [(i, k, s) for i, e in enumerate(rows) for k, s in enumerate(e.sequences)],
    )
    assert list(zip(figures.example, figures.place, strict=True)) == [(i, k) for i, k, _ in all_sequences]
    for n, (_, _, s) in enumerate(all_sequences):
        start = s.trained.index(True) if any(s.trained) else len(s.ids)
        assert (figures.length[n], figures.start[n], figures.trained[n]) == (len(s.ids), start, sum(s.trained[1:]))
        for m, (_, _, other) in enumerate(all_sequences):
            assert (bytes(figures.content[n]) == bytes(figures.content[m])) == (s.ids == other.ids)
            assert bytes(figures.prompt[n]) != bytes(figures.content[m]) or s.ids[:start] == other.ids


def test_the_figures_of_a_selection_are_those_of_its_examples_and_name_repeats(tmp_path: Path) -> None:
    pairs = [example(i, Encoded((i, 7), (False, True)), Encoded((i, 8, 9), (False, True, True))) for i in range(4)]
    rows = write_examples(tmp_path / "side", pairs, repeat=2)
    figures = rows.sequence_figures()
    assert len(figures.example) == 16
    for n, (number, place) in enumerate(zip(figures.example, figures.place, strict=True)):
        assert figures.length[n] == len(rows[int(number)].sequences[place].ids)
        same = [rows[int(other)].index for other in figures.example[figures.stored == figures.stored[n]]]
        assert same == [rows[int(number)].index] * 4
    none = rows.select(["another"]).sequence_figures()
    assert (len(none.example), none.content.shape) == (0, (0, 32))


def test_rows_are_a_sequence(tmp_path: Path) -> None:
    rows = write_examples(tmp_path / "side", [example(i, Encoded((i, 7), (False, True))) for i in range(9)])
    everything = list(rows)
    assert len(rows) == 9
    assert rows[-1] == everything[8]
    assert rows[2:5] == everything[2:5]
    assert rows[np.int64(4)] == everything[4]
    assert everything[3] in rows
    with pytest.raises(IndexError):
        rows[9]


def test_an_empty_side_is_an_empty_sequence(tmp_path: Path) -> None:
    rows = write_examples(tmp_path / "side", [])
    assert len(rows) == 0
    assert list(rows) == []
    assert rows.lengths.shape == rows.trained_tokens.shape == rows.fates.shape == (0,)


@pytest.mark.parametrize("part", ["examples", "order"])
@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b[:500] + bytes([b[500] ^ 1]) + b[501:]])
def test_a_damaged_file_is_refused(tmp_path: Path, part: str, damage: Callable[[bytes], bytes]) -> None:
    write_examples(tmp_path / "side", [example(i, Encoded((i, 7), (False, True))) for i in range(9)])
    (path,) = (tmp_path / "side" / part).iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="is damaged"):
        ExampleStore(tmp_path / "side")


def test_rows_whose_folder_is_removed_while_they_are_read_are_a_clear_error(tmp_path: Path) -> None:
    rows = write_examples(tmp_path / "side", [example(0, Encoded((0, 7), (False, True)))])
    shutil.rmtree(tmp_path / "side")
    with pytest.raises(DataError, match="stored rows cannot be read"):
        rows[0]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    write_examples(tmp_path / "side", [example(i, Encoded((i, 7), (False, True))) for i in range(9)])
    next((tmp_path / "side" / "examples").iterdir()).unlink()
    with pytest.raises(ValueError, match="0 examples, 9 in their order"):
        ExampleStore(tmp_path / "side")


@given(st.lists(st.integers(0, 1000), unique=True, max_size=40), st.randoms())
def test_the_order_of_rows_does_not_depend_on_the_order_they_come_in(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], random: Random
) -> None:
    examples = [example(i, Encoded((i, 7), (False, True))) for i in numbers]
    first = write_examples(tmp_path_factory.mktemp("rows") / "side", examples, seed=3)
    random.shuffle(examples)
    assert list(first) == list(write_examples(tmp_path_factory.mktemp("rows") / "side", examples, seed=3))


def test_another_seed_gives_another_order(tmp_path: Path) -> None:
    examples = [example(i, Encoded((i, 7), (False, True))) for i in range(50)]
    orders = [[e.index for e in write_examples(tmp_path / str(seed), examples, seed=seed)] for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))
    assert orders[0] != sorted(orders[0])


def test_a_repeated_example_occurs_several_times_in_the_order_and_once_on_disk(tmp_path: Path) -> None:
    rows = write_examples(tmp_path / "side", [example(i, Encoded((i, 7), (False, True))) for i in range(20)], repeat=3)
    indices = [e.index for e in rows]
    assert (len(rows), rows.distinct_count, len(rows.lengths)) == (60, 20, 60)
    assert all(indices.count(i) == 3 for i in range(20))
    assert len(set(indices[:20])) > 8, "the copies of one lie apart"
    assert len(RowStore(tmp_path / "side" / "examples")) == 20


def test_rows_of_equal_content_lie_apart(tmp_path: Path) -> None:
    same = [replace(example(i, Encoded((i, 7), (False, True))), key=f"{i % 4:064x}") for i in range(80)]
    keys = [e.key for e in write_examples(tmp_path / "side", same)]
    assert sum(a == b for a, b in pairwise(keys)) < 35
    assert sorted(keys) == sorted(e.key for e in same)


def test_every_kind_of_record_round_trips_through_json() -> None:
    asked = Conversation.from_turns(("system", "s"), ("user", "q"))
    records: list[Record] = [
        asked.add("assistant", "a"),
        Preference(asked, "better", "worse"),
        Feedback(asked, "an answer", 0.25),
        Text("a document"),
    ]
    for record in records:
        assert record_from_json({"key": "k", "source": "s", "index": 3} | record_to_json(record)) == record


def mixed_examples(random: Random, count: int) -> list[Example]:
    """Examples of two sources and all record types."""
    asked = Conversation.from_turns(("user", "q"))
    records: list[Record] = [
        asked.add("assistant", "a"),
        Preference(asked, "b", "w"),
        Feedback(asked, "a", 1),
        Text("t"),
    ]
    return [
        Example(
            f"{i:064x}",
            random.choice("ab"),
            i,
            (Encoded((i, 7, 8), (False, True, i % 2 == 0)),),
            random.choice(records),
        )
        for i in range(count)
    ]


@given(st.randoms(), st.integers(0, 40), st.sets(st.sampled_from("abc")), st.sets(st.sampled_from(RECORD_TYPES)))
def test_a_selection_has_the_examples_of_its_sources_and_types_in_the_order_of_all(
    tmp_path_factory: pytest.TempPathFactory,
    random: Random,
    count: int,
    sources: set[str],
    types: set[type[Record]],
) -> None:
    rows = write_examples(tmp_path_factory.mktemp("rows") / "side", mixed_examples(random, count), {0, 1}, repeat=2)
    some = rows.select(sources, types)
    chosen = [i for i, e in enumerate(rows) if e.source in sources and type(e.record) in types]
    assert list(some) == [rows[i] for i in chosen]
    for name in ("lengths", "trained_tokens", "fates"):
        assert getattr(some, name).tolist() == getattr(rows, name)[chosen].tolist()
    assert some.distinct_count == len(chosen) // 2
    assert list(rows.select(sources).select(types=types)) == list(some)
    assert list(rows.select()) == list(rows)


def test_the_digest_is_that_of_content_and_order_and_not_of_names(tmp_path: Path) -> None:
    examples = [example(i, Encoded((i, 7), (False, True))) for i in range(9)]
    digest = write_examples(tmp_path / "side", examples).digest
    moved = [replace(e, source="other", index=e.index + 70) for e in reversed(examples)]
    assert write_examples(tmp_path / "moved", moved).digest == digest
    changed = {
        "key": replace(examples[3], key=f"{99:064x}"),
        "record": replace(examples[3], record=Text("another")),
        "ids": replace(examples[3], sequences=(Encoded((3, 8), (False, True)),)),
        "mask": replace(examples[3], sequences=(Encoded((3, 7), (True, True)),)),
        "sequences": replace(examples[3], sequences=(Encoded((3,), (False,)), Encoded((7,), (True,)))),
    }
    others = {
        name: write_examples(tmp_path / name, [*examples[:3], one, *examples[4:]]).digest
        for name, one in changed.items()
    }
    others |= {
        "order": write_examples(tmp_path / "order", examples, seed=1).digest,
        "repeats": write_examples(tmp_path / "repeats", examples, repeat=2).digest,
        "fewer": write_examples(tmp_path / "fewer", examples[:8]).digest,
    }
    assert len({digest, *others.values()}) == 1 + len(others)


def test_a_selection_has_the_digest_of_the_same_examples_stored_alone(tmp_path: Path) -> None:
    examples = mixed_examples(Random(3), 40)
    rows = write_examples(tmp_path / "all", examples, repeat=2)
    alone = write_examples(tmp_path / "alone", [e for e in examples if e.source == "b"], repeat=2)
    assert rows.select(["b"]).digest == alone.digest != rows.digest
