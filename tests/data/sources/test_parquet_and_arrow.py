from __future__ import annotations

import datetime
import decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.data.sources import read_rows
from corral.recipe import Source
from tests.data.sources.conftest import refusal, rows_of, values_of, written


def table(path: Path, columns: dict[str, Any], **settings: Any) -> Path:
    pq.write_table(pa.table(columns), path, **settings)
    return path


def test_nested_columns_become_lists_and_objects(tmp_path: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "n": 1, "ok": True},
        {"conversations": [], "n": None, "ok": False},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = rows_of(tmp_path / "a.parquet")
    assert [row.value for row in read] == rows
    assert [(row.index, row.location) for row in read] == [(1, "row 1"), (2, "row 2")]


def test_rows_are_numbered_across_row_groups(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", {"a": list(range(2500))}, row_group_size=700)
    assert [(row.index, row.value) for row in rows_of(path)] == [(i + 1, {"a": i}) for i in range(2500)]


def test_memory_depends_on_the_row_groups_and_not_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    schema = pa.schema([("t", pa.string())])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for i in range(60):
            writer.write_table(pa.table({"t": [f"{i} " + "x" * 1000] * 1000}, schema))
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in read_rows(Source(path=str(path)))]
    assert path.stat().st_size > 60_000_000
    assert max(held) < 10_000_000


def test_values_without_a_json_type_become_text_or_none(tmp_path: Path) -> None:
    moment = datetime.datetime(2024, 5, 1, 12, 30, tzinfo=datetime.UTC)
    columns = {
        "day": pa.array([datetime.date(2024, 5, 1)]),
        "moment": pa.array([moment], pa.timestamp("us", "UTC")),
        "price": pa.array([decimal.Decimal("12.50")]),
        "bytes": pa.array(["Grüße".encode()]),
        "score": pa.array([float("nan")]),
        "none": pa.array([None], pa.string()),
        "map": pa.array([[("k", 1.5)]], pa.map_(pa.string(), pa.float64())),
        "kind": pa.array(["x"]).dictionary_encode(),
    }
    assert values_of(table(tmp_path / "a.parquet", columns)) == [
        {
            "day": "2024-05-01",
            "moment": "2024-05-01T12:30:00+00:00",
            "price": "12.50",
            "bytes": "Grüße",
            "score": None,
            "none": None,
            "map": [["k", 1.5]],
            "kind": "x",
        }
    ]


def test_values_that_cannot_be_text_are_a_fault_of_their_row(tmp_path: Path) -> None:
    broken = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb"))
    columns = {
        "text": broken,
        "image": pa.array([b"x", b"y", b"\x89PNG"]),
        "score": pa.array([float("inf"), 1.0, 2.0]),
    }
    rows = rows_of(table(tmp_path / "a.parquet", columns))
    assert [row.fault for row in rows] == [
        "row 1: infinity in column 'score'",
        "row 2: not UTF-8 text in a column",
        "row 3: bytes in column 'image', which are no UTF-8 text",
    ]


def test_a_damaged_file_or_one_without_rows_is_refused(tmp_path: Path) -> None:
    good = table(tmp_path / "a.parquet", {"a": ["word " * 40] * 5000}, row_group_size=1000, use_dictionary=False)
    content = bytearray(good.read_bytes())
    assert "(reading ended after 0 rows)" in refusal(written(tmp_path / "b.parquet", bytes(content[:-20]))).what
    content[len(content) // 2 : len(content) // 2 + 900] = b"\xff" * 900
    error = refusal(written(tmp_path / "c.parquet", bytes(content)))
    assert "not a .parquet file, or damaged: " in error.what
    assert "(reading ended after " in error.what
    assert error.where == str(tmp_path / "c.parquet")
    assert "not a .parquet file" in refusal(written(tmp_path / "d.parquet", b"PAR1")).what
    assert "holds no rows" in refusal(table(tmp_path / "e.parquet", {"a": pa.array([], pa.string())})).what


@pytest.mark.parametrize("as_file", [False, True])
def test_arrow_files_of_both_formats_are_read_in_parts(tmp_path: Path, as_file: bool) -> None:
    path = tmp_path / "a.arrow"
    rows = [
        {"n": i, "day": datetime.date(2024, 5, 1), "turns": [{"role": "user", "content": "x" * i}]} for i in range(1300)
    ]
    data = pa.Table.from_pylist(rows)
    with (pa.ipc.new_file if as_file else pa.ipc.new_stream)(str(path), data.schema) as writer:
        writer.write_table(data, max_chunksize=1000)
    read = rows_of(path)
    assert [row.value for row in read] == [row | {"day": "2024-05-01"} for row in rows]
    assert (read[-1].index, read[-1].location) == (1300, "row 1300")
    cut = written(tmp_path / "b.arrow", path.read_bytes()[:-2000])
    assert "not a .arrow file, or damaged: " in refusal(cut).what
    assert "not a .arrow file" in refusal(written(tmp_path / "c.arrow", b"\xff\xff\xff\xff\0\1\0\0" + b"\0" * 64)).what


def test_an_arrow_file_with_offsets_beyond_its_values_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    data = pa.table({"t": ["one", "two", "three"]})
    with pa.ipc.new_stream(str(path), data.schema) as writer:
        writer.write_table(data)
    offsets = b"".join(i.to_bytes(4, "little") for i in (0, 3, 6, 11))
    content = path.read_bytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, offsets[:4] + b"\0\0\0\x70" + offsets[8:]))
    assert "not a .arrow file, or damaged" in refusal(path).what


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(deadline=None)
@given(
    st.lists(st.tuples(texts, st.none() | st.integers(-(2**63), 2**63 - 1), st.lists(texts, max_size=3)), min_size=1)
)
def test_rows_written_to_parquet_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int | None, list[str]]]
) -> None:
    schema = pa.schema([("t", pa.string()), ("n", pa.int64()), ("l", pa.list_(pa.string()))])
    values = [dict(zip("tnl", row, strict=True)) for row in rows]
    path = tmp_path_factory.getbasetemp() / "same.parquet"
    pq.write_table(pa.Table.from_pylist(values, schema), path)
    assert values_of(path) == values
