"""Documents as they are read from files: blocks of text in reading order, each under its headings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
    kind: Literal["text", "table", "code"] = "text"
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
