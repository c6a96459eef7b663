"""Checks the citations of an answer: whether `[n]` was shown, and whether quotations stand in the passage that they cite.

A quotation is text of at least three words between double quotes. It is checked against the citations that follow it in its
line, or, if none follow, the last before it. Case, quotes, kinds of dashes and the amount of space do not count; an
ellipsis stands for anything. Answers come from models and users, so the work is linear in their length.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from corral.retrieval.passages import Passage

_CITATION = re.compile(r"\[ ?(\d{1,3}(?:[,;] ?\d{1,3}){0,15}+) ?\]")
_QUOTATION = re.compile(r'"([^"\n]{1,2000})"|[“„]([^“”„"\n]{1,2000})[”“]|«([^«»\n]{1,2000})»')
_ELLIPSIS = re.compile(r"\[?(?:…|\.{3})\]?")
_PLAIN = str.maketrans({**dict.fromkeys('"“”„«»', ""), "’": "'", "‘": "'", "–": "-", "—": "-"})
_FEWEST_WORDS = 3
_AROUND = " .,;:!?-'\""
"""Characters at the ends of a quotation that may be the answer's own."""


@dataclass(frozen=True, slots=True)
class Citation:
    """A number in an answer, as in `[2]`; `[1, 2]` is two.

    Args:
        start: where its bracket begins, in characters of the answer.
        shown: whether a passage with this number was in the prompt.
    """

    number: int
    start: int
    shown: bool


@dataclass(frozen=True, slots=True)
class Quotation:
    """Quoted text in an answer.

    Args:
        start: where its opening quote is, in characters of the answer.
        cites: the numbers of the passages that it is attributed to; empty if no citation is in its line.
        stands: whether it stands in one of them.
    """

    text: str
    start: int
    cites: tuple[int, ...]
    stands: bool


@dataclass(frozen=True, slots=True)
class CheckedCitations:
    """All citations and quotations of an answer, in its order."""

    citations: tuple[Citation, ...]
    quotations: tuple[Quotation, ...]

    @property
    def cited(self) -> tuple[int, ...]:
        """Numbers of the shown passages that are cited, ascending."""
        return tuple(sorted({citation.number for citation in self.citations if citation.shown}))

    @property
    def hold(self) -> bool:
        """Whether there is a citation, all were shown, and no quotation is missing from what it cites."""
        shown = all(citation.shown for citation in self.citations)
        return bool(self.citations) and shown and all(q.stands for q in self.quotations if q.cites)

    def to_json(self) -> dict[str, Any]:
        """Counts, for rows and reports: `citations`, `shown`, `quotations` (those with a citation) and `stand`; the numbers
        `cited`; and `hold`."""
        attributed = [quotation for quotation in self.quotations if quotation.cites]
        return {
            "citations": len(self.citations),
            "shown": sum(citation.shown for citation in self.citations),
            "quotations": len(attributed),
            "stand": sum(quotation.stands for quotation in attributed),
            "cited": list(self.cited),
            "hold": self.hold,
        }


def check_citations(answer: str, passages: Sequence[Passage]) -> CheckedCitations:
    """Check an answer against the passages that were shown, which are numbered from 1 in their order."""

    @cache
    def plain_passage(number: int) -> str:
        passage = passages[number - 1]
        return _plain(f"{passage.heading_path}\n{passage.text}")

    groups = [(m.start(), tuple(map(int, re.findall(r"\d+", m[1])))) for m in _CITATION.finditer(answer)]
    citations = [Citation(n, start, 1 <= n <= len(passages)) for start, numbers in groups for n in numbers]
    quotations: list[Quotation] = []
    following = 0  # the first group after the quotation
    for match in _QUOTATION.finditer(answer):
        text = next(part for part in match.groups() if part is not None)
        if len(text.split()) < _FEWEST_WORDS:
            continue
        while following < len(groups) and groups[following][0] < match.end():
            following += 1
        cites = _cited_in_line(answer, match, groups, following)
        stands = any(_stands(text, plain_passage(n)) for n in cites if 1 <= n <= len(passages))
        quotations.append(Quotation(text, match.start(), cites, stands))
    return CheckedCitations(tuple(citations), tuple(quotations))


def _cited_in_line(
    answer: str, quotation: re.Match[str], groups: Sequence[tuple[int, tuple[int, ...]]], following: int
) -> tuple[int, ...]:
    """The numbers that a quotation is attributed to; neighbouring brackets, as in `[1][2]`, belong together."""
    cites: list[int] = []
    end = quotation.end()
    for start, numbers in groups[following : following + 16]:
        between = answer[end : min(start, end + 500)]
        if "\n" in between or start > end + 500 or (cites and between.strip(" 0123456789,;]") != ""):
            break
        cites += numbers
        end = start + 1
    if not cites and following:
        start, numbers = groups[following - 1]
        if quotation.start() - start <= 500 and "\n" not in answer[start : quotation.start()]:
            cites += numbers
    return tuple(dict.fromkeys(cites))


def _stands(quotation: str, passage: str) -> bool:
    """Whether the parts of a quotation between its ellipses are in a passage, in their order."""
    at = 0
    parts = [_plain(part).strip(_AROUND) for part in _ELLIPSIS.split(quotation)]
    for part in parts:
        found = passage.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return any(parts)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).translate(_PLAIN).casefold().split())
