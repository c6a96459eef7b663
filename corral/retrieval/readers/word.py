"""Reads Word's `.docx` files with python-docx: headings by their styles, paragraphs, lists and tables in reading order.

Deleted text of tracked changes, headers, footers and comments are left out. Text boxes and content controls are read.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from typing import Any

from corral.errors import DataError, require
from corral.retrieval.documents import DocumentBuilder, one_line, table_text

MAX_UNPACKED = 300_000_000
"""Bytes of all parts of a file, unpacked: a few kilobytes can be packed that unpack to gigabytes."""
MAX_PART = 100_000_000
"""Bytes of a part that holds text."""

_HEADING = re.compile(r"heading ([1-9])", re.IGNORECASE)
_OLD_WORD = b"\xd0\xcf\x11\xe0"


def read_docx(content: bytes, where: str) -> DocumentBuilder:
    """The blocks of a Word file. Raises DataError if it is encrypted, damaged or too large; MissingExtraError."""
    docx = require("docx", "rag")
    _check_package(content, where)
    try:
        document = docx.Document(io.BytesIO(content))
        return _Body(document).read()
    except Exception as error:  # of zipfile, lxml or python-docx, which have no common base
        if isinstance(error, MemoryError):
            raise
        reason = one_line(str(error)) or type(error).__name__
        hint = "open it in Word or LibreOffice and save it again"
        raise DataError(f"the Word file cannot be read: {reason}", where=where, hint=hint) from error


def _check_package(content: bytes, where: str) -> None:
    if content.startswith(_OLD_WORD):
        what = "the file is encrypted, or of Word before 2007"
        raise DataError(what, where=where, hint="save it as .docx without a password")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as package:
            sizes = {part.filename: part.file_size for part in package.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        hint = "fetch or write it again; if it is no Word file, name it by its kind"
        raise DataError(f"the file is no Word file, or damaged: {error}", where=where, hint=hint) from error
    # A part is never unpacked beyond the size that is stated here.
    text = max((size for name, size in sizes.items() if name.endswith((".xml", ".rels"))), default=0)
    if sum(sizes.values()) > MAX_UNPACKED or text > MAX_PART:
        what = f"the Word file unpacks to {sum(sizes.values()):,} bytes, {text:,} of them in one part"
        hint = f"split it: the limits are {MAX_UNPACKED:,} and {MAX_PART:,} bytes"
        raise DataError(what, where=where, hint=hint)


class _Body:
    def __init__(self, document: Any) -> None:
        from docx.oxml.ns import qn

        self._qn = qn
        self._body: Any = document.element.body
        self._styles: dict[str, str] = {style.style_id: style.name or "" for style in document.styles}
        self._builder = DocumentBuilder()
        self._builder.title = document.core_properties.title or ""
        self._list: list[str] = []

    def read(self) -> DocumentBuilder:
        qn = self._qn
        containers = {qn("w:sdt"), qn("w:sdtContent"), qn("w:customXml"), qn("w:ins"), qn("w:smartTag")}
        stack: list[Any] = list(reversed(self._body))
        while stack:
            element = stack.pop()
            if element.tag == qn("w:p"):
                self._paragraph(element)
            elif element.tag == qn("w:tbl"):
                self._end_list()
                rows = [
                    [self._text(cell) for cell in _children(row, qn("w:tc"))] for row in _children(element, qn("w:tr"))
                ]
                self._builder.add(table_text(rows), "table")
            elif element.tag in containers:
                stack.extend(reversed(element))
        self._end_list()
        return self._builder

    def _paragraph(self, element: Any) -> None:
        qn = self._qn
        settings = element.find(qn("w:pPr"))
        style_element = settings.find(qn("w:pStyle")) if settings is not None else None
        style = self._styles.get(style_element.get(qn("w:val")), "") if style_element is not None else ""
        text = self._text(element).strip()
        if not text:
            return
        if style.lower() == "title":
            self._end_list()
            self._builder.title = self._builder.title or text
            self._builder.heading(1, text)
        elif heading := _HEADING.fullmatch(style):
            self._end_list()
            self._builder.heading(int(heading[1]) + 1, text)
        elif style.startswith("List") or (settings is not None and settings.find(qn("w:numPr")) is not None):
            self._list.append(f"- {text}")
        else:
            self._end_list()
            self._builder.add(text)

    def _end_list(self) -> None:
        self._builder.add("\n".join(self._list))
        self._list = []

    def _text(self, element: Any) -> str:
        """The text below an element. Of a drawing that is stored twice, for old programs too, the new form is taken."""
        qn = self._qn
        fallback = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"
        parts: list[str] = []
        stack: list[Any] = [element]
        while stack:
            node = stack.pop()
            if node.tag == qn("w:t"):
                parts.append(node.text or "")
            elif node.tag == qn("w:tab"):
                parts.append("\t")
            elif node.tag in (qn("w:br"), qn("w:cr")):
                parts.append("\n")
            elif node.tag not in (fallback, qn("w:pPr"), qn("w:moveFrom")):
                if node.tag == qn("w:p") and parts:
                    parts.append("\n")
                stack.extend(reversed(node))
        return "".join(parts)


def _children(element: Any, tag: str) -> Iterator[Any]:
    """The nearest elements below with this tag: rows and cells may stand in content controls."""
    stack: list[Any] = list(reversed(element))
    while stack:
        node = stack.pop()
        if node.tag == tag:
            yield node
        else:
            stack.extend(reversed(node))
