"""Documents are split into passages: parts of 256 to 512 tokens that keep their headings, page and place."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Passage:
    """A part of a document that is found, shown and cited as one.

    Args:
        document: name of the document: its path relative to the collection, or its address.
        title: of the document.
        headings: above the passage, the outermost first; without the title.
        text: what stands there, without headings.
        start: where the text begins, in characters of the document's text.
        page: from 1, for documents that have pages.
    """

    document: str
    title: str
    headings: tuple[str, ...]
    text: str
    start: int
    page: int | None = None

    @property
    def heading_path(self) -> str:
        """Title and headings in one line, as a person is told where the passage stands."""
        return " › ".join(dict.fromkeys(part for part in (self.title, *self.headings) if part))

    @property
    def digest(self) -> str:
        """sha256 of all of it."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """`{"document", "title", "headings", "text", "start", "page"}`."""
        return {
            "document": self.document,
            "title": self.title,
            "headings": list(self.headings),
            "text": self.text,
            "start": self.start,
            "page": self.page,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Passage:
        """The inverse of `to_json`."""
        fields = dict(value)  # of the JSON form, whose only list is `headings`
        return cls(headings=tuple(fields.pop("headings")), **fields)


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that was found for a question.

    Args:
        score: by which hits are ordered: reciprocal rank fusion, or that of the only ranking.
        cosine: similarity of the question's and the passage's vectors, if there are vectors.
        bm25: the score of the words, if the words were searched.
    """

    passage: Passage
    score: float
    cosine: float | None = None
    bm25: float | None = None
