"""Readers of documents: each turns the content of a file of its kind into blocks under headings.

A reader gets the whole content, which `collection` bounds, and raises DataError with the file's address.
"""

from collections.abc import Callable
from typing import TypeAlias

from corral.retrieval.documents import DocumentBuilder
from corral.retrieval.readers.html import read_html
from corral.retrieval.readers.markdown import read_markdown
from corral.retrieval.readers.pdf import read_pdf
from corral.retrieval.readers.plain_text import read_txt
from corral.retrieval.readers.word import read_docx

__all__ = ["READERS", "Reader"]

Reader: TypeAlias = Callable[[bytes, str], DocumentBuilder]
"""(content, address for errors) → the blocks."""

READERS: dict[str, Reader] = {
    ".txt": read_txt,
    ".md": read_markdown,
    ".markdown": read_markdown,
    ".html": read_html,
    ".htm": read_html,
    ".xhtml": read_html,
    ".pdf": read_pdf,
    ".docx": read_docx,
}
"""By the extension of a file's name."""
