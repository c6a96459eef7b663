from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.data.rows import Example, Rows, RowsWriter
from corral.messages import Conversation
from corral.template import Encoded

IDS = st.integers(0, 2**32 - 1)
SEQUENCE = st.lists(st.tuples(IDS, st.booleans()), min_size=1, max_size=12).map(
    lambda tokens: Encoded(tuple(i for i, _ in tokens), tuple(t for _, t in tokens))
)


def example(number: int, *sequences: Encoded) -> Example:
    record = Conversation.of(("user", f"Frage {number} 🙂"), ("assistant", "東京\n\u2028"))
    return Example(f"{number:064x}", "süß", number, sequences, record)


def written(folder: Path, examples: list[Example], truncated: set[int] | None = None) -> Rows:
    with RowsWriter(folder) as writer:
        for e in examples:
            writer.add(e, truncated=e.index in (truncated or set()))
        writer.finish(seed=0)
    return Rows(folder)


@given(st.lists(st.lists(SEQUENCE, min_size=1, max_size=3), max_size=12))
def test_examples_with_one_or_more_sequences_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, sequences: list[list[Encoded]]
) -> None:
    examples = [example(i, *several) for i, several in enumerate(sequences)]
    rows = written(tmp_path_factory.mktemp("rows") / "side", examples, truncated={0, 3})
    assert sorted(rows, key=lambda e: e.index) == examples
    for place, e in enumerate(rows):
        assert rows.lengths[place] == sum(len(s.ids) for s in e.sequences)
        assert rows.trained_tokens[place] == sum(sum(s.trained[1:]) for s in e.sequences)
        assert rows.truncated[place] == (e.index in (0, 3))


def test_rows_are_a_sequence(tmp_path: Path) -> None:
    rows = written(tmp_path / "side", [example(i, Encoded((i, 7), (False, True))) for i in range(9)])
    everything = list(rows)
    assert len(rows) == 9
    assert rows[-1] == everything[8]
    assert rows[2:5] == everything[2:5]
    assert rows[np.int64(4)] == everything[4]
    assert everything[3] in rows
    with pytest.raises(IndexError):
        rows[9]


def test_an_empty_side_is_an_empty_sequence(tmp_path: Path) -> None:
    rows = written(tmp_path / "side", [])
    assert len(rows) == 0
    assert list(rows) == []
    assert rows.lengths.shape == rows.trained_tokens.shape == rows.truncated.shape == (0,)


def test_the_arrays_are_plain_numpy_files_with_the_ids_as_uint32(tmp_path: Path) -> None:
    written(tmp_path / "side", [example(0, Encoded((5, 2**32 - 1, 9), (False, True, True)))])
    ids = np.load(tmp_path / "side" / "ids.npy", allow_pickle=False)
    assert ids.dtype == np.uint32
    assert ids.tolist() == [5, 2**32 - 1, 9]
    assert np.load(tmp_path / "side" / "trained.npy").tolist() == [False, True, True]


@pytest.mark.parametrize("name", ["ids.npy", "trained.npy", "sequences.npy", "order.npy", "records.jsonl"])
def test_a_file_cut_short_is_refused(tmp_path: Path, name: str) -> None:
    written(tmp_path / "side", [example(i, Encoded((i, 7), (False, True))) for i in range(9)])
    path = tmp_path / "side" / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError):
        Rows(tmp_path / "side")
