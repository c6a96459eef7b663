"""Reads Markdown with markdown-it: CommonMark with tables. A block of front matter at the start gives the title."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from corral.errors import DataError, require
from corral.retrieval.documents import DocumentBuilder, table_text
from corral.retrieval.readers.html import add_html
from corral.retrieval.readers.plain_text import decode_text

if TYPE_CHECKING:
    from markdown_it.token import Token

MAX_NESTING = 60
"""Lists and quotations within each other; a document that goes deeper is refused."""

_FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?)\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_TITLE = re.compile(r"^title:[ \t]*(.*)$", re.MULTILINE)


def read_markdown(content: bytes, where: str) -> DocumentBuilder:
    """The blocks of a Markdown file. Raises DataError if it is not text, or nests too deep; MissingExtraError."""
    text = decode_text(content, where)
    builder = DocumentBuilder()
    if front := _FRONT_MATTER.match(text):
        if title := _TITLE.search(front[1]):
            builder.title = title[1].strip().strip("\"'")
        text = text[front.end() :]
    markdown = require("markdown_it", "rag").MarkdownIt("commonmark", {"maxNesting": 2 * MAX_NESTING + 2})
    tokens: list[Token] = markdown.enable("table").parse(text)
    if max((token.level for token in tokens), default=0) >= 2 * MAX_NESTING:
        hint = "write it with fewer lists and quotations within each other, or leave it out"
        raise DataError(f"the document nests deeper than {MAX_NESTING} levels", where=where, hint=hint)
    _Walk(builder, where).read(tokens)
    return builder


class _Walk:
    """Goes through the tokens of a document, which markdown-it gives as a flat list."""

    def __init__(self, builder: DocumentBuilder, where: str) -> None:
        self._builder = builder
        self._where = where
        self._list: list[str] = []
        """The lines of the list that is being read."""
        self._numbers: list[int | None] = []
        """Of the lists around this place: the number of the next item; None for bullets."""
        self._mark = ""
        self._rows: list[list[str]] | None = None

    def read(self, tokens: list[Token]) -> None:
        level = 0
        for token in tokens:
            match token.type:
                case "heading_open":
                    self._end_list()
                    level = int(token.tag[1:])
                case "heading_close":
                    level = 0
                case "inline" if level:
                    self._builder.heading(level, _inline_text(token))
                case "table_open":
                    self._end_list()
                    self._rows = []
                case "tr_open" if self._rows is not None:
                    self._rows.append([])
                case "table_close":
                    self._builder.add(table_text(self._rows or []), "table")
                    self._rows = None
                case "inline" if self._rows:
                    self._rows[-1].append(_inline_text(token))
                case "inline":
                    self._add(_inline_text(token))
                case "fence" | "code_block":
                    self._end_list()
                    self._builder.add(token.content.expandtabs(), "code")
                case "html_block":
                    self._end_list()
                    add_html(self._builder, token.content, self._where)
                case _:
                    self._list_token(token)

    def _list_token(self, token: Token) -> None:
        match token.type:
            case "bullet_list_open":
                self._numbers.append(None)
            case "ordered_list_open":
                start: Any = token.attrGet("start")
                self._numbers.append(1 if start is None else int(start))
            case "list_item_open":
                number = self._numbers[-1]
                self._mark = "  " * (len(self._numbers) - 1) + ("- " if number is None else f"{number}. ")
                self._numbers[-1] = None if number is None else number + 1
            case "bullet_list_close" | "ordered_list_close":
                self._numbers.pop()
                if not self._numbers:
                    self._end_list()
            case _:
                pass

    def _add(self, text: str) -> None:
        if not self._numbers:
            self._builder.add(text)
        elif text.strip():
            self._list.append(self._mark + text)
            self._mark = " " * len(self._mark)

    def _end_list(self) -> None:
        self._builder.add("\n".join(self._list))
        self._list = []


def _inline_text(token: Token) -> str:
    """The text of a line of Markdown without its marks; a link is its text, an image its description."""
    parts: list[str] = []
    for child in token.children or []:
        if child.type == "softbreak":
            parts.append(" ")
        elif child.type == "hardbreak" or (child.type == "html_inline" and child.content.lower().startswith("<br")):
            parts.append("\n")
        elif child.type in ("text", "text_special", "code_inline", "image"):
            parts.append(child.content)
    return "".join(parts)
