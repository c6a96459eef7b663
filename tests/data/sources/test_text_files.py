from __future__ import annotations

from contextlib import suppress
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.data.sources import read_rows, text_files
from corral.data.sources.text_files import MAX_ROW
from corral.errors import DataError
from corral.recipe import Source
from tests.data.sources.conftest import refusal, rows_of, values_of, written

LATIN = 'not UTF-8 text; if it is Windows-1252, set `encoding = "cp1252"`'


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_line_in_another_encoding_or_with_a_nul_is_a_fault_that_names_line_column_and_byte(
    tmp_path: Path, name: str
) -> None:
    line = {"a.jsonl": b'{"t": "%s"}\n', "a.csv": b"%s\n"}[name]
    head = b"t\n" if name == "a.csv" else b""
    content = head + b"".join(line % word for word in (b"one", "Grüße".encode("latin1"), b"x\0y", b"two"))
    one, latin, nul, two = rows_of(written(tmp_path / name, b"\xef\xbb\xbf" + content))
    assert [list((row.value or {}).values()) for row in (one, two)] == [["one"], ["two"]]
    assert (latin.reason, nul.reason) == (LATIN, "a NUL byte, which no text holds")
    column = line.index(b"%s") + 1
    assert latin.fault == f"{latin.location}, column {column + 2} (byte 0xfc): {LATIN}"
    assert nul.fault == f"{nul.location}, column {column + 1}: {nul.reason}"


WORDS = "a Déjà vu – “naïve” €"


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-16-be", "UTF-8", "shift_jis"])
def test_a_stated_encoding_is_used(tmp_path: Path, encoding: str) -> None:
    words = "日本語" if encoding == "shift_jis" else WORDS
    contents = {
        "a.jsonl": f'{{"t": "{words}"}}\n',
        "a.json": f'[{{"t": "{words}"}}]',
        "a.csv": f"t\n{words}\n",
        "a.txt": words,
    }
    for name, content in contents.items():
        path = written(tmp_path / name, content.encode(encoding))
        (row,) = read_rows(Source(path=str(path), encoding=encoding))
        assert row.value == {"text" if name == "a.txt" else "t": words}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("stated", [None, "cp1252"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, encoding: str, stated: str | None) -> None:
    for name, content in (("a.jsonl", f'{{"t": "{WORDS}"}}\n'), ("a.csv", f"t\n{WORDS}\n"), ("b.csv", f"t\r{WORDS}\r")):
        path = written(tmp_path / name, content.encode(encoding))
        assert [row.value for row in read_rows(Source(path=str(path), encoding=stated))] == [{"t": WORDS}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_refused_with_the_setting_that_reads_it(
    tmp_path: Path, name: str, encoding: str
) -> None:
    error = refusal(written(tmp_path / name, '[{"a": 1}]'.encode(encoding)))
    assert "UTF-16" in error.what
    assert 'encoding = "utf-16-le"' in str(error.hint)
    with pytest.raises(DataError, match="UTF-16 without a byte order mark"):
        list(read_rows(Source(path=str(tmp_path / name), encoding="utf-16")))


@given(
    st.sampled_from(["shift_jis", "utf-7", "cp1252", "iso2022_jp", "utf-16-le", "unicode_escape"]),
    st.binary(min_size=1),
)
def test_any_bytes_in_any_encoding_give_rows_faults_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, encoding: str, content: bytes
) -> None:
    for name in ("any.jsonl", "any.csv", "any.txt"):
        path = written(tmp_path_factory.getbasetemp() / name, content)
        with suppress(DataError):
            list(read_rows(Source(path=str(path), encoding=encoding)))


def test_bytes_that_windows_1252_does_not_know_are_not_said_to_be_it(tmp_path: Path) -> None:
    lines = [b'{"t": "\xe9"}', b'{"t": "\x8d\xe9"}', b'{"t": "\xe9"}']
    rows = rows_of(written(tmp_path / "a.jsonl", b"\n".join([b"{}", *lines])))
    neither = "neither UTF-8 nor Windows-1252 text: set the `encoding` of the source"
    assert [row.reason for row in rows] == [None, LATIN, neither, neither]
    rows = list(read_rows(Source(path=str(tmp_path / "a.jsonl"), encoding="cp1252")))
    assert [row.value for row in rows] == [{}, {"t": "é"}, None, {"t": "é"}]
    assert rows[2].fault == "line 3, column 8 (byte 0x8d): not cp1252 text"


def test_half_a_character_of_utf_16_is_a_fault_of_its_row(tmp_path: Path) -> None:
    content = '{"a": 1}\n{"a": "x'.encode("utf-16") + b"\x00\xd8" + '"}\n{"a": 2}\n'.encode("utf-16-le")
    assert values_of(written(tmp_path / "a.jsonl", content)) == [{"a": 1}, None, {"a": 2}]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x1f\x8b\x08\x08", "damaged or cut short"),
        (b"\x28\xb5\x2f\xfd", "damaged or cut short"),
        (b"ARROW1\0\0", "an Arrow file"),
        (b"PK\x03\x04", "an Excel file or a zip archive"),
        (b"PAR1....PAR1", "a parquet file"),
        (b"\x7fELF\x01", "a program"),
    ],
)
def test_a_file_of_another_kind_than_its_name_is_recognised_by_its_first_bytes(
    tmp_path: Path, content: bytes, says: str
) -> None:
    assert says in refusal(written(tmp_path / "a.jsonl", content)).what


def test_a_txt_file_is_a_document(tmp_path: Path) -> None:
    text = "  one, two\r\n\n \nthree\x0b four\u2028five\n{}\n"
    (row,) = rows_of(written(tmp_path / "a.txt", f"\ufeff{text}"))
    assert (row.index, row.location, row.value) == (1, "line 1", {"text": text})
    written(tmp_path / "b.txt", "\n two")
    assert [(row.index, row.location) for row in rows_of(tmp_path)] == [(1, "a.txt, line 1"), (1, "b.txt, line 1")]
    assert "holds no rows" in refusal(written(tmp_path / "blank" / "c.txt", " \n\n")).what


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_long_document_is_cut_at_the_ends_of_lines(tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_DOCUMENT", 100)
    text = "\n".join(f"{i} " + "x" * (i % 37) for i in range(300)) + end
    rows = rows_of(written(tmp_path / "a.txt", text))
    parts = [row.value["text"] for row in rows if row.value]
    assert "".join(parts) == text
    assert all(part.endswith("\n") and 100 <= len(part) < 145 for part in parts[:-1])
    lines = text.split("\n")
    assert all(part.startswith(lines[row.index - 1]) for part, row in zip(parts, rows, strict=True))
    assert [row.location for row in rows] == [f"line {row.index}" for row in rows]
    assert [row.continues for row in rows] == [False] + [True] * (len(rows) - 1)


def test_a_bad_byte_or_nul_costs_the_part_of_the_document_that_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "MAX_DOCUMENT", 10)
    content = b"one one one\ntwo\ntwo \xff two\nthree three\n\0"
    one, two, three, four = rows_of(written(tmp_path / "a.txt", content))
    assert (one.value, three.value) == ({"text": "one one one\n"}, {"text": "three three\n"})
    assert two.fault == f"line 2, in line 3, column 5 (byte 0xff): {LATIN}"
    assert four.fault == "line 5, in line 5, column 1: a NUL byte, which no text holds"


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_an_overlong_line_is_a_fault_and_the_next_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "MAX_ROW", 1000)
    monkeypatch.setattr(text_files, "MAX_DOCUMENT", 1)
    content = b'{"a": "' + b"x" * 4_000_000 + b'"}\n{"a": 2}\n\xff\n'
    long, good, bad = rows_of(written(tmp_path / name, content))
    reason = f"the line is longer than {MAX_ROW:,} characters"
    assert (long.reason, long.fault) == (reason, f"line 1: {reason}")
    assert (good.value, good.index) == ({"text": '{"a": 2}\n'} if name == "a.txt" else {"a": 2}, 2)
    assert bad.reason == LATIN


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt"])
def test_a_git_lfs_pointer_is_recognised_in_any_file(tmp_path: Path, kind: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123456\n"
    for name in (f"one{kind}", f"{kind[1:]}/b{kind}"):
        path = written(tmp_path / name, pointer)
        if kind == ".txt":
            written(path.parent / "a.txt", "a document")
        error = refusal(path if "/" not in name else path.parent)
        assert "a Git LFS pointer" in error.what
        assert "git lfs pull" in str(error.hint)
        assert error.where == str(path)


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", b'[{"a": 1}' + b', {"a": 1}' * 100_000 + b", \xff]")
    assert [row.value for row in islice(read_rows(Source(path=str(path))), 3)] == [{"a": 1}] * 3


def test_windows_quotes_read_as_latin_1_are_a_fault_that_names_the_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "\x93quoted\x94"}\n')
    good, bad = read_rows(Source(path=str(tmp_path / "a.jsonl"), encoding="latin-1"))
    assert good.value == {"text": "caf\xe9"}
    assert 'set `encoding = "cp1252"`' in str(bad.reason)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_an_encoding_that_is_stated_of_utf_8_text_is_a_fault(tmp_path: Path, encoding: str) -> None:
    path = written(tmp_path / "a.jsonl", '{"a": "für"}\n{"a": "fur"}\n'.encode())
    first, second = read_rows(Source(path=str(path), encoding=encoding))
    assert first.fault == "line 1, column 9: the file is UTF-8 text: remove the `encoding` of the source"
    assert second.value == {"a": "fur"}
    path.write_bytes('{"a": "für"}\n'.encode(encoding))
    assert [row.value for row in read_rows(Source(path=str(path), encoding=encoding))] == [{"a": "für"}]
