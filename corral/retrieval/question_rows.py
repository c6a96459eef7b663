"""Question/answer rows from documents: headings that are questions, and pairs marked `Q:` and `A:`.

No guess becomes a row. A heading is a question if it ends with a question mark: many that begin with a question word are none
("How to report bugs", "What every user should know").
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from corral.retrieval.collection import RefusedDocument
from corral.retrieval.documents import Block, Document, one_line
from corral.retrieval.passages import Passage

EXAMPLES_PER_REASON = 5

_NUMBER = re.compile(r"(?:\d{1,4}(?:\.\d{1,4}){0,6}[.)]?|[A-Z]\.\d{1,4}\.?|Q\d{0,4}[:.)])\s+")
_QUESTION_END = re.compile(r"\?[!?\"'”’)\]]{0,4}$")
_ASKED = re.compile(r"(?:Q|Question)\s?\d{0,4}\s?[:.]\s", re.IGNORECASE)
_ANSWERED = re.compile(r"(?:A|Answer)\s?\d{0,4}\s?[:.]\s", re.IGNORECASE)
_ANSWER_LINE = re.compile(rf"\n\s{{0,8}}{_ANSWERED.pattern}", re.IGNORECASE)


@dataclass(slots=True)
class RowLedger:
    """What became of documents and sections.

    Args:
        documents: that were read.
        rows: that were made.
        skipped: how many documents or sections gave no row, by reason.
        examples: the first few of them.
    """

    documents: int = 0
    rows: int = 0
    skipped: Counter[str] = field(default_factory=Counter[str])
    examples: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def skip(self, reason: str, place: str) -> None:
        """Count a document or section without a row."""
        self.skipped[reason] += 1
        if len(examples := self.examples.setdefault(reason, [])) < EXAMPLES_PER_REASON:
            examples.append(place)


def question_rows(documents: Iterable[Document | RefusedDocument], ledger: RowLedger) -> Iterator[dict[str, Any]]:
    """`{"question", "answer", "document", "chapter", "passages"}` of each question, in order; each question once.

    `chapter` is the outermost heading above the question, or the document's title, to split rows by. `passages` are the parts
    that answer it, in the JSON form of Passage, whose headings are those above the question.
    """
    known: set[str] = set()
    for document in documents:
        if isinstance(document, RefusedDocument):
            ledger.skip(f"the document cannot be read: {document.error.what}", document.name)
            continue
        ledger.documents += 1
        if not document.blocks:
            ledger.skip("the document has no text", document.name)
        for question, above, blocks in _find_questions(document, ledger):
            if question.casefold() in known:
                ledger.skip("the same question again", f"{document.name}: {question}")
                continue
            known.add(question.casefold())
            ledger.rows += 1
            yield {
                "question": question,
                "answer": "\n\n".join(block.text for block in blocks),
                "document": document.name,
                "chapter": above[0] if above else document.title,
                "passages": [passage.to_json() for passage in _passages(document, above, blocks)],
            }


def _find_questions(document: Document, ledger: RowLedger) -> Iterator[tuple[str, tuple[str, ...], list[Block]]]:
    """(question, headings above it, blocks that answer it) of a document."""
    found: dict[tuple[tuple[str, ...], str, int], list[Block]] = {}
    asked: tuple[tuple[str, ...], str, int] | None = None
    skipped: set[tuple[str, ...]] = set()
    for block in document.blocks:
        if asked is not None and asked[0] != block.headings:
            asked = None
        if block.kind == "text" and (mark := _ASKED.match(block.text)):
            question, answer = block.text[mark.end() :], None
            if answer := _ANSWER_LINE.search(question):
                block = _tail(block, mark.end() + answer.end())
                question = question[: answer.start()]
            asked = (block.headings, one_line(question), block.start)
            found[asked] = [block] if answer else []
            continue
        if asked is not None:
            mark = None if found[asked] else _ANSWERED.match(block.text)
            if found[asked] or mark:
                found[asked].append(_tail(block, mark.end()) if mark else block)
                continue
            asked = None
        at = next((i for i in reversed(range(len(block.headings))) if _QUESTION_END.search(block.headings[i])), None)
        if at is not None:
            question = (
                _NUMBER.sub("", block.headings[at], count=1)
                if _NUMBER.match(block.headings[at])
                else block.headings[at]
            )
            found.setdefault((block.headings[:at], question, -1), []).append(block)
        elif block.headings not in skipped:
            skipped.add(block.headings)
            place = " › ".join((document.name, *block.headings[-1:]))
            ledger.skip("its heading is no question" if block.headings else "it has no heading", place)
    for (above, question, _), blocks in found.items():
        if blocks:
            yield question, above, blocks
        else:
            ledger.skip("a question without an answer", f"{document.name}: {question}")


def _tail(block: Block, begin: int) -> Block:
    return Block(block.text[begin:], block.headings, block.start + begin, block.kind, block.page)


def _passages(document: Document, above: tuple[str, ...], blocks: list[Block]) -> Iterator[Passage]:
    """The answer's blocks, those that follow each other in one passage."""
    begin = 0
    for at in range(1, len(blocks) + 1):
        if at < len(blocks) and blocks[at].start == blocks[at - 1].start + len(blocks[at - 1].text) + len("\n\n"):
            continue
        first, last = blocks[begin], blocks[at - 1]
        text = document.text[first.start : last.start + len(last.text)]
        yield Passage(document.name, document.title, above, text, first.start, first.page)
        begin = at
