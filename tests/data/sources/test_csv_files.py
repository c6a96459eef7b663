from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.data.sources import read_rows
from corral.errors import DataError
from corral.recipe import Source
from tests.data.conftest import Listener
from tests.data.sources.conftest import refusal, rows_of, values_of, written


def test_cells_are_text_with_line_breaks_and_doubled_quotes(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", '\ufeffprompt, answer\r\n"Say ""hi"",\nplease",hi\r\n\r\n007,NaN\r\n')
    rows = rows_of(path)
    assert [row.value for row in rows] == [
        {"prompt": 'Say "hi",\nplease', "answer": "hi"},
        {"prompt": "007", "answer": "NaN"},
    ]
    assert [(row.index, row.location) for row in rows] == [(2, "row 2 (lines 2 to 3)"), (4, "row 4 (line 5)")]


@pytest.mark.parametrize(
    ("name", "text", "mark"),
    [
        ("a.tsv", "a\tb\n1,5\t2\n", None),
        ("a.csv", "\ufeffa;b\n1,5;2\n", "semicolons"),
        ("a.csv", "a\tb\n1,5\t2\n", "tabs"),
        ("a.tsv", "a|b\n1,5|2\n", "bars"),
        ("a.csv", 'a,"b"\n"1,5",2\n', None),
        ("a.csv", '"a";b\n1,5;2\n', "semicolons"),
    ],
)
def test_the_header_tells_the_delimiter_whatever_the_extension(
    tmp_path: Path, name: str, text: str, mark: str | None
) -> None:
    listener = Listener()
    path = written(tmp_path / name, text)
    rows = list(read_rows(Source(path=str(path)), listener))
    assert [row.value for row in rows] == [{"a": "1,5", "b": "2"}]
    assert listener.messages == [f"{path}: read with {mark} between the cells, as in its header"] * bool(mark)


def test_a_mark_within_a_quoted_name_is_no_delimiter(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", 'a,"b;c",d"e\n1,2,3\n')
    assert values_of(path) == [{"a": "1", "b;c": "2", 'd"e': "3"}]
    path = written(tmp_path / "b.csv", '"a;\nb",c\n1,2\n')
    assert values_of(path) == [{"a;\nb": "1", "c": "2"}]


def test_a_header_that_two_delimiters_take_apart_is_refused_until_one_is_stated(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "question, in full;answer\nwhy?;so\n")
    error = refusal(path)
    assert error.what == "the header holds commas and semicolons: either may stand between names"
    assert "`delimiter`" in str(error.hint)
    rows = list(read_rows(Source(path=str(path), delimiter=";")))
    assert [row.value for row in rows] == [{"question, in full": "why?", "answer": "so"}]


def test_the_delimiter_of_the_recipe_comes_before_the_one_in_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "sep=;\na:b;c\n1:2;3\n")
    assert [row.value for row in read_rows(Source(path=str(path), delimiter=":"))] == [{"a": "1", "b;c": "2;3"}]


def test_a_header_that_stands_again_within_the_table_is_a_fault(tmp_path: Path) -> None:
    rows = rows_of(written(tmp_path / "a.csv", "a,b\n1,2\n\ufeffa,b\n3,4\n"))
    assert [row.value or row.reason for row in rows] == [{"a": "1", "b": "2"}, "the header again", {"a": "3", "b": "4"}]


def test_a_row_with_extra_or_missing_cells_is_a_fault_and_reading_continues(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", 'a,b\n1,2\n1\n1,2,3\n3,4\n"five\n5",6,\n"s""e",7\n')
    rows = rows_of(path)
    good = [row.value for row in rows if row.value]
    assert good == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}, {"a": 's"e', "b": "7"}]
    assert [row.fault for row in rows if row.fault] == [
        "row 3: the row has fewer cells than the header, which has 2",
        "row 4: the row has more cells than the header, which has 2",
        "row 6 (lines 6 to 7): the row has more cells than the header, which has 2",
    ]


ROWS = [f"what is {i} and {i}?,it is {2 * i}" for i in range(1000)]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({501: 'why?,"he said'}, "by the end of the file"),
        ({501: '"why?,he said'}, "by the end of the file"),
        (
            {501: 'why?,"he said', 690: '"who?",she said'},
            "as it should be: in line 690, a quoted cell goes on",
        ),
        (
            {501: 'why?,"he said "no" and'},
            "line 501: a quoted cell goes on behind its closing quote",
        ),
        ({501: 'q, "a', 502: 'q2, b"'}, "line 501: a quote stands behind a space"),
        # Its quotes are paired, and yet the lines behind it are the rest of a cell.
        ({501: '1,"a 5" disk and', 502: "two,more"}, "line 501: a quoted cell goes on behind its closing quote"),
        ({400: '"two\nlines",x', 501: '"a\nb","c'}, "by the end of the file"),
    ],
)
def test_nothing_behind_a_quote_that_stays_open_is_trusted(tmp_path: Path, changes: dict[int, str], what: str) -> None:
    lines = ["question,answer", *ROWS]
    for number, line in changes.items():
        lines[number - 1] = line
    text = "\n".join(lines) + "\n"
    error = refusal(written(tmp_path / "a.csv", text))
    opening = 503 if 400 in changes else 501
    start = "" if what.startswith("line") else f"a quote opens in line {opening} and is not closed "
    assert error.what.startswith(start + what)
    assert "; nothing behind it can be trusted (reading ended after 499 rows)" in error.what


def test_two_stray_quotes_cost_the_record_between_them_and_no_line_of_it_is_a_row(tmp_path: Path) -> None:
    lines = ["question,answer", *ROWS[:20]]
    lines[4], lines[15] = '"why?,he said', 'who?,she said"'
    faulty, *rows = rows_of(written(tmp_path / "a.csv", "\n".join(lines)))[3:]
    assert faulty.fault == "row 5 (lines 5 to 16): the row has fewer cells than the header, which has 2"
    assert [(row.index, row.location) for row in rows] == [(i, f"row {i} (line {i + 11})") for i in range(6, 11)]


PARAGRAPHS = """First, we read; then we think.

Dear Ada, dear Bob,
- one egg
- 1,5 dl of milk
- 0,5 kg of flour, sifted

    print("x", 1), f(a, b)
He said "no", and left.
So, it ends."""


@pytest.mark.parametrize("width", [1, 2, 3, 5])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_paragraphs_in_quotes_stay_one_cell(tmp_path: Path, width: int, end: str) -> None:
    table = [[f"{i}.{j} {PARAGRAPHS}" if j % 2 == 0 else f"x{i}" for j in range(width)] for i in range(30)]
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end).writerows([[f"c{j}" for j in range(width)], *table])
    rows = rows_of(written(tmp_path / "a.csv", text.getvalue()))
    assert [list((row.value or {}).values()) for row in rows] == table


def test_lines_within_a_quoted_cell_that_look_like_rows_are_its_text(tmp_path: Path) -> None:
    cell = "The table:\nwhy?,so\nhow?,thus\nwho?,he\n"
    path = written(tmp_path / "a.csv", f'question,answer\nshow it,"{cell}"\nc,d\n')
    assert values_of(path) == [{"question": "show it", "answer": cell}, {"question": "c", "answer": "d"}]


def test_a_bad_byte_in_a_record_of_several_lines_is_located_by_its_line(tmp_path: Path) -> None:
    content = b'a,b\n1,"two\nl\xefnes"\n3,4\n'
    bad, good = rows_of(written(tmp_path / "a.csv", content))
    assert str(bad.fault).startswith("row 2 (lines 2 to 3), in line 3, column 2 (byte 0xef): not UTF-8 text")
    assert (good.value, good.location) == ({"a": "3", "b": "4"}, "row 3 (line 4)")


def test_lines_that_end_in_carriage_returns_alone_or_twice_are_read(tmp_path: Path) -> None:
    expected = [{"a": "1", "b": "x\u2028y"}, {"a": "3", "b": "4"}]
    text = "a,b\n1,x\u2028y\n3,4\n"
    assert values_of(written(tmp_path / "a.csv", text.replace("\n", "\r"))) == expected
    assert values_of(written(tmp_path / "b.csv", text.replace("\n", "\r\r\n"))) == expected
    mixed = refusal(written(tmp_path / "c.csv", "a,b\n1,2\r3,4\n5,6\n"))
    assert mixed.what.startswith(
        "line 2: a carriage return stands alone between cells; nothing behind it can be trusted"
    )


@pytest.mark.parametrize("mark", [",", ";", "|", "\t"])
@pytest.mark.parametrize("line", ["sep=MARK\n", "SEP=MARK\r\n", '"sep=MARK"\n'])
def test_a_first_line_sep_sets_the_delimiter(tmp_path: Path, mark: str, line: str) -> None:
    text = line.replace("MARK", mark) + f"a{mark}b\n1{mark}2\n"
    assert values_of(written(tmp_path / "a.csv", f"\ufeff{text}")) == [{"a": "1", "b": "2"}]


def test_an_unnamed_column_is_named_by_its_number(tmp_path: Path) -> None:
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
        ('"a"b,c\n1,2\n', "line 1: a quoted cell goes on"),
        (b"a\xff,b\n1,2\n", "the header cannot be read: not UTF-8"),
    ],
)
def test_a_table_without_a_usable_header_or_rows_is_refused(tmp_path: Path, content: str | bytes, says: str) -> None:
    assert says in refusal(written(tmp_path / "a.csv", content)).what


def test_rows_of_delimiters_alone_are_blank_lines_as_spreadsheets_write_them(tmp_path: Path) -> None:
    rows = rows_of(written(tmp_path / "a.csv", "a;b\n1;2\n;\n;\n3;\n;;\n"))
    assert [(row.index, row.value) for row in rows] == [(2, {"a": "1", "b": "2"}), (5, {"a": "3", "b": ""})]
    assert [row.value for row in rows_of(written(tmp_path / "b.csv", 'a\n""\nx\n'))] == [{"a": ""}, {"a": "x"}]


# A lone empty cell is written as "" and a NUL is no text; a header's outer white space is not kept.
cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)


@settings(deadline=None)
@given(rows=st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=6), name=st.sampled_from(["a.csv", "a.tsv"]))
def test_tables_written_by_python_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]], name: str
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="," if name == "a.csv" else "\t", quoting=csv.QUOTE_ALL)
    writer.writerows([("x", "y", "z"), *rows])
    path = written(tmp_path_factory.getbasetemp() / name, text.getvalue())
    assert values_of(path) == [dict(zip("xyz", row, strict=True)) for row in rows]


@settings(deadline=None)
@given(st.text(st.sampled_from('ab,"\n\r \xe9'), max_size=40))
def test_every_row_of_any_table_is_a_record_of_pythons_strict_reader(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = written(tmp_path_factory.getbasetemp() / "any.csv", f"x,y\n{text}")
    expected: list[dict[str, str]] = []
    reader = csv.reader(io.StringIO(f"x,y\n{text}".replace("\r\r\n", "\r\n"), newline="\n"), strict=True)
    next(reader)
    try:
        for cells in reader:
            if len(cells) == 2 and any(cells):
                expected.append(dict(zip("xy", cells, strict=True)))
    except csv.Error:
        expected = []
    try:
        rows = [row.value for row in rows_of(path) if row.value]
    except DataError:
        return
    if expected:
        assert rows == expected
