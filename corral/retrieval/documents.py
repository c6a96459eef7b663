"""Documents as they are read from files: blocks of text in reading order, each under its headings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["text", "table", "code"]


@dataclass(frozen=True, slots=True)
class Block:
    """A paragraph, list, code block or table.

    Args:
        text: plain text; of a table, its rows as Markdown.
        headings: above it, the outermost first; without the document's title.
        start: where the text begins, in characters of `Document.text`.
        page: from 1, for documents that have pages.
    """

    text: str
    headings: tuple[str, ...]
    start: int
    kind: Kind = "text"
    page: int | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A document.

    Args:
        name: its path relative to the collection, or its address; no two of a collection have the same.
        title: as its file says, else its name.
        text: all blocks, with blank lines between them.
        digest: sha256 of the file's content.
    """

    name: str
    title: str
    text: str
    blocks: tuple[Block, ...]
    digest: str


class DocumentBuilder:
    """Collects the blocks of a document in reading order, and knows the headings above the next one."""

    def __init__(self) -> None:
        self.title = ""
        self._headings: list[tuple[int, str]] = []
        self._blocks: list[tuple[str, tuple[str, ...], Kind, int | None]] = []
        self._first_heading: str | None = None

    def heading(self, level: int, text: str) -> None:
        """A heading; it ends the sections of its own level and of those below."""
        self.end_sections(level)
        if text := one_line(text):
            self._headings.append((level, text))
            if level == 1 and self._first_heading is None and not self._blocks:
                self._first_heading = text

    def end_sections(self, level: int) -> None:
        """End the sections of this level and of those below it."""
        while self._headings and self._headings[-1][0] >= level:
            self._headings.pop()

    def add(self, text: str, kind: Kind = "text", page: int | None = None) -> None:
        """A block; without text it is left out."""
        # Text in UTF-8 has no surrogates, and no text holds NUL; a hostile file may.
        text = text.replace("\0", "").encode("utf-8", "replace").decode().strip("\n").rstrip()
        if text.strip():
            self._blocks.append((text, tuple(heading for _, heading in self._headings), kind, page))

    def build(self, name: str, digest: str) -> Document:
        """The document. Its title, or else a first heading of level 1 above all blocks, is not among the headings."""
        title = one_line(self.title)
        if not title and all(headings[:1] == (self._first_heading,) for _, headings, _, _ in self._blocks):
            title = self._first_heading or ""
        blocks: list[Block] = []
        start = 0
        for text, headings, kind, page in self._blocks:
            above = headings[1:] if headings[:1] == (title,) else headings
            blocks.append(Block(text, above, start, kind, page))
            start += len(text) + len("\n\n")
        return Document(name, title or name, "\n\n".join(block.text for block in blocks), tuple(blocks), digest)


def one_line(text: str) -> str:
    """The text with each run of white space as one space."""
    return " ".join(text.split())


def table_text(rows: Iterable[list[str]]) -> str:
    """Rows of cells as a Markdown table, whose first row is the head."""
    lines = [[one_line(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [line for line in lines if any(line)]
    width = max(map(len, lines), default=0)
    written = [f"| {' | '.join(line + [''] * (width - len(line)))} |" for line in lines]
    return "\n".join([*written[:1], f"|{' --- |' * width}", *written[1:]]) if written else ""
