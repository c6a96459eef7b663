from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.data.sources import RawRow
from tests.data.sources.conftest import refusal, rows_of, values_of, written


def test_cells_are_text_with_line_breaks_and_doubled_quotes(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", '\ufeffprompt, answer\r\n"Say ""hi"",\nplease",hi\r\n\r\n007,NaN\r\n')
    rows = rows_of(path)
    assert [row.value for row in rows] == [
        {"prompt": 'Say "hi",\nplease', "answer": "hi"},
        {"prompt": "007", "answer": "NaN"},
    ]
    assert [(row.index, row.location) for row in rows] == [(1, "row 1 (line 2)"), (2, "row 2 (line 5)")]


def test_the_extension_sets_the_delimiter(tmp_path: Path) -> None:
    assert values_of(written(tmp_path / "a.tsv", "a\tb\n1,5\t2\n")) == [{"a": "1,5", "b": "2"}]


def test_a_row_with_extra_cells_or_broken_quotes_is_a_fault_and_reading_continues(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", 'a,b\n1,2\n1\n1,2,3\n"x"y,2\n3,4\n"open,5\n6,7\n')
    rows = rows_of(path)
    good = [row.value for row in rows if row.value]
    assert good == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}, {"a": "6", "b": "7"}]
    assert [row.fault for row in rows if row.fault] == [
        "row 2 (line 3): the row has fewer cells than the header, which has 2",
        "row 3 (line 4): the row has more cells than the header, which has 2",
        "row 4 (line 5): a quoted cell goes on behind its closing quote (a quote within it is written twice)",
        "row 6 (line 7): a quote opens a cell, and is not closed",
    ]


ROWS = [f"what is {i} and {i}?,it is {2 * i}" for i in range(1000)]
BEHIND = "the lines behind it are read by themselves"


def spoilt(tmp_path: Path, changes: dict[int, str], name: str = "a.csv") -> list[RawRow]:
    """The rows of a table of which some lines, by their numbers from 2, are changed."""
    mark = "," if name == "a.csv" else "\t"
    lines = ["question,answer", *ROWS]
    for number, line in changes.items():
        lines[number - 1] = line
    return rows_of(written(tmp_path / name, "\n".join(lines).replace(",", mark) + "\n"))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({501: 'why?,"he said'}, "a quote opens a cell, and is not closed"),
        ({501: '"why?,he said'}, "a quote opens a cell, and is not closed"),
        (
            {501: '"why?,he said', 690: 'who?,she said"'},
            f"the row has fewer cells than the header, which has 2: perhaps a quote too many; {BEHIND}",
        ),
        (
            {501: 'why?,"he said', 690: 'who?,she said"'},
            f"a cell in quotes holds lines that look like rows: perhaps a quote is not closed; {BEHIND}",
        ),
        (
            {501: 'why?,"he said', 690: '"who?",she said'},
            f"a quote opens a cell, and is not closed as it should be; {BEHIND}",
        ),
    ],
)
def test_a_stray_quote_loses_one_row(tmp_path: Path, name: str, changes: dict[int, str], reason: str) -> None:
    rows = spoilt(tmp_path, changes, name)
    assert len(rows) == 1000
    assert [(row.index, row.reason) for row in rows if row.value is None] == [(500, reason)]
    assert [row.index for row in rows] == list(range(1, 1001))
    assert [row.location for row in rows] == [f"row {i} (line {i + 1})" for i in range(1, 1001)]
    assert max(len(str(row.value)) for row in rows) < 100


def test_stray_quotes_all_over_a_table_lose_only_their_rows(tmp_path: Path) -> None:
    wrong = {number: f'why {number}?,"he said' for number in range(50, 1000, 97)}
    rows = spoilt(tmp_path, wrong)
    assert len(rows) == 1000
    assert [row.index + 1 for row in rows if row.value is None] == list(wrong)


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


def test_the_lines_of_a_broken_cell_are_not_taken_for_rows(tmp_path: Path) -> None:
    broken = 'how?,"First, he said "no" and left.\nThen, he came\nagain, and stayed."'
    rows = rows_of(written(tmp_path / "a.csv", f"question,answer\na,b\n{broken}\nc,d\n"))
    assert [row.value for row in rows if row.value] == [{"question": q, "answer": a} for q, a in ("ab", "cd")]
    assert len(rows) == 5


def test_a_bad_byte_between_two_stray_quotes_hides_no_row(tmp_path: Path) -> None:
    lines = ["question,answer", *ROWS[:20]]
    lines[4], lines[15] = 'why?,"he said', 'who?,she said"'
    content = "\n".join(lines).encode().replace(b"what is 8 and", b"what is \xe9 and")
    rows = rows_of(written(tmp_path / "a.csv", content + b"\n"))
    assert [row.index for row in rows if row.value is None] == [4, 9]
    assert len(rows) == 20


def test_lines_that_end_in_carriage_returns_alone_or_twice_are_read(tmp_path: Path) -> None:
    expected = [{"a": "1", "b": "x\u2028y"}, {"a": "3", "b": "4"}]
    text = "a,b\n1,x\u2028y\n3,4\n"
    assert values_of(written(tmp_path / "a.csv", text.replace("\n", "\r"))) == expected
    assert values_of(written(tmp_path / "b.csv", text.replace("\n", "\r\r\n"))) == expected
    (mixed,) = [row for row in rows_of(written(tmp_path / "c.csv", "a,b\n1,2\r3,4\n5,6\n")) if row.fault]
    assert mixed.reason == "a carriage return stands alone between cells"


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
def test_tables_written_by_python_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]], name: str
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="," if name == "a.csv" else "\t", quoting=csv.QUOTE_ALL)
    writer.writerows([("x", "y", "z"), *rows])
    path = written(tmp_path_factory.getbasetemp() / name, text.getvalue())
    assert values_of(path) == [dict(zip("xyz", row, strict=True)) for row in rows]
