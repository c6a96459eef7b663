from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.sources.conftest import refusal, rows_of, values_of, written


def test_cells_are_text_with_line_breaks_and_doubled_quotes(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", '\ufeffprompt, answer\r\n"Say ""hi"",\nplease",hi\r\n\r\n007,NaN\r\n')
    rows = rows_of(path)
    assert [row.value for row in rows] == [
        {"prompt": 'Say "hi",\nplease', "answer": "hi"},
        {"prompt": "007", "answer": "NaN"},
    ]
    assert [(row.index, row.place) for row in rows] == [(1, "row 1 (line 2)"), (2, "row 2 (line 5)")]


def test_the_ending_says_what_stands_between_cells(tmp_path: Path) -> None:
    assert values_of(written(tmp_path / "a.tsv", "a\tb\n1,5\t2\n")) == [{"a": "1,5", "b": "2"}]


def test_a_row_of_another_length_or_with_broken_quotes_is_a_fault_and_reading_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", 'a,b\n1,2\n1\n1,2,3\n"x"y,2\n3,4\n"open,5\n6,7\n')
    rows = rows_of(path)
    assert [row.value for row in rows] == [{"a": "1", "b": "2"}, None, None, None, {"a": "3", "b": "4"}, None]
    assert [row.fault for row in rows if row.fault] == [
        "row 2 (line 3): the row has fewer cells than the header, which has 2",
        "row 3 (line 4): the row has more cells than the header, which has 2",
        "row 4 (line 5): a quoted cell goes on behind its closing quote (a quote within it is written twice)",
        "row 6 (line 7): a quoted cell is not closed before the file's end: the rows behind it are lost in it",
    ]


def test_an_unnamed_column_is_called_by_its_number(tmp_path: Path) -> None:
    assert values_of(written(tmp_path / "a.csv", ",a\n0,x\n")) == [{"column 1": "0", "a": "x"}]


def test_a_cell_longer_than_pythons_own_limit_is_read(tmp_path: Path) -> None:
    long = "word " * 100_000
    assert values_of(written(tmp_path / "a.csv", f"a\n{long}\n")) == [{"a": long}]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a,b\n", "holds no rows"),
        ("\n\n", "holds no rows"),
        ("a,b,a\n1,2,3\n", "two columns are called 'a'"),
        ("a;b\n1;2\n", "the header holds semicolons, where a .csv file has commas"),
        ("a\tb\n1\t2\n", "the header holds tabs"),
        ('"a"b,c\n1,2\n', "the header cannot be read: a quoted cell goes on"),
        (b"a\xff,b\n1,2\n", "the header cannot be read: not UTF-8"),
    ],
)
def test_a_table_without_a_usable_header_or_rows_is_refused(tmp_path: Path, content: str | bytes, says: str) -> None:
    assert says in refusal(written(tmp_path / "a.csv", content)).what


# A lone empty cell is written as "" and a NUL is no text; a header's outer white space is not kept.
cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)


@settings(deadline=None)
@given(rows=st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=6), name=st.sampled_from(["a.csv", "a.tsv"]))
def test_what_pythons_writer_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]], name: str
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="," if name == "a.csv" else "\t", quoting=csv.QUOTE_ALL)
    writer.writerows([("x", "y", "z"), *rows])
    path = written(tmp_path_factory.getbasetemp() / name, text.getvalue())
    assert values_of(path) == [dict(zip("xyz", row, strict=True)) for row in rows]
