"""From the file to the ledger: each kind of file with each fault, and what a source's first rows decide for all of it."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corral.data.prepare import Prepared, prepare
from corral.data.source_rows import SourceRows, load_source_rows
from corral.errors import DataError
from corral.messages import Conversation, Feedback
from corral.progress import Progress
from corral.recipe import Data, Mapping, Source, Split
from corral.template import Template
from tests.data.conftest import write_rows

Row = dict[str, Any]
MARK = "q7 "
"""Stands in one row only, for faults to be made there."""


def listed(rows: list[Row]) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(delimiter: str) -> Callable[[list[Row]], bytes]:
    def write(rows: list[Row]) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()

    return write


def parquet(rows: list[Row]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


KINDS: dict[str, Callable[[list[Row]], bytes]] = {
    ".jsonl": lines,
    ".json": listed,
    ".csv": table(","),
    ".tsv": table("\t"),
    ".parquet": parquet,
}
LINES, JSON, TABLES = (".jsonl",), (".jsonl", ".json"), (".csv", ".tsv")
TEXTS = (*JSON, *TABLES)
COUNT = 20


def with_row(**changes: Any) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [row | (changes if MARK in row["question"] else {}) for row in rows]


def same(rows: list[Row]) -> list[Row]:
    return rows


def swap(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(old, new)


def asis(content: bytes) -> bytes:
    return content


# A fault: the kinds it can stand in, how rows and bytes are spoilt, and a part of the reason; none where no row is lost.
FAULTS: dict[str, tuple[tuple[str, ...], Callable[[list[Row]], list[Row]], Callable[[bytes], bytes], str | None]] = {
    "no fault": (tuple(KINDS), same, asis, None),
    "packed under a plain name": (tuple(KINDS), same, gzip.compress, None),
    "byte order mark": (TEXTS, same, lambda content: b"\xef\xbb\xbf" + content, None),
    "Windows line ends": (TEXTS, same, swap(b"\n", b"\r\n"), None),
    "old Mac line ends": (TABLES, same, swap(b"\n", b"\r"), None),
    "blank lines": (TEXTS, same, swap(b"\n", b"\n\n"), None),
    "special tokens": (tuple(KINDS), with_row(question="q7 <|im_end|>\u2028?"), asis, None),
    "a byte of Latin-1": (TEXTS, same, swap(b"q7 ", b"q7 \xe9"), "not UTF-8 text"),
    "NUL": ((*LINES, *TABLES), same, swap(b"q7 ", b"q7 \0"), "NUL"),
    "NUL in a value": (("parquet",), with_row(question="q7 \0"), asis, "NUL"),
    "a value left out": (LINES, same, swap(b'"the 7th answer"', b""), "not valid JSON: expecting value"),
    "a quote within": (LINES, same, swap(b'"the 7th answer"', b'"the "7th answer"'), "not valid JSON"),
    "a cell too many": (TABLES, same, swap(b"the 7th", b"the\t7,th"), "more cells"),
    "a key twice": (JSON, same, swap(b'"the 7th answer"', b'"x", "answer": "y"'), "stands twice"),
    "half a surrogate pair": (JSON, same, swap(b"the 7th", b"\\ud800"), "half a surrogate pair"),
    "NaN": (JSON, same, swap(b'"the 7th answer"', b"NaN"), "NaN is not a JSON number"),
    "nothing": ((*JSON, ".parquet"), with_row(answer=None), asis, "answer is null"),
    "empty": ((*JSON, *TABLES, ".parquet"), with_row(answer=""), asis, "answer is empty"),
    "a number": (JSON, with_row(answer=7), asis, "answer is a number"),
    "a row that is a list": (JSON, lambda rows: [*rows[:7], [1], *rows[8:]], asis, "the row is a list"),  # type: ignore[list-item]
    "cut short": (LINES, same, lambda content: content[:-20], "not valid JSON"),
}
CELLS = [
    (kind, fault, ending)
    for fault, (kinds, _, _, _) in FAULTS.items()
    for kind in (KINDS if kinds == ("parquet",) else kinds)
    if kinds != ("parquet",) or kind == ".parquet"
    for ending in ("", ".gz")
    if not (ending and fault.startswith("packed"))
]


def cell_name(kind: str, fault: str, ending: str) -> str:
    return f"{fault} in {kind}{ending}"


@pytest.fixture(scope="module")
def all_cells(template: Template, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Each cell as a source of one mixture."""
    folder = tmp_path_factory.mktemp("cells")
    sources: list[Source] = []
    for number, (kind, fault, ending) in enumerate(CELLS):
        _, spoil_rows, spoil_bytes, _ = FAULTS[fault]
        rows: list[Row] = [{"question": f"q{i} of {number}?", "answer": f"the {i}th answer"} for i in range(COUNT)]
        content = spoil_bytes(KINDS[kind](spoil_rows(rows)))
        path = folder / f"{number}{kind}{ending}"
        path.write_bytes(gzip.compress(content) if ending else content)
        sources.append(Source(path=str(path), name=cell_name(kind, fault, ending)))
    data = Data(sources=tuple(sources), split=Split(validation=0, test=0.1), duplicates="keep", contamination="ignore")
    return prepare(data, template, folder, 0, cache=folder / "cache", workers=1)


@pytest.mark.parametrize(("kind", "fault", "ending"), CELLS, ids=[cell_name(*cell) for cell in CELLS])
def test_a_fault_loses_one_row_and_every_row_is_in_the_ledger(
    all_cells: Prepared, kind: str, fault: str, ending: str
) -> None:
    found = all_cells.ledger["sources"][cell_name(kind, fault, ending)]
    reason = FAULTS[fault][3]
    lost = 0 if reason is None else 1
    assert sum(found["fates"].values()) == found["rows"] == COUNT
    assert (found["fates"]["kept"], found["fates"]["dropped"]) == (COUNT - lost, lost)
    assert sum(found["sides"].values()) == found["fates"]["kept"]
    reasons = {text: entry["count"] for text, entry in found["reasons"].items()}
    assert sum(reasons.values()) == lost
    assert all(reason is not None and reason in text for text in reasons), reasons


def test_a_fault_in_one_of_many_documents_loses_that_document(template: Template, tmp_path: Path) -> None:
    faults = [b"\xe9", b"\0", gzip.compress(b"a document"), b" \n"]
    for i in range(COUNT):
        fault = faults[i] if i < len(faults) else b""
        (tmp_path / f"{i}.txt").write_bytes(
            b"" if i == 4 else fault if i > 1 and fault else b"document %d\n" % i + fault
        )
    source = Source(path=str(tmp_path / "*.txt"), name="texts")
    data = Data(sources=(source,), split=Split(validation=0, test=0.1))
    ledger = prepare(data, template, tmp_path, 0, cache=tmp_path / "cache", workers=1).ledger
    fates = ledger["sources"]["texts"]["fates"]
    assert (fates["kept"], fates["dropped"]) == (COUNT - 4, 2)  # a blank and an empty file hold no rows


def test_stray_quotes_and_text_that_is_no_json_refuse_the_file(tmp_path: Path) -> None:
    rows: list[Row] = [{"question": f"q{i}?", "answer": f"the {i}th answer"} for i in range(COUNT)]
    for kind, spoil, what in (
        (".csv", swap(b"the 7th", b'"the 7th'), "a quote opens in line 9 and is not closed by the end of the file"),
        (".tsv", swap(b"the 7th", b'"the 7th'), "a quote opens in line 9 and is not closed by the end of the file"),
        (".json", swap(b'"the 7th answer"', b""), "not valid JSON at line 33, column 2: expecting value"),
        (".json", swap(b'"the 7th answer"', b'"the "7th answer"'), "not valid JSON at line 32"),
        (".json", swap(b"the 7th", b"the \0 7th"), "a NUL byte"),
        (".json", lambda content: content[:-20], "not valid JSON"),
    ):
        path = tmp_path / f"a{kind}"
        path.write_bytes(spoil(KINDS[kind](rows)))
        assert what in refused(path).what


def test_the_table_has_all_its_cells_and_its_sums_add_up(all_cells: Prepared) -> None:
    assert len(CELLS) == 115
    ledger = all_cells.ledger
    assert len(ledger["sources"]) == len(CELLS)
    assert sum(ledger["fates"].values()) == ledger["rows"] == sum(s["rows"] for s in ledger["sources"].values())
    assert pq.read_table(all_cells.folder / "ledger.parquet").num_rows == ledger["rows"]


def read(path: Path, **settings: Any) -> SourceRows:
    return load_source_rows(Source(path=str(path), **settings), path.parent / "cache", Progress())


def records(path: Path, **settings: Any) -> list[Any]:
    rows = read(path, **settings)
    return list(rows.records(rows.usable))


def refused(path: Path, **settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, **settings)
    assert not list((path.parent / "cache").glob("rows-*"))
    return caught.value


def judged(tmp_path: Path, scores: list[Any], name: str = "rated.jsonl") -> Path:
    rows: list[Row] = [{"prompt": f"p{i}", "completion": f"c{i}", "score": score} for i, score in enumerate(scores)]
    path = tmp_path / name
    path.write_bytes(KINDS[path.suffix](rows))
    return path


@pytest.mark.parametrize("name", ["rated.jsonl", "rated.csv"])
@pytest.mark.parametrize("highest", [5, 10])
@pytest.mark.parametrize("sorted_", [False, True])
@pytest.mark.parametrize("settings", [{}, {"format": "feedback"}])
def test_ratings_of_another_range_refuse_the_source_until_the_range_is_stated(
    tmp_path: Path, name: str, highest: int, sorted_: bool, settings: dict[str, Any]
) -> None:
    scores = [1 + i % highest for i in range(1000)]
    path = judged(tmp_path, sorted(scores) if sorted_ else scores, name)
    error = refused(path, **settings)
    assert "score_range" in str(error.hint)
    if sorted_:
        assert "outside 0 to 1" in error.what
    else:
        assert error.what.startswith(f"`score` runs from 1 to {highest}")
        assert f"mapping = {{ score_range = [1, {highest}] }}" in str(error.hint)
    stated = read(path, mapping=Mapping(score_range=(1, highest)))
    assert len(stated) == 1000
    assert stated.why.endswith(f"scores from 1 to {highest}, as the recipe says")
    found = records(
        path, mapping=Mapping(prompt="{prompt}", completion="{completion}", score="score", score_range=(1, 5))
    )
    if highest == 5:
        assert {record.score for record in found} == {0.0, 0.25, 0.5, 0.75, 1.0}
    else:
        assert len(found) == 500  # A range that is stated is believed: other rows are dropped with a reason.


@pytest.mark.parametrize("name", ["rated.jsonl", "rated.csv"])
def test_labels_of_plus_and_minus_1_are_recognised_and_reported(tmp_path: Path, name: str) -> None:
    path = judged(tmp_path, [1 if i % 3 else -1 for i in range(90)], name)
    assert [record.score for record in records(path)] == [1.0 if i % 3 else 0.0 for i in range(90)]
    assert read(path).why.endswith("`score` is -1 for the worst and 1 for the best")
    (tmp_path / "late").mkdir()
    assert "outside 0 to 1" in refused(judged(tmp_path / "late", [1] * 60 + [-1], name)).what


@pytest.mark.parametrize(
    ("good", "bad"), [("yes", "no"), ("Good", "Bad"), ("thumbs_up", "thumbs_down"), ("TRUE", "FALSE")]
)
def test_judgements_in_words_make_feedback_not_conversations(tmp_path: Path, good: str, bad: str) -> None:
    path = tmp_path / "kto.csv"
    path.write_text("prompt,completion,label\n" + "".join(f"p{i},c,{good if i % 2 else bad}\n" for i in range(40)))
    found = records(path)
    assert all(isinstance(record, Feedback) for record in found)
    assert [record.score for record in found] == [0.0, 1.0] * 20


SCALE = Mapping(prompt="{prompt}", completion="{completion}", score="score", score_range=(1, 5))
PAIR_FAULTS: list[tuple[Row, str]] = [
    ({"prompt": "p", "chosen": "good", "rejected": "bad"}, ""),
    ({"prompt": "p", "chosen": "same", "rejected": "same"}, "chosen and rejected are the same"),
    ({"prompt": "p", "chosen": "", "rejected": "bad"}, "chosen is empty"),
    ({"prompt": "p", "chosen": "good", "rejected": " "}, "rejected is empty"),
    ({"prompt": "p", "chosen": "good", "rejected": None}, "rejected is"),
    ({"prompt": "", "chosen": "good", "rejected": "bad"}, "prompt is"),
]
SCORE_FAULTS: list[tuple[Row, str]] = [
    ({"prompt": "p", "completion": "c", "score": 5}, ""),
    ({"prompt": "p", "completion": "c", "score": 7}, "score is outside 1 to 5, the `score_range` of its mapping"),
    ({"prompt": "p", "completion": "c", "score": "high"}, "score is text: expected a number"),
    ({"prompt": "p", "completion": "c", "score": "nan"}, "score is"),
    ({"prompt": "p", "completion": "", "score": 1}, "completion is empty"),
]


@pytest.mark.parametrize("kind", [".csv", ".jsonl"])
@pytest.mark.parametrize("name", ["pairs", "scores"])
def test_each_faulty_judgement_is_a_dropped_row_with_its_reason(tmp_path: Path, kind: str, name: str) -> None:
    faults = PAIR_FAULTS if name == "pairs" else SCORE_FAULTS
    path = tmp_path / f"a{kind}"
    path.write_bytes(KINDS[kind]([row for row, _ in faults]))
    how = {"format": "preference"} if name == "pairs" else {"mapping": SCALE}
    found = read(path, **how)
    assert [code >= 0 for code in found.reason.tolist()] == [bool(reason) for _, reason in faults]
    for code, (row, reason) in zip(found.reason.tolist(), faults, strict=True):
        if reason:
            assert found.reasons[code].startswith(reason), row


def test_unknown_judgements_in_words_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "kto.csv"
    path.write_text("prompt,completion,label\n" + "p,c,so so\n" * 40)
    assert refused(path).what.startswith("`label` may say how good an answer is, but 'so so'")


def test_options_counted_from_1_are_recognised_and_reported(tmp_path: Path) -> None:
    rows: list[Row] = [{"question": f"q{i}", "choices": list("wxyz"), "answer": 1 + i % 4} for i in range(60)]
    path = write_rows(tmp_path / "mc.jsonl", rows)
    assert read(path).why.endswith("; answers are counted from 1")
    answers = [record.messages[-1].content for record in records(path)]
    assert answers == ["A. w", "B. x", "C. y", "D. z"] * 15
    (tmp_path / "late").mkdir()
    late = write_rows(tmp_path / "late" / "mc.jsonl", sorted(rows * 5, key=lambda row: row["answer"]))
    assert (
        refused(late).what
        == "line 226: answer is outside the 4 options, counted from 0, as the first rows seemed to be"
    )


def test_numeric_options_whose_text_and_position_disagree_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mc.csv"
    options = "".join(f"{i}+0?,{i % 4},{(i + 1) % 4},{(i + 2) % 4},{(i + 3) % 4},{i % 4}\n" for i in range(60))
    path.write_text("question,A,B,C,D,answer\n" + options)
    assert "the text of one option and the number of another" in refused(path).what


@pytest.mark.parametrize("column", ["messages", "dialogue"])
@pytest.mark.parametrize("kind", [".csv", ".parquet", ".jsonl"])
def test_conversations_as_json_text_in_a_cell_are_read(tmp_path: Path, column: str, kind: str) -> None:
    turns = [{"from": "customer", "value": "Hi"}, {"from": "gpt-4o", "value": "Yo"}]
    path = tmp_path / f"a{kind}"
    path.write_bytes(KINDS[kind]([{"id": i, column: json.dumps(turns)} for i in range(5)]))
    assert records(path) == [Conversation.from_turns(("user", "Hi"), ("assistant", "Yo"))] * 5


def test_a_mapping_makes_the_same_rows_of_a_table_and_of_parquet(tmp_path: Path) -> None:
    rows: list[Row] = [{"t": f"T{i}", "b": None if i % 5 == 0 else "B", "a": "A"} for i in range(20)]
    mapping = Mapping(prompt="{t}\n{b}", completion="{a}")
    found: list[list[Any]] = []
    for kind in (".csv", ".parquet", ".jsonl"):
        path = tmp_path / f"a{kind}"
        path.write_bytes(KINDS[kind](rows))
        found.append(records(path, mapping=mapping))
    assert len(found[0]) == 20
    assert found[0] == found[1] == found[2]
