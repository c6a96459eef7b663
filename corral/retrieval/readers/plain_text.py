"""Reads `.txt` files: a block is what stands between blank lines. Headings are not guessed."""

from __future__ import annotations

import io
import re
from functools import partial

from corral.data.sources.files import SourceFile
from corral.data.sources.text_files import open_text
from corral.errors import DataError
from corral.retrieval.documents import DocumentBuilder

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


def read_txt(content: bytes, where: str) -> DocumentBuilder:
    """The paragraphs of a text. Raises DataError if it is not text."""
    builder = DocumentBuilder()
    add_paragraphs(builder, decode_text(content, where))
    return builder


def add_paragraphs(builder: DocumentBuilder, text: str, page: int | None = None) -> None:
    """Add a block for each part of a text between blank lines."""
    for paragraph in _BLANK_LINES.split(text):
        builder.add("\n".join(line.rstrip() for line in paragraph.split("\n")), page=page)


def decode_text(content: bytes, where: str, encoding: str | None = None) -> str:
    """The text of a file: UTF-8, what a byte order mark says, or in the encoding that the file names; none is guessed.

    Line ends become `\\n`. Raises DataError if it is not text.
    """
    file = SourceFile(where, where, ".txt", "", partial(io.BytesIO, content), encoding=encoding)
    with open_text(file) as reader:
        text = reader.read()
        if fault := reader.find_fault(text):
            reason, at = fault
            raise DataError(
                f"the file is not text that can be read: line {text.count(chr(10), 0, at) + 1}: {reason.partition(';')[0]}",
                where=where,
                hint="save it again as UTF-8; if it is no text at all, leave it out",
            )
    return text.replace("\r\n", "\n").replace("\r", "\n")
