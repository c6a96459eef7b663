from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.data.row_store import RowStore, list_column, split_list_column, split_positions
from corral.errors import DataError


def squares(positions: Iterable[int]) -> dict[str, Any]:
    """Columns of a number, a pair and a list: n times n."""
    values = np.array(list(positions), np.int64)
    lists = list_column(np.repeat(values, values), np.cumsum([0, *values]))
    return {"square": values**2, "pair": np.stack([values, -values], axis=1), "list": lists}


@given(st.lists(st.lists(st.integers(0, 50), unique=True, min_size=1, max_size=20), max_size=5), st.randoms())
def test_every_saved_row_is_read_in_the_order_asked_for_whatever_the_files(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[list[int]], random: Any
) -> None:
    store = RowStore(tmp_path_factory.mktemp("store"))
    for piece in pieces:
        positions = np.array(sorted(piece))
        store.save(positions, squares(positions))
    store.reload()
    saved = sorted({position for piece in pieces for position in piece})
    assert store.positions.tolist() == saved
    assert store.select_missing(np.arange(51)).tolist() == [position for position in range(51) if position not in saved]
    random.shuffle(saved)
    wanted = np.array(saved, np.int64)
    assert store.column("square", wanted).tolist() == [position**2 for position in saved]
    assert store.column("pair", wanted).tolist() == [[position, -position] for position in saved]
    lists = [row for _, batch in store.read(wanted) for row in batch["list"].to_pylist()]
    assert lists == [[position] * position for position in saved]
    for position in saved:
        batch, offset = store.locate(position)
        assert batch["square"][offset].as_py() == position**2


@given(st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=8), st.data())
def test_lists_come_apart_as_they_were_put_together_also_from_a_slice(
    rows: list[list[int]], data: st.DataObject
) -> None:
    values = np.array([value for row in rows for value in row], np.int64)
    column = list_column(values, np.cumsum([0, *map(len, rows)]))
    assert column.to_pylist() == rows
    start = data.draw(st.integers(0, len(rows)))
    flat, bounds = split_list_column(column[start:])
    assert [flat.to_pylist()[a:b] for a, b in pairwise(bounds)] == rows[start:]


def test_a_column_of_no_rows_has_the_type_and_width_of_one_with_rows(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    keys = np.zeros((3, 32), np.uint8)
    store.save(np.arange(3), {"key": keys, "fate": np.zeros(3, np.int8)})
    store.reload()
    none = np.zeros(0, np.int64)
    for name in ("key", "fate"):
        some, empty = store.column(name), store.column(name, none)
        assert (empty.dtype, empty.shape) == (some.dtype, (0, *some.shape[1:]))


def test_more_files_than_are_kept_open_are_all_found(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    for position in range(60):
        store.save(np.array([position]), squares([position]))
    store.reload()
    assert [store.locate(p)[0]["square"][0].as_py() for p in (*range(60), *range(60))] == [p**2 for p in range(60)] * 2


def test_the_files_are_plain_arrow_files(tmp_path: Path) -> None:
    RowStore(tmp_path).save(np.arange(3), squares(range(3)))
    (path,) = tmp_path.iterdir()
    with pa.ipc.open_file(path) as file:
        assert file.read_all().to_pylist()[2] == {"position": 2, "square": 4, "pair": [2, -2], "list": [2, 2]}


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-30], lambda b: b"", lambda b: b"x" * len(b), lambda b: b[:400] + b"x" + b[401:]]
)
def test_a_damaged_file_counts_as_missing_and_the_others_stay(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    store = RowStore(tmp_path)
    store.save(np.arange(10), squares(range(10)))
    (path,) = tmp_path.iterdir()
    store.save(np.arange(10, 20), squares(range(10, 20)))
    path.write_bytes(damage(path.read_bytes()))
    store.reload()
    assert store.select_missing(np.arange(20)).tolist() == list(range(10))
    assert store.damaged == [path]


def test_chunks_cover_all_positions_in_order() -> None:
    positions = np.arange(0, 3000, 2)
    pieces = split_positions(positions)
    assert [len(p) for p in pieces] == [500, 500, 500]
    assert np.concatenate(pieces).tolist() == positions.tolist()
    assert split_positions(positions[:0]) == []


def test_a_row_that_is_not_stored_is_an_error_and_never_another_row(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    for position in (0, 3, 9):
        with pytest.raises(DataError, match="missing or damaged"):
            store.column("square", np.array([position]))
        if not len(store):
            store.save(np.array([0, 1, 2, 5]), squares([0, 1, 2, 5]))
            store.reload()
    with pytest.raises(DataError, match="missing or damaged"):
        store.locate(3)
    assert store.column("square", np.array([0])).tolist() == [0]
