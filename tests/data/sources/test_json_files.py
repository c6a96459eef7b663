from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.data.sources import json_files
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
    assert (rows[5].index, rows[5].location) == (6, "row 6")


CHAT = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(3)]
ONE, TWO, THREE = (json.dumps(row) for row in CHAT)


@pytest.mark.parametrize("chunk", [1, 7, 2**18])
@pytest.mark.parametrize(
    ("text", "good", "fault"),
    [
        ('[{"a": 1},\n {"a" 2}, {"a": 3}]', [1, 3], "row 2, line 2, column 7: not valid JSON: expecting ':'"),
        ('[{"a": 1},\n {"a": }, {"a": 3}]', [1, 3], "row 2, line 2, column 8: not valid JSON: expecting value"),
        ('[{"a": }, {"a": 2}, {"a": 3}]', [2, 3], "row 1, line 1, column 8: not valid JSON: expecting value"),
        ('[{"a": 1}, {"a": 2, {"a": 3}]', [1, 3], "row 2, line 1, column 21: not valid JSON"),
        ('[{"a": 1}, {"a": "b}, {"a": 3}, {"a": 4}]', [1, 3, 4], "row 2, line 1, column 25: not valid JSON"),
        ('[{"a": 1}, {"a": "b"c", "d": 2}, {"a": 3}]', [1, 3], "row 2, line 1, column 21: not valid JSON"),
        ('[{"a": 1}, {"a": "\\x"}, {"a": 3}]', [1, 3], "row 2, line 1, column 19: not valid JSON: invalid \\escape"),
        ('[{"a": 1}, {"a": tru}, {"a": 3}]', [1, 3], "row 2, line 1, column 18: not valid JSON"),
        ('[{"a": 1}, tru, {"a": 3}]', [1, 3], "row 2, line 1, column 12: not valid JSON"),
        ('[{"a": 1}, and {"a": 3}]', [1, 3], "row 2, line 1, column 12: not valid JSON"),
        ('[{"a": 1}}, {"a": 3}]', [1, 3], "row 2, line 1, column 10: not valid JSON"),
        ('[{"a": 1},, {"a": 3}]', [1, 3], "row 2, line 1, column 11: not valid JSON"),
        ('[{"a": 1}, {"a": "x\0y"}, {"a": 3}]', [1, 3], "row 2, line 1, column 20: a NUL byte"),
        ('[{"a": 1}, {"a": 2}', [1, 2], "row 3, line 1, column 20: the list is not closed: the file is cut short"),
        ('[{"a": 1}, {"a": 2', [1], "row 2, line 1, column 19: not valid JSON"),
        ('[{"a": 1}]\n[{"a": 2}]', [1, 2], "row 2, line 2, column 1: text follows the end of the list"),
        ('[{"a": 1}], {"a": 2}]', [1, 2], "row 2, line 1, column 11: text follows the end of the list"),
        ('[{"a": 1}] {"a": 2}]', [1, 2], "row 2, line 1, column 12: text follows the end of the list"),
        ('[{"a": 1}] the end', [1], "row 2, line 1, column 12: text follows the end of the list"),
        ('[{"a": 1}, {"a": 9' + "9" * 5000 + '}, {"a": 3}]', [1, 3], "row 2: an integer has too many digits"),
        ('[{"a": 1}, ' + "[" * 20_000 + "]" * 20_000 + ', {"a": 3}]', [1, 3], "row 2: nested too deeply"),
    ],
)
def test_a_broken_row_of_a_list_loses_only_itself_and_reports_line_and_column(
    tmp_path: Path, text: str, good: list[int], fault: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "_CHUNK", chunk)
    rows = rows_of(written(tmp_path / "a.json", text))
    assert [row.value["a"] for row in rows if row.value] == good
    (bad,) = [row.fault for row in rows if row.fault]
    assert bad.startswith(fault)
    assert [row.index for row in rows] == list(range(1, len(good) + 2))


@pytest.mark.parametrize("text", ['[{"a": 1} {"a": 2}]', '[{"a": 1}, {"a": 2},]', '[{"a": 1},\n\n{"a": 2}\n]\n'])
def test_a_comma_too_few_or_too_many_costs_no_row(tmp_path: Path, text: str) -> None:
    assert values_of(written(tmp_path / "a.json", text)) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"content": "q1"', '"content": '),
        ('"content": "q1"', '"content": "q"1"'),
        ('"content": "q1"', '"content": "q1'),
        ('"content": "q1"', '"content": "q1", "x": "a\nb"'),
        ('"role": "user", ', '"role: "user", '),
    ],
)
def test_a_message_within_a_broken_row_is_not_taken_for_a_row(
    tmp_path: Path, indent: int | None, old: str, new: str
) -> None:
    text = json.dumps(CHAT, indent=indent).replace('"user",\n', '"user", ')
    broken = text.replace(old, new, 2 if '"role"' in old else 1)
    if '"role"' in old and indent is not None:
        broken = text.replace('"content": "q1"', "content: q1")
    rows = rows_of(
        written(tmp_path / "a.json", broken if '"role"' not in old else broken.replace('"role: ', '"role": ', 1))
    )
    assert [row.value for row in rows] == [CHAT[0], None, CHAT[2]]


def test_many_broken_rows_on_one_line_are_counted_one_by_one(tmp_path: Path) -> None:
    texts = [f'{{"q": "say {i}", "a": "it is {i}"}}' for i in range(3000)]
    for i in range(5, 3000, 7):
        texts[i] = texts[i].replace('"a": "', '"a": "the "' if i % 2 else '"a": ')
    rows = rows_of(written(tmp_path / "a.json", f"[{', '.join(texts)}]"))
    assert len(rows) == 3000
    assert [row.index - 1 for row in rows if row.value is None] == list(range(5, 3000, 7))


def test_bytes_of_another_encoding_lose_their_row(tmp_path: Path) -> None:
    content = b'[{"a": "Gr\xfc\xdfe"}, {"a": "two"},\n{"\xe4": "x", "a": 3}, {"a": "\xc3\xbc"}, {"a": "\xc3'
    rows = rows_of(written(tmp_path / "a.json", content))
    assert [row.value for row in rows] == [None, {"a": "two"}, None, {"a": "ü"}, None]
    reasons = [str(row.fault) for row in rows if row.fault]
    assert reasons[0].startswith("row 1, line 1, column 11: not UTF-8 text; `iconv")
    assert reasons[1].startswith("row 3, line 2, column 3: not UTF-8 text; `iconv")


def test_the_location_of_a_fault_is_right_far_into_the_file(tmp_path: Path) -> None:
    row = json.dumps({"text": "word " * 50})
    one_line = "[" + ", ".join([row] * 5000)
    *rows, broken, last = rows_of(written(tmp_path / "a.json", f"{one_line}, {{, {row}]"))
    assert f"row 5001, line 1, column {len(one_line) + 4}: " in str(broken.fault)
    assert (len(rows), last.value) == (5000, json.loads(row))
    lines = "[\n" + ",\n".join([row] * 5000)
    *rows, broken = rows_of(written(tmp_path / "b.json", lines.encode() + b',\n{"a": "\xe9"}]'))
    assert "row 5001, line 5002, column 8: not UTF-8" in str(broken.fault)
    assert len(rows) == 5000


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (" \n ", "holds no rows"),
        ("[]", "holds no rows"),
        ("[ ]", "holds no rows"),
        ('{"data": []}', "holds an object, where a list"),
        ('{"data": [\n{"a": 1}]}', "holds an object, where a list"),
        ("17", "holds no list"),
    ],
)
def test_an_unusable_json_file_is_refused(tmp_path: Path, content: str | bytes, says: str) -> None:
    assert says in refusal(written(tmp_path / "a.json", content)).what


def test_an_overlong_row_loses_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_ROW_BYTES", 2**21)
    long = "x" * 2**23
    rows = rows_of(written(tmp_path / "a.json", f'[{{"a": 1}}, {{"a": "{long}"}}, {{"a": 3}}]'))
    assert [row.value for row in rows] == [{"a": 1}, None, {"a": 3}]
    assert "the row is longer than 2 MiB" in str(rows[1].fault)


def test_a_json_file_with_an_object_per_line_is_read_as_jsonl(tmp_path: Path) -> None:
    rows = rows_of(written(tmp_path / "a.json", '\ufeff{"a": 1}\n\n{"a": NaN}\n{"a": 3}'))
    assert [(row.index, row.value) for row in rows] == [(1, {"a": 1}), (3, None), (4, {"a": 3})]


def test_memory_does_not_depend_on_the_length_of_a_list(tmp_path: Path) -> None:
    row = json.dumps({"text": "word " * 400})
    path = written(tmp_path / "a.json", "[" + ",".join([row] * 10_000) + "]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in json_files.read_json(_file(path))) == 10_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 20_000_000
    assert peak < 5_000_000


def _file(path: Path) -> json_files.SourceFile:
    from corral.data.sources.local_files import make_local_file

    return make_local_file(path.name, path, ".json")


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
