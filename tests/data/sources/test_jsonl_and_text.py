from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.data.sources import read_rows
from corral.data.sources.files import MAX_ROW_BYTES
from corral.recipe import Source
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


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
def test_a_line_in_another_encoding_or_with_a_nul_is_a_fault_that_names_its_byte(tmp_path: Path, name: str) -> None:
    line = {"a.jsonl": b'{"t": "%s"}\n', "a.txt": b"%s\n", "a.csv": b"%s\n"}[name]
    head = b"t\n" if name == "a.csv" else b""
    start = len(head + line % b"one") + line.index(b"%s")
    content = head + b"".join(line % word for word in (b"one", "Grüße".encode("latin1"), b"x\0y", b"two"))
    one, latin, nul, two = rows_of(written(tmp_path / name, b"\xef\xbb\xbf" + content))
    assert [list((row.value or {}).values()) for row in (one, two)] == [["one"], ["two"]]
    assert latin.reason is not None
    assert latin.reason.startswith("not UTF-8 text; `iconv")
    assert f"byte {3 + start + 2} (0xfc)" in str(latin.fault)
    assert nul.reason == "a NUL byte, which no text holds"
    assert f"byte {3 + start + len(line % b'') + 5 + 1}" in str(nul.fault)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_refused_with_the_way_to_convert_it(tmp_path: Path, name: str, encoding: str) -> None:
    error = refusal(written(tmp_path / name, '[{"a": 1}]'.encode(encoding)))
    assert "UTF-16" in error.what
    assert "iconv" in str(error.hint)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x1f\x8b\x08\x08", "damaged or cut short"),
        (b"\x28\xb5\x2f\xfd", "damaged or cut short"),
        (b"ARROW1\0\0", "an Arrow file"),
        (b"PK\x03\x04", "a zip archive"),
        (b"PAR1....PAR1", "a parquet file"),
        (b"\x7fELF\x01", "a program"),
    ],
)
def test_a_file_of_another_kind_than_its_name_is_recognised_by_its_first_bytes(
    tmp_path: Path, content: bytes, says: str
) -> None:
    assert says in refusal(written(tmp_path / "a.jsonl", content)).what


def test_each_line_of_a_txt_file_is_a_document(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "  one, two\r\n\n \nthree\x0b four\u2028five\n{}")
    assert [(row.index, row.value) for row in rows_of(path)] == [
        (1, {"text": "  one, two"}),
        (4, {"text": "three\x0b four\u2028five"}),
        (5, {"text": "{}"}),
    ]


def test_an_overlong_line_is_a_fault_and_the_next_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": "')
        for _ in range(MAX_ROW_BYTES // 2**20 + 3):
            file.write(b"x" * 2**20)
        file.write(b'"}\n{"a": 2}\n\xff\n')
    long, good, bad = rows_of(path)
    assert (long.reason, long.fault) == ("the line is longer than 64 MiB", "line 1: the line is longer than 64 MiB")
    assert (good.value, good.index) == ({"a": 2}, 2)
    assert f"byte {path.stat().st_size - 2} (0xff)" in str(bad.fault)


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", b'[{"a": 1}' + b', {"a": 1}' * 100_000 + b", \xff]")
    assert [row.value for row in islice(read_rows(Source(path=str(path))), 3)] == [{"a": 1}] * 3


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
