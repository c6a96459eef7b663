from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.data.sources import json_files, read_rows
from corral.recipe import Source
from tests.data.conftest import Listener
from tests.data.sources.conftest import refusal, rows_of, values_of, written


def test_a_broken_line_is_a_fault_with_its_location_and_reading_continues(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2,, "b": 3}\n{"a": 3}\n')
    first, broken, last = rows_of(path)
    assert (first.value, last.value) == ({"a": 1}, {"a": 3})
    assert (broken.index, broken.value, broken.location) == (2, None, "line 2")
    assert broken.fault is not None
    assert broken.fault.startswith("line 2, column 9: not valid JSON: ")
    assert broken.reason is not None
    assert "line" not in broken.reason
    assert "column" not in broken.reason


def test_a_last_line_cut_short_is_a_fault(tmp_path: Path) -> None:
    assert values_of(written(tmp_path / "a.jsonl", '{"a": 1}\n{"a": "unfinis')) == [{"a": 1}, None]


def test_blank_lines_are_skipped_and_row_numbers_are_line_numbers(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '\n{"a": 1}\n   \r\n\n \t{"a": 2} \r\n\n')
    assert [(row.index, row.value, row.location) for row in rows_of(path)] == [
        (2, {"a": 1}, "line 2"),
        (5, {"a": 2}, "line 5"),
    ]


def test_line_separators_inside_a_string_do_not_end_a_line(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"a": "x\u2028y\u0085z"}\n')
    assert values_of(path) == [{"a": "x\u2028y\u0085z"}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": [1, {"b": -Infinity}]}', "-Infinity is not a JSON number"),
        ('{"a": 1e999}', "a number is too large"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' stands twice in one object"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' stands twice in one object"),
        (r'{"\ud800": 1, "\ud800": 1}', r"the key '\ud800' stands twice in one object"),
        (r'{"a": ["x\uD83D"]}', r"half a surrogate pair (\ud800 to \udfff), which is no character"),
        (r'{"a\udc00": 1}', r"half a surrogate pair (\ud800 to \udfff), which is no character"),
        ('{"a": 1} {"a": 2}', "more text follows the object on its line"),
        ("[1, 2]", "the row is a list, where an object is expected"),
        ('[{"role": "user"}]', "the row is a list, where an object is expected"),
        ('[{"role": "user", "content": "x"}, 1]', "the row is a list, where an object is expected"),
        ("[]", "the row is a list, where an object is expected"),
        ('"text"', "the row is a string, where an object is expected"),
        ("null", "the row is null, where an object is expected"),
        ("17", "the row is a number, where an object is expected"),
        ("true", "the row is true or false, where an object is expected"),
        ('{"a": ' + "1" * 5000 + "}", "an integer has too many digits"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_strict_json_forbids_is_a_fault_of_its_row_alone(tmp_path: Path, line: str, reason: str) -> None:
    path = written(tmp_path / "a.jsonl", f'{{"good": 1}}\n{line}\n{{"good": 2}}\n')
    rows = rows_of(path)
    assert [row.value for row in rows] == [{"good": 1}, None, {"good": 2}]
    assert rows[1].reason == reason
    assert rows[1].fault == f"line 2: {reason}"


def test_a_surrogate_pair_is_decoded_to_its_character(tmp_path: Path) -> None:
    assert values_of(written(tmp_path / "a.jsonl", r'{"a": "\ud83d\ude00 \\ud800"}')) == [{"a": "😀 \\ud800"}]


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
    assert (rows[5].index, rows[5].location) == (6, "row 6")


CHAT = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(3)]
ONE, TWO, THREE = (json.dumps(row) for row in CHAT)


@pytest.mark.parametrize("chunk", [1, 7, 2**18])
@pytest.mark.parametrize(
    ("text", "rows", "what"),
    [
        ('[{"a": 1},\n {"a" 2}, {"a": 3}]', 1, "line 2, column 7: expecting ':'"),
        ('[{"a": 1},\n {"a": }, {"a": 3}]', 1, "line 2, column 8: expecting value"),
        ('[{"a": }, {"a": 2}, {"a": 3}]', 0, "line 1, column 8: expecting value"),
        ('[{"a": 1}, {"a": "b}, {"a": 3}]', 1, "line 1, column 25: expecting ','"),
        ('[{"a": 1}, {"a": "b"c", "d": 2}, {"a": 3}]', 1, "line 1, column 21: expecting ','"),
        ('[{"a": 1}, {"a": "\\x"}, {"a": 3}]', 1, "line 1, column 19: invalid \\escape"),
        ('[{"a": 1}, {"a": tru}, {"a": 3}]', 1, "line 1, column 18: expecting value"),
        ('[{"a": 1}}, {"a": 3}]', 1, "line 1, column 10: expected ','"),
        ('[{"a": 1} {"a": 2}]', 1, "line 1, column 11: expected ','"),
        ('[{"a": 1},, {"a": 3}]', 1, "line 1, column 11: expecting value"),
        ('[{"a": 1},]', 1, "line 1, column 11: expecting value"),
        ('[{"a": 1}, {"a": "x\0y"}, {"a": 3}]', 1, "line 1, column 20: a NUL byte"),
        ('[{"a": 1}, {"a": 2}', 2, "line 1, column 20: the file is cut short"),
        ('[{"a": 1}, {"a": 2', 1, "line 1, column 19: expecting ','"),
        ('[{"a": 1}]\n[{"a": 2}]', 1, "line 2, column 1: text follows the end of the list"),
        ('[{"a": 1}], {"a": 2}]', 1, "line 1, column 11: text follows the end of the list"),
        ('[{"a": 1}, {"a": 9' + "9" * 5000 + '}, {"a": 3}]', 1, "line 1, column 12: an integer has too many digits"),
        ('[{"a": 1}, ' + "[" * 20_000 + "]" * 20_000 + ', {"a": 3}]', 1, "line 1, column 12: nested too deeply"),
    ],
)
def test_text_that_is_no_json_ends_the_reading_with_line_column_and_the_rows_read(
    tmp_path: Path, text: str, rows: int, what: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "_CHUNK", chunk)
    error = refusal(written(tmp_path / "a.json", text))
    assert error.what.startswith(f"not valid JSON at {what}")
    assert error.what.endswith(f"(reading ended after {rows} row{'' if rows == 1 else 's'})")


def test_bytes_of_another_encoding_lose_their_row(tmp_path: Path) -> None:
    content = b'[{"a": "Gr\xfc\xdfe"}, {"a": "two"},\n{"\xe4": "x", "a": 3}, {"a": "\xc3\xbc"}]'
    rows = rows_of(written(tmp_path / "a.json", content))
    assert [row.value for row in rows] == [None, {"a": "two"}, None, {"a": "ü"}]
    reasons = [str(row.fault) for row in rows if row.fault]
    assert reasons[0].startswith("row 1, line 1, column 11: not UTF-8 text; if it is Windows-1252")
    assert reasons[1].startswith("row 3, line 2, column 3: not UTF-8 text; if it is Windows-1252")


def test_the_location_of_a_fault_is_right_far_into_the_file(tmp_path: Path) -> None:
    row = json.dumps({"text": "word " * 50})
    one_line = "[" + ", ".join([row] * 5000)
    error = refusal(written(tmp_path / "a.json", f"{one_line}, {{, {row}]"))
    assert f"line 1, column {len(one_line) + 4}: " in error.what
    assert "after 5,000 rows" in error.what
    lines = "[\n" + ",\n".join([row] * 5000)
    *rows, broken = rows_of(written(tmp_path / "b.json", lines.encode() + b',\n{"a": "\xe9"}]'))
    assert "row 5001, line 5002, column 8: not UTF-8" in str(broken.fault)
    assert len(rows) == 5000


ROWS = [{"q": "one?", "a": "1"}, {"q": "two?", "a": "2"}]
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("value", "rows", "key"),
    [
        ({"data": ROWS}, ROWS, "data"),
        ({"version": "1.0", "tags": ["x"], "rows": ROWS, "n": {"of": 2}}, ROWS, "rows"),
        ({"q": ["one?", "two?"], "a": ["1", "2"]}, ROWS, None),
        ({"q": {"0": "one?", "1": "two?"}, "a": {"0": "1", "1": "2"}}, ROWS, None),
        ({"id": [1, 2], "row": ROWS}, [{"id": 1, "row": ROWS[0]}, {"id": 2, "row": ROWS[1]}], None),
        ({"text": ["x", "y"]}, [{"text": "x"}, {"text": "y"}], None),
        ({"messages": [TURNS, TURNS]}, [{"messages": TURNS}] * 2, None),
    ],
)
def test_an_object_may_hold_rows_or_columns(
    tmp_path: Path, value: object, rows: list[object], key: str | None, indent: int | None
) -> None:
    listener = Listener()
    path = written(tmp_path / "a.json", json.dumps(value, indent=indent))
    assert [row.value for row in read_rows(Source(path=str(path)), listener)] == rows
    assert listener.messages == [f"{path}: the rows are those in {key!r}"] * (key is not None)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({}, "an object without rows"),
        ({"q": "one?", "a": "1"}, "an object without rows"),
        ({"messages": TURNS}, "an object without rows"),
        ({"conversations": SHAREGPT, "id": 1}, "an object without rows"),
        ({"x1": ROWS[0], "x2": ROWS[1]}, "an object without rows"),
        ({"q": {"0": "one?", "1": "two?"}, "a": {"0": "1"}}, "an object without rows"),
        ({"train": ROWS, "test": ROWS}, "several lists of rows: 'train', 'test'"),
        ({"q": ["one?", "two?"], "a": ["1"]}, "the columns differ in length: 'q' 2, 'a' 1"),
    ],
)
def test_an_object_without_rows_is_refused_with_the_forms_that_are_read(
    tmp_path: Path, value: object, what: str
) -> None:
    error = refusal(written(tmp_path / "a.json", json.dumps(value)))
    assert what in error.what
    assert '[{…}, {…}], or one object on each line, or {"data": [{…}, {…}]}' in str(error.hint)


def test_an_object_too_large_or_not_strict_json_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, what in (
        ('{"data": [{"a": NaN}]}', "NaN is not a JSON number"),
        ('{"data": [{"a": "\\ud800"}]}', "half a surrogate pair"),
        ('{"data": [{"a": 1}]', "expecting ',' delimiter"),
        ('{"data": [{"a": 1}]}, {}', "text follows the end of the object"),
    ):
        assert what in refusal(written(tmp_path / "a.json", text)).what
    monkeypatch.setattr(json_files, "MAX_OBJECT", 1000)
    error = refusal(written(tmp_path / "b.json", json.dumps({"data": ROWS * 100})))
    assert "one object of more than 1,000 characters" in error.what


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS, indent=2),
        json.dumps(ROWS),
        f"\n  {json.dumps(ROWS)}\n\n",
        f"[{json.dumps(ROWS[0])},\n{json.dumps(ROWS[1])}]\n",
    ],
)
def test_a_list_of_rows_in_a_jsonl_file_is_read_as_json_and_reported(tmp_path: Path, text: str) -> None:
    listener = Listener()
    path = written(tmp_path / "a.jsonl", text)
    assert [row.value for row in read_rows(Source(path=str(path)), listener)] == ROWS
    assert listener.messages == [f"{path}: read as .json, as it is a list and not a row on each line"]


@pytest.mark.parametrize(("turns", "column"), [(TURNS, "messages"), (SHAREGPT, "conversations")])
@pytest.mark.parametrize("count", [1, 2])
def test_a_row_that_is_a_list_of_chat_turns_is_a_conversation(
    tmp_path: Path, turns: list[object], column: str, count: int
) -> None:
    lines = "".join(json.dumps(turns) + "\n" for _ in range(count))
    assert values_of(written(tmp_path / "a.jsonl", lines)) == [{column: turns}] * count
    listed = json.dumps([turns] * count)
    assert values_of(written(tmp_path / "a.json", listed)) == [{column: turns}] * count
    assert values_of(written(tmp_path / "b.jsonl", listed)) == [{column: turns}] * count


def test_lists_on_the_lines_of_a_jsonl_file_are_faults_if_more_lines_follow(tmp_path: Path) -> None:
    first, second = rows_of(written(tmp_path / "a.jsonl", '[{"a": 1}]\n{"a": 2}\n'))
    assert (first.reason, second.value) == ("the row is a list, where an object is expected", {"a": 2})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (" \n ", "holds no rows"),
        ("[]", "holds no rows"),
        ("[ ]", "holds no rows"),
        ('{"data": []}', "holds no rows"),
        ("17", "holds no list"),
    ],
)
def test_an_unusable_json_file_is_refused(tmp_path: Path, content: str | bytes, says: str) -> None:
    assert says in refusal(written(tmp_path / "a.json", content)).what


def test_an_overlong_row_ends_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_ROW", 2**21)
    long = "x" * 2**23
    error = refusal(written(tmp_path / "a.json", f'[{{"a": 1}}, {{"a": "{long}"}}, {{"a": 3}}]'))
    assert "line 1, column 12: a row is longer than 2,097,152 characters" in error.what


def test_a_json_file_with_an_object_per_line_is_read_as_jsonl(tmp_path: Path) -> None:
    rows = rows_of(written(tmp_path / "a.json", '\ufeff{"a": 1}\n\n{"a": NaN}\n{"a": 3}'))
    assert [(row.index, row.value) for row in rows] == [(1, {"a": 1}), (3, None), (4, {"a": 3})]


def test_memory_does_not_depend_on_the_length_of_a_list(tmp_path: Path) -> None:
    row = json.dumps({"text": "word " * 400})
    path = written(tmp_path / "a.json", "[" + ",".join([row] * 10_000) + "]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(Source(path=str(path)))) == 10_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 20_000_000
    assert peak < 5_000_000


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n"), max_size=40), max_size=8))
def test_any_text_gives_a_value_or_a_fault_for_each_line_that_is_not_blank(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    lines = ['{"a": 1}', *lines]
    path = written(tmp_path_factory.getbasetemp() / "junk.jsonl", "".join(line + "\n" for line in lines))
    rows = rows_of(path)
    assert [row.index for row in rows] == [number for number, line in enumerate(lines, start=1) if line.strip()]
    for row in rows:
        assert (row.value is None) == (row.fault is not None) == (row.reason is not None)


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
        patch.setattr(json_files, "_CHUNK", chunk)
        assert values_of(listed) == rows


def test_lines_that_end_in_carriage_returns_alone_are_read(tmp_path: Path) -> None:
    rows = rows_of(written(tmp_path / "a.jsonl", '{"a": 1}\r{"a": 2}\r{broken\r'))
    assert [(row.index, row.value) for row in rows] == [(1, {"a": 1}), (2, {"a": 2}), (3, None)]
