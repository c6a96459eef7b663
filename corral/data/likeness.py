"""Which rows say almost the same, and which training rows share passages with held-out ones: by their words alone.

Words are runs of letters and digits in lower case (each character of Chinese and Japanese is a word); a row's words are
those of its turns except the system message, held as 32-bit hashes. Near duplicates are found by MinHash signatures of
5-word shingles (Broder 1997, "On the resemblance and containment of documents"): 128 hashes in 16 bands of 8, so that a
pair with resemblance 0.8 becomes a candidate with a probability of 0.95 and one of 0.9 with more than 0.9999, and then
counts if the resemblance of its whole shingle sets is at least 0.8. Contamination is an overlap of 13 words (Brown et al.
2020, arXiv 2005.14165, appendix C).

This module does not know where rows come from, nor what becomes of them.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from corral.messages import Conversation, Feedback, Message, Preference, Record, Text

Ints: TypeAlias = NDArray[np.int64]
Hashes: TypeAlias = NDArray[np.uint64]
Words: TypeAlias = NDArray[np.uint32]
Block: TypeAlias = tuple[Words, Ints, Ints]
"""(words of many rows, [rows + 1] where each row's words begin, [rows] how many of them are the prompt's)."""

VERSION = 1
SHINGLE = 5
RESEMBLANCE = 0.8
BANDS, BAND_ROWS = 16, 8
PASSAGE = 13
FREQUENT = 10
"""A passage that stands in more training rows than this is a phrase of the form, as in GPT-3's appendix C, and counts not."""

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
# Odd, so that multiplying by it loses nothing: 2^64 divided by the golden ratio.
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(31)


def words_of(record: Record) -> tuple[list[int], int]:
    """(hashes of a record's words, how many of them are the prompt's)."""
    match record:
        case Conversation(messages) if record.answered:
            prompt, answers = _said(messages[:-1]), [messages[-1].content]
        case Conversation(messages):
            prompt, answers = _said(messages), []
        case Preference():
            prompt, answers = _said(record.prompt.messages), [record.chosen, record.rejected]
        case Feedback():
            prompt, answers = _said(record.prompt.messages), [record.completion]
        case Text():
            prompt, answers = [], [record.content]
    asked = [word for text in prompt for word in _words(text)]
    return asked + [word for text in answers for word in _words(text)], len(asked)


def _said(messages: Sequence[Message]) -> list[str]:
    return [message.content for message in messages if message.role != "system"]


def _words(text: str) -> Iterator[int]:
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return (zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in _WORD.findall(text.lower()))


def word_rows(records: Iterable[Record]) -> dict[str, NDArray[Any]]:
    """Words of many rows: `words`, and over rows `word_ends` (one more than there are rows) and `prompt_words`."""
    words, ends, prompts = array("I"), array("q", [0]), array("q")
    for record in records:
        found, asked = words_of(record)
        words.extend(found)
        ends.append(len(words))
        prompts.append(asked)
    return {
        "words": np.asarray(words, np.uint32),
        "word_ends": np.asarray(ends, np.int64),
        "prompt_words": np.asarray(prompts, np.int64),
    }


def _grams(words: Words, n: int) -> Hashes:
    """A hash of each run of n words. [words - n + 1]"""
    count = max(0, len(words) - n + 1)
    hashes = np.zeros(count, np.uint64)
    for i in range(n):
        hashes = hashes * _FACTOR + words[i : i + count]
    return _mixed(hashes)


def _mixed(hashes: Hashes) -> Hashes:
    # A polynomial's low bits depend on the words' low bits only: spread them (the finisher of splitmix64).
    hashes = (hashes ^ (hashes >> _SHIFT)) * _MIX
    return hashes ^ (hashes >> _SHIFT)


def shingles(words: Words) -> Hashes:
    """The set of a row's 5-word shingles, sorted; a shorter row is one shingle, an empty one none."""
    return np.unique(_grams(words, min(SHINGLE, len(words)))) if len(words) else np.zeros(0, np.uint64)


def resemblance(one: Words, other: Words) -> float:
    """Shared shingles divided by all shingles of the two."""
    a, b = shingles(one), shingles(other)
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / ((len(a) + len(b) - shared) or 1)


def band_rows(records: Iterable[Record]) -> dict[str, NDArray[Any]]:
    """`bands` of many rows."""
    found = word_rows(records)
    return {"bands": bands(found["words"], found["word_ends"])}


def bands(words: Words, ends: Ints) -> Hashes:
    """For each row a hash of each band of its MinHash signature. [rows, BANDS]; rows without words have zeros."""
    lengths = np.diff(ends)
    found = np.zeros((len(lengths), BANDS), np.uint64)
    some = np.flatnonzero(lengths)
    if not len(some):
        return found
    sets, starts = _shingle_sets(words, ends, some)
    generator = np.random.Generator(np.random.PCG64(20_260_101))
    factors = generator.integers(0, 2**63, BANDS * BAND_ROWS, np.uint64) * np.uint64(2) + np.uint64(1)
    terms = generator.integers(0, 2**63, BANDS * BAND_ROWS, np.uint64)
    for band in range(BANDS):
        value = np.full(len(some), band, np.uint64)
        for row in range(band * BAND_ROWS, (band + 1) * BAND_ROWS):
            lowest = np.minimum.reduceat(_mixed(sets * factors[row] + terms[row]), starts)
            value = _mixed(value * _FACTOR + lowest)
        found[some, band] = value
    return found


def _shingle_sets(words: Words, ends: Ints, some: Ints) -> tuple[Hashes, Ints]:
    """(shingles of the rows `some`, where each row's begin); a shingle that stands twice changes no minimum."""
    grams = _grams(words, SHINGLE)
    parts: list[Hashes] = []
    starts = np.zeros(len(some), np.int64)
    at = 0
    for i, row in enumerate(some):
        begin, end = int(ends[row]), int(ends[row + 1])
        part = grams[begin : end - SHINGLE + 1] if end - begin >= SHINGLE else _grams(words[begin:end], end - begin)
        parts.append(part)
        starts[i] = at
        at += len(part)
    return np.concatenate(parts), starts


def near_groups(signatures: Hashes, groups: Ints, words: Callable[[int], Words]) -> Ints:
    """Join groups of equal rows whose rows resemble each other.

    Args:
        signatures: `bands` of each row. [rows, BANDS]
        groups: for each row the first row that equals it. [rows]
        words: gives the words of a row.

    Returns: for each row the first row of its group, where rows that resemble one row count as one group. [rows]
    """
    parents = groups.copy()

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = int(parents[row])
        return row

    firsts = np.flatnonzero((groups == np.arange(len(groups))) & signatures.any(axis=1))
    for one, other in _candidates(signatures[firsts]):
        a, b = sorted((root(int(firsts[one])), root(int(firsts[other]))))
        if a != b and resemblance(words(int(firsts[one])), words(int(firsts[other]))) >= RESEMBLANCE:
            parents[b] = a
    return np.fromiter((root(int(row)) for row in range(len(groups))), np.int64, len(groups))


def _candidates(signatures: Hashes) -> Iterator[tuple[int, int]]:
    """Pairs that share a band, each once, in order: the first row of each bucket with each other one."""
    pairs: list[NDArray[np.int64]] = [np.zeros((0, 2), np.int64)]
    for band in range(BANDS):
        by_hash = np.argsort(signatures[:, band], kind="stable")
        ordered = signatures[by_hash, band]
        begins = np.ones(len(ordered), bool)
        begins[1:] = ordered[1:] != ordered[:-1]
        first = by_hash[np.maximum.accumulate(np.where(begins, np.arange(len(ordered)), 0))]
        pairs.append(np.stack([first[~begins], by_hash[~begins]], axis=1))
    for one, other in np.unique(np.concatenate(pairs), axis=0):
        yield int(one), int(other)


def _passages(block: Block) -> tuple[Hashes, Ints]:
    """(hashes of what marks a row, the row of each): its runs of 13 words, and its whole prompt where that is shorter."""
    words, ends, prompts = block
    lengths = np.diff(ends)
    grams = _grams(words, PASSAGE)
    row_of = np.repeat(np.arange(len(lengths)), lengths)[: len(grams)]
    # A run that begins in a row must end in it.
    inside = np.arange(len(grams)) + PASSAGE <= ends[1:][row_of]
    short = np.flatnonzero((prompts > 0) & (prompts < PASSAGE))
    whole = [_grams(words[ends[row] : ends[row] + prompts[row]], int(prompts[row])) for row in short]
    # A prompt equals a whole prompt only: the same words within a longer text are no copy of it.
    marked = _mixed(np.concatenate([np.zeros(0, np.uint64), *whole]) + _FACTOR)
    return np.concatenate([grams[inside], marked]), np.concatenate([row_of[inside], short])


def contaminated(held_out: Iterable[Block], training: Iterable[Block]) -> NDArray[np.bool_]:
    """For each training row whether it shares a passage with a held-out row. [training rows]

    A passage is 13 words in a row, or a whole prompt of fewer; one that stands in more than `FREQUENT` training rows does not
    count.
    """
    nothing = np.zeros(0, np.uint64)
    wanted = np.unique(np.concatenate([nothing, *(np.unique(_passages(block)[0]) for block in held_out)]))
    filter_ = _Filter(wanted)
    counts = np.zeros(len(wanted), np.int64)
    rows, which = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    total = 0
    for block in training:
        hashes, row_of = _passages(block)
        places, here = filter_.find(hashes)
        pairs = np.unique(np.stack([row_of[here], places], axis=1), axis=0)
        np.add.at(counts, pairs[:, 1], 1)
        rows.append(pairs[:, 0] + total)
        which.append(pairs[:, 1])
        total += len(block[2])
    found = np.zeros(total, bool)
    found[np.concatenate(rows)[counts[np.concatenate(which)] <= FREQUENT]] = True
    return found


class _Filter:
    """Finds hashes among some; most are turned away by one look into a table."""

    _BITS = np.uint64(22)

    def __init__(self, wanted: Hashes) -> None:
        self._wanted = wanted
        self._table = np.zeros(1 << int(self._BITS), bool)
        self._table[wanted >> (np.uint64(64) - self._BITS)] = True

    def find(self, hashes: Hashes) -> tuple[Ints, Ints]:
        """(places among the wanted, places among `hashes`) of those that are wanted."""
        if not len(self._wanted):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        likely = np.flatnonzero(self._table[hashes >> (np.uint64(64) - self._BITS)])
        places = np.minimum(np.searchsorted(self._wanted, hashes[likely]), len(self._wanted) - 1)
        right = self._wanted[places] == hashes[likely]
        return places[right], likely[right]
