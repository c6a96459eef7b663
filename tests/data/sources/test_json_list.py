from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.data.sources import json_list
from tests.data.sources.conftest import refusal, rows_of, values_of, written


def test_a_fault_in_one_row_of_a_list_leaves_the_others(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", '[{"a": 1}, {"a": NaN}, {"b": 1, "b": 2}, 5, {"a": "\\ud800"},\n {"a": 2}]')
    rows = rows_of(path)
    assert [row.value for row in rows] == [{"a": 1}, None, None, None, None, {"a": 2}]
    assert [row.fault for row in rows[1:5]] == [
        "row 2: NaN is not a JSON number",
        "row 3: the key 'b' stands twice in one object",
        "row 4: the row is a number, where an object is expected",
        "row 5: half a surrogate pair (\\ud800 to \\udfff), which is no character",
    ]
    assert (rows[5].index, rows[5].place) == (6, "row 6")


@pytest.mark.parametrize("chunk", [1, 7, 2**18])
@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[{"a": 1},\n {"a" 2}]', "line 2, column 7, in row 2"),
        ('[{"a": 1}\n {"a": 2}]', "line 2, column 2, in row 1"),
        ('[{"a": 1}, {"a": 2}', "line 1, column 20, in row 2"),
        ('[{"a": 1}]\n[]', "line 2, column 1, in the file's end"),
        ("[\n1,\n]", "line 3, column 1, in row 2"),
        ('[{"a": 1}, {"a": "b}]', "line 1, column 18, in row 2"),
        ('[{"a": 1}, {"a": "\\x"}]', "line 1, column 19, in row 2"),
        ('[{"a": 1}, {"a": tru}]', "line 1, column 18, in row 2"),
    ],
)
def test_a_broken_list_is_refused_with_line_and_column(
    tmp_path: Path, text: str, place: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_list, "_CHUNK", chunk)
    error = refusal(written(tmp_path / "a.json", text))
    assert place in error.what
    assert error.where == str(tmp_path / "a.json")


def test_the_place_of_a_fault_is_right_far_behind_the_start_too(tmp_path: Path) -> None:
    row = json.dumps({"text": "word " * 50})
    one_line = "[" + ", ".join([row] * 5000)
    error = refusal(written(tmp_path / "a.json", f"{one_line}, {{]"))
    assert f"line 1, column {len(one_line) + 4}, in row 5001" in error.what
    lines = "[\n" + ",\n".join([row] * 5000)
    error = refusal(written(tmp_path / "b.json", lines.encode() + b',\n{"a": "\xe9"}]'))
    assert f"byte {len(lines) + 9} (line 5002) is 0xe9" in error.what


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (" \n ", "holds no list"),
        ("[]", "holds no rows"),
        ("[ ]", "holds no rows"),
        ('{"data": []}', "holds an object, where a list"),
        ('{"data": [\n{"a": 1}]}', "holds an object, where a list"),
        ("17", "holds no list"),
        (b'[{"a":\n"\x00"}]', "byte 8 (line 2) is 0x00"),
        (b'[{"a": 1},\n{"b": "\xc3"}]', "byte 18 (line 2) is 0xc3"),
        (b'[{"a": "\xc3', "byte 8 (line 1) is 0xc3"),
        ("[" + "[" * 100_000, "row 1: nested too deeply"),
    ],
)
def test_an_unusable_json_file_is_refused(tmp_path: Path, content: str | bytes, says: str) -> None:
    assert says in refusal(written(tmp_path / "a.json", content)).what


def test_a_json_file_of_objects_on_lines_is_read_as_what_it_is(tmp_path: Path) -> None:
    rows = rows_of(written(tmp_path / "a.json", '\ufeff{"a": 1}\n\n{"a": NaN}\n{"a": 3}'))
    assert [(row.index, row.value) for row in rows] == [(1, {"a": 1}), (3, None), (4, {"a": 3})]


def test_memory_does_not_depend_on_the_length_of_a_list(tmp_path: Path) -> None:
    row = json.dumps({"text": "word " * 400})
    path = written(tmp_path / "a.json", "[" + ",".join([row] * 10_000) + "]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in json_list.read_json(_file(path))) == 10_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 20_000_000
    assert peak < 5_000_000


def _file(path: Path) -> json_list.File:
    from corral.data.sources.local import local_file

    return local_file(path.name, path, ".json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=4), min_size=1, max_size=6),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
)
def test_a_list_read_in_any_pieces_and_lines_of_the_same_rows_give_the_rows(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, object]],
    chunk: int,
    indent: int | None,
    ascii_only: bool,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    listed = written(folder / "same.json", json.dumps(rows, indent=indent, ensure_ascii=ascii_only))
    assert values_of(written(folder / "same.jsonl", lines)) == rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "_CHUNK", chunk)
        assert values_of(listed) == rows
