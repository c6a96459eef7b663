"""Reads HTML pages with Beautiful Soup: headings, paragraphs, lists, definitions, code and tables in reading order.

Scripts, styles, navigation and tables of contents are left out. Where a page marks one part as its main one, only that is
read. A `dt` that ends with a question mark is the heading of its `dd`, as pages of questions and answers have it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from corral.errors import DataError, require
from corral.retrieval.documents import DocumentBuilder, one_line, table_text
from corral.retrieval.readers.plain_text import decode_text

MAX_TAGS = 2_000_000
"""A page with more is refused: its tree would fill the memory."""

MAX_DEPTH = 5_000
"""Tags within each other. The time to parse grows with their square; pages that close no paragraph stay below it."""

_LEFT_OUT = frozenset(
    (
        "script",
        "style",
        "noscript",
        "template",
        "nav",
        "svg",
        "button",
        "select",
        "textarea",
        "iframe",
        "object",
        "head",
    )
)
_LEFT_OUT_ROLES = frozenset(("navigation", "search", "contentinfo", "banner", "menu", "menubar"))
# Classes of DocBook, Sphinx, Docutils, MkDocs and MediaWiki.
_LEFT_OUT_CLASSES = frozenset(
    ("navheader", "navfooter", "toc", "headerlink", "sphinxsidebar", "contents", "breadcrumb", "breadcrumbs")
) | {"md-sidebar", "mw-editsection"}
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_QUESTION_LEVEL = 7  # below all headings
_LISTS = frozenset(("ul", "ol", "dl"))
_BLOCKS = _LISTS.union(
    (
        "address",
        "article",
        "aside",
        "blockquote",
        "body",
        "caption",
        "center",
        "dd",
        "details",
        "div",
        "dt",
        "fieldset",
    ),
    (
        "figcaption",
        "figure",
        "footer",
        "form",
        "header",
        "hr",
        "html",
        "legend",
        "li",
        "main",
        "p",
        "section",
        "summary",
    ),
    ("table", "tbody", "td", "tfoot", "th", "thead", "tr"),
)
_LAYOUT = ["table", "ul", "ol", "dl", "pre", *_HEADINGS]
"""A table that holds one of these lays out a page."""


def read_html(content: bytes, where: str) -> DocumentBuilder:
    """The blocks of a page. Raises DataError if it is not text, or too large; MissingExtraError."""
    require("bs4", "rag")
    from bs4.dammit import EncodingDetector

    declared = EncodingDetector.find_declared_encoding(content[:4096], is_html=True)
    try:
        "".encode(declared or "utf-8")
    except LookupError:
        raise DataError(
            f"the page names an encoding that is not known: {declared!r}", where=where, hint="save it again as UTF-8"
        ) from None
    builder = DocumentBuilder()
    add_html(builder, decode_text(content, where, declared), where)
    return builder


def add_html(builder: DocumentBuilder, text: str, where: str) -> None:
    """Add the blocks of a page, or of a part of one, and take its title. Raises DataError if it is too large."""
    import bs4

    if text.count("<") > MAX_TAGS:
        raise DataError(f"the page has more than {MAX_TAGS:,} tags", where=where, hint="split it into several files")

    class Page(bs4.BeautifulSoup):
        def pushTag(self, tag: bs4.Tag) -> None:
            if len(self.tagStack) > MAX_DEPTH:
                what = f"the page has more than {MAX_DEPTH:,} tags within each other"
                raise DataError(what, where=where, hint="mend its tags that are not closed, or leave it out")
            super().pushTag(tag)

    try:
        page = Page(text, "html.parser")
    except bs4.ParserRejectedMarkup as error:
        reason = one_line(str(error))
        raise DataError(f"the page is not HTML: {reason}", where=where, hint="mend it, or leave it out") from error
    if (title := page.find("title")) is not None and not builder.title:
        builder.title = title.get_text()
    mains = page.find_all(lambda tag: tag.name == "main" or tag.get("role") == "main")
    _Walk(builder).read(mains[0] if len(mains) == 1 else page)


class _Walk:
    """Goes through a page's tree without recursion, which hostile nesting would exhaust."""

    def __init__(self, builder: DocumentBuilder) -> None:
        self._builder = builder
        self._lines: list[list[str]] = [[]]
        """The text since the last block ended; a `br` begins a new line."""
        self._list: list[str] = []
        """The lines of the list that is being read."""
        self._lists: list[Any] = []
        """The lists around this place, the outermost first."""
        self._mark = ""
        """What stands before the next line of a list."""

    def read(self, root: Any) -> None:
        stack: list[tuple[Any, bool]] = [(root, False)]
        while stack:
            node, is_end = stack.pop()
            if not hasattr(node, "contents"):
                if _is_text(node):
                    self._lines[-1].append(str(node))
            elif is_end:
                self._end(node)
            elif self._begin(node):
                if node.name in _BLOCKS:
                    stack.append((node, True))
                stack.extend((child, False) for child in reversed(node.contents))
        self._end_block()
        self._end_list()

    def _begin(self, tag: Any) -> bool:
        """Reads the beginning of a tag, or all of it. Returns whether its content is still to be read."""
        name: str = tag.name
        if _is_left_out(tag):
            return False
        if name == "br":
            self._lines.append([])
        elif name in _HEADINGS:
            self._heading(_HEADINGS[name], tag)
            return False
        elif name == "dt" and one_line(_text(tag)).endswith("?"):
            self._heading(_QUESTION_LEVEL, tag)
            return False
        elif name == "pre" or (name == "table" and _is_table(tag)):
            self._end_block()
            self._end_list()
            if name == "pre":
                self._builder.add(_text(tag).expandtabs(), "code")
            else:
                self._table(tag)
            return False
        elif name in _BLOCKS:
            self._end_block()
            if name in _LISTS:
                self._lists.append(tag)
            elif name == "li":
                self._mark = "  " * min(len(self._lists) - 1, 8) + "- "
        return True

    def _end(self, tag: Any) -> None:
        self._end_block()
        if self._lists and self._lists[-1] is tag:
            self._lists.pop()
            if not self._lists:
                self._end_list()
            if tag.name == "dl":
                self._builder.end_sections(_QUESTION_LEVEL)

    def _heading(self, level: int, tag: Any) -> None:
        self._end_block()
        self._end_list()
        self._builder.heading(level, _text(tag))

    def _table(self, tag: Any) -> None:
        if (caption := tag.find("caption")) is not None:
            self._builder.add(one_line(_text(caption)))
        self._builder.add(table_text(_rows(tag)), "table")

    def _end_block(self) -> None:
        lines = [one_line("".join(parts)) for parts in self._lines]
        self._lines = [[]]
        if not (text := "\n".join(line for line in lines if line)):
            return
        if not self._lists:
            self._builder.add(text)
            return
        self._list.append(self._mark + text)
        self._mark = " " * len(self._mark)

    def _end_list(self) -> None:
        self._builder.add("\n".join(self._list))
        self._list = []
        self._mark = ""


def _is_left_out(tag: Any) -> bool:
    attributes: dict[str, Any] = tag.attrs
    classes: Sequence[str] = attributes.get("class") or ()
    return (
        tag.name in _LEFT_OUT
        or attributes.get("role") in _LEFT_OUT_ROLES
        or "hidden" in attributes
        or not _LEFT_OUT_CLASSES.isdisjoint(classes)
    )


def _text(tag: Any) -> str:
    """The text of a tag, with line breaks, without what is left out."""
    parts: list[str] = []
    stack: list[Any] = [tag]
    while stack:
        node = stack.pop()
        if not hasattr(node, "contents"):
            parts.append(str(node) if _is_text(node) else "")
        elif node.name == "br":
            parts.append("\n")
        elif node is tag or not _is_left_out(node):
            stack.extend(reversed(node.contents))
    return "".join(parts)


def _is_text(node: Any) -> bool:
    """Whether a leaf of the tree is text; comments, scripts and the like are of other subclasses."""
    from bs4.element import CData, NavigableString

    return type(node) in (NavigableString, CData)


def _is_table(tag: Any) -> bool:
    return tag.get("role") not in ("presentation", "none") and tag.find(_LAYOUT) is None


_SPAN = re.compile(r"\s*(\d{1,2})\s*")


def _rows(table: Any) -> list[list[str]]:
    rows: list[list[str]] = []
    for row in table.find_all("tr"):
        cells: list[str] = []
        for cell in row.find_all(["td", "th"]):
            span = _SPAN.fullmatch(str(cell.get("colspan", "")))
            cells += [_text(cell), *[""] * (int(span[1]) - 1 if span else 0)]
        rows.append(cells)
    return rows
