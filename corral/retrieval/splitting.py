"""Splits a document into passages along its structure.

A passage never crosses a heading, so that its heading path is true of all of it; a short section is a short passage. Within a
section passages end where a block ends once they have the lower number of tokens, else where a sentence or line ends, else
where a word ends. A table that fits is kept whole; a longer one is split by rows, and each part begins with the table's head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

from corral.retrieval.documents import Block, Document
from corral.retrieval.passages import Passage

MIN_LIMIT = 32
"""Tokens: of a lower limit a single character may have more."""

CountTokens: TypeAlias = Callable[[str], int]

_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]{0,3}\s+|[。！？]|\n(?=\s{0,16}(?:[-*•]|\d{1,4}[.)])\s)")
_LINE_END = re.compile(r"\n")
_CHARACTERS_PER_TOKEN = 8
"""Text without a sentence's end is first cut into windows of this many characters for each token of the limit."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is not cut: a sentence, line or table row, or a part of one that is longer than a passage may be."""

    start: int
    end: int
    tokens: int
    ends_block: bool
    page: int | None


def split_document(
    document: Document, count_tokens: CountTokens, *, tokens: tuple[int, int] = (256, 512), overlap: int = 0
) -> Iterator[Passage]:
    """The passages of a document, in order. Their texts cover all of its text; the time is linear in its length.

    Args:
        document: to split.
        count_tokens: how many tokens a text has.
        tokens: a passage has at most the higher number, and ends with a block from the lower one on.
        overlap: at most so many tokens of a passage's end are repeated by the next one of the same section; 0 for none.

    Raises ValueError if the numbers contradict each other.
    """
    low, high = tokens
    if not (0 < low <= high and high >= MIN_LIMIT and 0 <= overlap <= high // 2):
        raise ValueError(f"passages of {low} to {high} tokens with an overlap of {overlap} cannot be made")
    for headings, section in groupby(document.blocks, key=lambda block: block.headings):
        run: list[_Piece] = []
        for block in section:
            if block.kind == "table" and count_tokens(block.text) > high:
                yield from _pack(document, headings, run, count_tokens, tokens, overlap)
                run = []
                yield from _split_table(document, block, count_tokens, high)
            else:
                run += _pieces(block, block.start, block.text, count_tokens, high)
        yield from _pack(document, headings, run, count_tokens, tokens, overlap)


def _pieces(block: Block, start: int, text: str, count_tokens: CountTokens, limit: int) -> list[_Piece]:
    """The pieces of a block's text, which begins at `start` in the document."""
    if block.kind == "table" and (tokens := count_tokens(text)) <= limit:
        return [_Piece(start, start + len(text), tokens, True, block.page)]
    boundary = _SENTENCE_END if block.kind == "text" else _LINE_END
    ends = [match.end() for match in boundary.finditer(text)]
    if not ends or ends[-1] < len(text):
        ends.append(len(text))
    pieces: list[_Piece] = []
    begin = 0
    for end in ends:
        for first, last in _cut(text, begin, end, count_tokens, limit):
            is_last = last == len(text)
            pieces.append(_Piece(start + first, start + last, count_tokens(text[first:last]), is_last, block.page))
        begin = end
    return pieces


def _cut(text: str, begin: int, end: int, count_tokens: CountTokens, limit: int) -> Iterator[tuple[int, int]]:
    """Cuts a sentence into parts within the limit, at white space where there is some. Of windows, so that it is linear."""
    stack: list[tuple[int, int]] = []
    window = limit * _CHARACTERS_PER_TOKEN
    while end - begin > window:
        cut = _last_space(text, begin, begin + window)
        stack.append((begin, cut))
        begin = cut
    stack.append((begin, end))
    stack.reverse()
    while stack:
        begin, end = stack.pop()
        if end - begin <= 1 or count_tokens(text[begin:end]) <= limit:
            yield begin, end
        else:
            middle = _last_space(text, begin, (begin + end) // 2)
            stack += [(middle, end), (begin, middle)]


def _last_space(text: str, begin: int, end: int) -> int:
    """Behind the last white space in the second half of a span; its end if there is none."""
    for at in range(end, begin + (end - begin) // 2, -1):
        if text[at - 1].isspace():
            return at
    return end


def _pack(
    document: Document,
    headings: tuple[str, ...],
    pieces: Sequence[_Piece],
    count_tokens: CountTokens,
    tokens: tuple[int, int],
    overlap: int,
) -> Iterator[Passage]:
    """Passages of consecutive pieces of one section."""
    begin = 0
    while begin < len(pieces):
        end = _find_end(pieces, begin, *tokens)
        # Tokens of pieces do not always add up to those of their text.
        while end > begin + 1 and count_tokens(_text(document, pieces[begin:end])) > tokens[1]:
            end -= 1
        text = _text(document, pieces[begin:end])
        first = pieces[begin]
        yield Passage(document.name, document.title, headings, text, first.start, first.page)
        if end == len(pieces):
            return
        begin = _repeat_from(pieces, begin, end, overlap, tokens[1])


def _find_end(pieces: Sequence[_Piece], begin: int, low: int, high: int) -> int:
    """The index behind the last piece of the passage that begins with this one."""
    total = 0
    block_end = None
    for at in range(begin, len(pieces)):
        total += pieces[at].tokens
        if total > high:
            return block_end or max(at, begin + 1)
        if pieces[at].ends_block and total >= low:
            block_end = at + 1
    return len(pieces)


def _repeat_from(pieces: Sequence[_Piece], begin: int, end: int, overlap: int, high: int) -> int:
    """Where the next passage begins: some pieces before `end`, so that it still has room for the piece at `end`."""
    room = min(overlap, high - pieces[end].tokens)
    start = end
    while start - 1 > begin and pieces[start - 1].tokens <= room:
        start -= 1
        room -= pieces[start].tokens
    return start


def _text(document: Document, pieces: Sequence[_Piece]) -> str:
    return document.text[pieces[0].start : pieces[-1].end].rstrip()


def _split_table(document: Document, block: Block, count_tokens: CountTokens, limit: int) -> Iterator[Passage]:
    """Passages of a table's rows, each with its head, unless the head takes more than half of a passage."""
    lines = block.text.split("\n")
    head = "\n".join(lines[:2]) + "\n"
    used = count_tokens(head)
    if used > limit // 2:
        head, used = "", 0
    body = block.text[len(head) :]
    rows = _pieces(block, block.start + len(head), body, count_tokens, limit - used)
    begin = 0
    while begin < len(rows):
        end = _find_end(rows, begin, limit, limit - used)
        while end > begin + 1 and count_tokens(head + _text(document, rows[begin:end])) > limit:
            end -= 1
        text = head + _text(document, rows[begin:end])
        yield Passage(document.name, document.title, block.headings, text, rows[begin].start, block.page)
        begin = end
