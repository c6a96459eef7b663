"""Reads the text layer of PDF files with pypdf, page by page; headings are those of the outline (the bookmarks)."""

from __future__ import annotations

import io
import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from corral.errors import DataError, require
from corral.retrieval.documents import DocumentBuilder, one_line
from corral.retrieval.readers.plain_text import add_paragraphs

MAX_PAGES = 20_000
MAX_CHARACTERS = 100_000_000
"""Of all pages; a file that has more is refused."""


def read_pdf(content: bytes, where: str) -> DocumentBuilder:
    """The paragraphs of each page. Raises DataError if it is encrypted, damaged or scanned; MissingExtraError."""
    pypdf = require("pypdf", "rag")
    builder = DocumentBuilder()
    with _read_errors(where):
        reader = pypdf.PdfReader(io.BytesIO(content))
        if reader.is_encrypted and not reader.decrypt(""):
            raise DataError(
                "the PDF is encrypted", where=where, hint="save it without a password, as with `qpdf --decrypt`"
            )
        if len(reader.pages) > MAX_PAGES:
            raise DataError(
                f"the PDF has more than {MAX_PAGES:,} pages", where=where, hint="split it into several files"
            )
        builder.title = str(getattr(reader.metadata, "title", None) or "")
        headings = _outline(reader)
        count = 0
        has_images = False
        for number, page in enumerate(reader.pages, start=1):
            text: str = page.extract_text()
            has_images = has_images or (not text.strip() and _has_image(page))
            count += len(text)
            if count > MAX_CHARACTERS:
                what = f"the text of the PDF is longer than {MAX_CHARACTERS:,} characters"
                raise DataError(what, where=where, hint="split it into several files")
            _add_page(builder, text, number, headings.get(number, []))
    if not count and has_images:
        hint = "recognise its text first, as with `ocrmypdf`"
        raise DataError("the PDF has no text: its pages are images, as a scanner makes them", where=where, hint=hint)
    return builder


@contextmanager
def _read_errors(where: str) -> Generator[None]:
    """Turns what pypdf raises for a damaged file, which may be any exception, into a DataError. Its warnings are not shown."""
    log = logging.getLogger("pypdf")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        reason = one_line(str(error)) or type(error).__name__
        hint = "fetch or write it again; `qpdf --check` says what is wrong"
        raise DataError(f"the PDF cannot be read: {reason}", where=where, hint=hint) from error
    finally:
        log.setLevel(level)


def _outline(reader: Any) -> dict[int, list[tuple[int, str]]]:
    """The entries of the outline by page, as (level, text); empty if it has none, or cannot be read."""
    entries: dict[int, list[tuple[int, str]]] = {}
    try:
        stack: list[tuple[int, Any]] = [(0, reader.outline)]
        while stack:
            level, entry = stack.pop()
            if isinstance(entry, list):
                stack.extend((level + 1, child) for child in reversed(entry))  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
            elif (page := reader.get_destination_page_number(entry)) is not None and page >= 0:
                entries.setdefault(page + 1, []).append((level, one_line(str(entry.title))))
    except Exception:  # a broken outline costs the headings, not the text
        return {}
    return entries


def _add_page(builder: DocumentBuilder, text: str, number: int, headings: list[tuple[int, str]]) -> None:
    """Adds a page's blocks. A heading stands where a line shows its text, else at the top of the page."""
    lines = text.split("\n")
    wanted = [one_line(line).casefold() for line in lines]
    begin = 0
    for level, heading in headings:
        at = next((i for i in range(begin, len(lines)) if wanted[i] == heading.casefold()), None)
        if at is not None:
            add_paragraphs(builder, "\n".join(lines[begin:at]), number)
            begin = at + 1
        builder.heading(level, heading)
    add_paragraphs(builder, "\n".join(lines[begin:]), number)


def _has_image(page: Any) -> bool:
    resources: Any = page.get("/Resources")
    objects: Any = resources.get_object().get("/XObject") if resources is not None else None
    return objects is not None and any(
        entry.get_object().get("/Subtype") == "/Image" for entry in objects.get_object().values()
    )
