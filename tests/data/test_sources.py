from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.data.sources import RawRow, read
from corral.errors import AssetError, DataError
from corral.recipe import Source
from tests.data.conftest import chats, write_rows


def rows_of(path: Path) -> list[RawRow]:
    return list(read(Source(path=str(path))))


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        rows_of(path)
    return caught.value


def test_a_broken_line_in_the_middle_is_a_fault_with_its_place_and_reading_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2,, "b": 3}\n{"a": 3}\n')
    first, broken, last = rows_of(path)
    assert (first.value, last.value) == ({"a": 1}, {"a": 3})
    assert (broken.index, broken.value) == (2, None)
    assert broken.fault is not None
    assert broken.fault.startswith("line 2, column 9: not valid JSON: ")
    assert broken.reason is not None
    assert "line" not in broken.reason
    assert "column" not in broken.reason


def test_a_last_line_cut_short_is_a_fault(tmp_path: Path) -> None:
    rows = rows_of(written(tmp_path / "a.jsonl", '{"a": 1}\n{"a": "unfinis'))
    assert [row.value for row in rows] == [{"a": 1}, None]


def test_blank_lines_are_skipped_and_row_numbers_are_line_numbers(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '\n{"a": 1}\n   \r\n\n \t{"a": 2} \r\n\n')
    assert [(row.index, row.value) for row in rows_of(path)] == [(2, {"a": 1}), (5, {"a": 2})]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_byte_order_mark_is_tolerated(tmp_path: Path, name: str) -> None:
    text = '{"a": 1}' if name == "a.jsonl" else '[{"a": 1}]'
    assert [row.value for row in rows_of(written(tmp_path / name, "\ufeff" + text))] == [{"a": 1}]


def test_line_separators_inside_a_string_do_not_end_a_line(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"a": "x\u2028y\u0085z"}\n')
    assert [row.value for row in rows_of(path)] == [{"a": "x\u2028y\u0085z"}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": [1, {"b": -Infinity}]}', "-Infinity is not a JSON number"),
        ('{"a": 1e999}', "a number is too large"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' stands twice in one object"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' stands twice in one object"),
        ('{"a": 1} {"a": 2}', "more text follows the object on its line"),
        ("[1, 2]", "the row is a list, where an object is expected"),
        ('"text"', "the row is a string, where an object is expected"),
        ("null", "the row is null, where an object is expected"),
        ("17", "the row is a number, where an object is expected"),
        ("true", "the row is true or false, where an object is expected"),
        ('{"a": ' + "1" * 5000 + "}", "an integer has too many digits"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_strict_json_forbids_is_a_fault_of_that_row_alone(tmp_path: Path, line: str, reason: str) -> None:
    path = written(tmp_path / "a.jsonl", f'{{"good": 1}}\n{line}\n{{"good": 2}}\n')
    rows = rows_of(path)
    assert [row.value for row in rows] == [{"good": 1}, None, {"good": 2}]
    assert rows[1].reason == reason
    assert rows[1].fault == f"line 2: {reason}"


def test_a_fault_in_one_row_of_a_json_list_leaves_the_others(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", '[{"a": 1}, {"a": NaN}, {"b": 1, "b": 2}, 5,\n {"a": 2}]')
    rows = rows_of(path)
    assert [row.value for row in rows] == [{"a": 1}, None, None, None, {"a": 2}]
    assert [row.fault for row in rows[1:4]] == [
        "row 2: NaN is not a JSON number",
        "row 3: the key 'b' stands twice in one object",
        "row 4: the row is a number, where an object is expected",
    ]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[{"a": 1},\n {"a" 2}]', "line 2, column 7, in row 2"),
        ('[{"a": 1}\n {"a": 2}]', "line 2, column 2, in row 1"),
        ('[{"a": 1}, {"a": 2}', "line 1, column 20, in row 2"),
        ('[{"a": 1}]\n[]', "line 2, column 1, in the file's end"),
        ("[\n1,\n]", "line 3, column 1, in row 2"),
    ],
)
def test_a_broken_json_file_is_refused_with_line_and_column(tmp_path: Path, text: str, place: str) -> None:
    error = refusal(written(tmp_path / "a.json", text))
    assert place in error.what
    assert error.where == str(tmp_path / "a.json")
    assert error.hint


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", "", "the file is empty"),
        ("a.json", "", "the file is empty"),
        ("a.jsonl", "\n  \n\n", "only blank lines"),
        ("a.json", " \n ", "only white space"),
        ("a.json", "[]", "the list of rows is empty"),
        ("a.json", '{"data": []}', "holds an object, where a list"),
        ("a.json", "17", "holds no list"),
        ("a.jsonl", b'{"a": 1}\n\x7fELF\x00\x01', "byte 13 (line 2) is zero"),
        ("a.json", b'[{"a":\n"\x00"}]', "byte 8 (line 2) is zero"),
        ("a.jsonl", '{"a": 1}\n{"b": "Grüße"}\n'.encode("latin1"), "byte 18 (line 2) is 0xfc"),
        ("a.jsonl", b'\xef\xbb\xbf{"a": "\xff"}', "byte 10 (line 1) is 0xff"),
        ("a.json", b'[{"a": 1},\n{"b": "\xc3"}]', "byte 18 (line 2) is 0xc3"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16"),
        ("a.parquet", b"PAR1", "'.parquet' is no kind of file"),
        ("rows", b"{}", "'a name without extension' is no kind of file"),
    ],
)
def test_an_unusable_file_is_refused_with_what_where_and_hint(
    tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    error = refusal(written(tmp_path / name, content))
    assert says in error.what
    assert error.where == str(tmp_path / name)
    assert error.hint
    assert error.exit_code == 2


def test_a_missing_file_is_answered_with_the_nearest_name_in_its_folder(tmp_path: Path) -> None:
    write_rows(tmp_path / "questions.jsonl", chats(1))
    error = refusal(tmp_path / "question.jsonl")
    assert error.hint == "did you mean 'questions.jsonl'?"
    assert "there are questions.jsonl" in str(refusal(tmp_path / "zzz.jsonl").hint)
    assert "no folder" in str(refusal(tmp_path / "nowhere" / "a.jsonl").hint)


def test_a_folder_is_answered_with_the_files_in_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", chats(1))
    error = refusal(tmp_path)
    assert "is a folder" in error.what
    assert "a.jsonl" in str(error.hint)


def test_an_asset_that_is_unknown_or_holds_no_rows_is_refused() -> None:
    with pytest.raises(AssetError, match="no asset 'wikibook-recipes'"):
        list(read(Source(path="asset:wikibook-recipes")))
    with pytest.raises(DataError, match="'smollm2-135m-instruct' is no data set") as caught:
        list(read(Source(path="asset:smollm2-135m-instruct")))
    assert "wikibooks-recipes" in str(caught.value.hint)


def test_the_wikibooks_asset_has_a_row_for_each_recipe() -> None:
    rows = list(read(Source(path="asset:wikibooks-recipes")))
    assert len(rows) == 3129
    assert [row.index for row in rows[:3]] == [1, 2, 3]
    assert all(row.value is not None and {"title", "ingredients", "steps"} <= row.value.keys() for row in rows)


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", b'{"a": 1}\n' * 3 + b"\xff\n")
    assert [row.value for row in islice(read(Source(path=str(path))), 3)] == [{"a": 1}] * 3


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n"), max_size=40), max_size=8))
def test_any_text_gives_a_value_or_a_fault_for_each_line_that_is_not_blank(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.jsonl"
    written(path, "".join(line + "\n" for line in ['{"a": 1}', *lines]))
    rows = rows_of(path)
    filled = [number for number, line in enumerate(['{"a": 1}', *lines], start=1) if line.strip()]
    assert [row.index for row in rows] == filled
    for row in rows:
        assert (row.value is None) == (row.fault is not None) == (row.reason is not None)


@given(st.lists(st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=9)), min_size=1))
def test_a_list_and_lines_of_the_same_rows_read_the_same(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    lines = rows_of(write_rows(folder / "same.jsonl", rows))
    listed = rows_of(written(folder / "same.json", json.dumps(rows, indent=1)))
    assert [row.value for row in lines] == [row.value for row in listed] == rows
