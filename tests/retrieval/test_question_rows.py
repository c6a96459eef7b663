"""Headings that are questions and marked pairs become rows; everything else is reported, never guessed."""

from __future__ import annotations

from typing import Any

from corral.errors import DataError
from corral.retrieval.collection import RefusedDocument
from corral.retrieval.documents import Document, DocumentBuilder
from corral.retrieval.question_rows import RowLedger, question_rows


def make(*parts: tuple[int, str] | str) -> Document:
    builder = DocumentBuilder()
    builder.title = "Rules"
    for part in parts:
        builder.add(part) if isinstance(part, str) else builder.heading(*part)
    return builder.build("a.md", "0" * 64)


def rows_of(*documents: Document | RefusedDocument) -> tuple[list[dict[str, Any]], RowLedger]:
    ledger = RowLedger()
    return list(question_rows(documents, ledger)), ledger


def test_a_heading_that_is_a_question_gives_a_row_with_its_chapter_and_passage() -> None:
    document = make((1, "Leave"), (2, "1.2. May I rest?"), "Yes.", (3, "Details"), "Ten days.", (2, "Contact"), "Ask.")
    (row,), ledger = rows_of(document)
    assert (row["question"], row["answer"], row["chapter"]) == ("May I rest?", "Yes.\n\nTen days.", "Leave")
    (passage,) = row["passages"]
    assert passage["headings"] == ["Leave"]
    assert passage["text"] == document.text[passage["start"] :][: len(passage["text"])] == row["answer"]
    assert dict(ledger.skipped) == {"its heading is no question": 1}
    assert ledger.rows == 1


def test_a_question_within_a_question_has_its_own_answer() -> None:
    rows, _ = rows_of(make((1, "Why?"), "Because.", (2, "How?!"), "So.", (1, "More"), "x"))
    assert [(row["question"], row["answer"]) for row in rows] == [("Why?", "Because."), ("How?!", "So.")]
    assert [row["chapter"] for row in rows] == ["Rules", "Why?"]


def test_pairs_that_are_marked_give_rows() -> None:
    rows, ledger = rows_of(
        make((1, "FAQ"), "Q: Tea?\nA: Yes.", "Green too.", "Question 2: Name\nit", "A: Corral.", "Q: Lost")
    )
    assert [(row["question"], row["answer"]) for row in rows] == [
        ("Tea?", "Yes.\n\nGreen too."),
        ("Name it", "Corral."),
    ]
    assert dict(ledger.skipped) == {"a question without an answer": 1}


def test_what_gives_no_row_is_counted_by_reason() -> None:
    refused = RefusedDocument("b.pdf", DataError("the PDF is encrypted"))
    twice = make((1, "Why?"), "Because.")
    rows, ledger = rows_of(twice, refused, make(), twice, make("No heading."))
    assert len(rows) == 1
    assert dict(ledger.skipped) == {
        "the document cannot be read: the PDF is encrypted": 1,
        "the document has no text": 1,
        "the same question again": 1,
        "it has no heading": 1,
    }
