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

VERSION = 2
SHINGLE = 5
RESEMBLANCE = 0.8
BANDS, BAND_ROWS = 16, 8
_MEMBERS = 32  # rows of one bucket that a new one is compared with; unlike rows seldom share a bucket
PASSAGE = 13
FREQUENT = 10
"""A passage that stands in more training rows than this, and in several held-out ones, is a phrase of the form, as in GPT-3's
appendix C, and does not count. A whole prompt always does."""

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
    """Join rows to a row before them that they resemble and that stands for itself: likeness is not passed on, so whatever
    is left out resembles what is kept.

    Args:
        signatures: `bands` of each row. [rows, BANDS]
        groups: for each row the first row that equals it. [rows]
        words: gives the words of a row.

    Returns: for each row the row that stands for it: itself, or the first one that it resembles. [rows]
    """
    parents = groups.copy()
    firsts = np.flatnonzero((groups == np.arange(len(groups))) & signatures.any(axis=1))
    buckets = _buckets(signatures[firsts])
    kept: dict[int, list[int]] = {}
    for place in np.flatnonzero((buckets >= 0).any(axis=1)).tolist():
        row, here = int(firsts[place]), [bucket for bucket in buckets[place].tolist() if bucket >= 0]
        candidates = sorted({other for bucket in here for other in kept.get(bucket, ())})
        mine = words(row)
        like = next((other for other in candidates if resemblance(words(other), mine) >= RESEMBLANCE), None)
        if like is not None:
            parents[row] = like
            continue
        for bucket in here:
            members = kept.setdefault(bucket, [])
            if len(members) < _MEMBERS:
                members.append(row)
    return parents[groups]


def _buckets(signatures: Hashes) -> Ints:
    """A number for each band of each row, equal where the band's hashes are; -1 where no other row shares it. [rows, BANDS]"""
    found = np.full(signatures.shape, -1, np.int64)
    start = 0
    for band in range(BANDS):
        _, which, counts = np.unique(signatures[:, band], return_inverse=True, return_counts=True)
        shared = counts[which] > 1
        found[shared, band] = which[shared] + start
        start += len(counts)
    return found


def _passages(block: Block) -> tuple[Hashes, Ints, Hashes, Ints]:
    """(hashes of what marks a row, the row of each): its whole prompt, then its runs of 13 words."""
    words, ends, prompts = block
    lengths = np.diff(ends)
    grams = _grams(words, PASSAGE)
    row_of = np.repeat(np.arange(len(lengths)), lengths)[: len(grams)]
    # A run that begins in a row must end in it.
    inside = np.arange(len(grams)) + PASSAGE <= ends[1:][row_of]
    asked = np.flatnonzero(prompts > 0)
    whole = [_grams(words[ends[row] : ends[row] + prompts[row]], int(prompts[row])) for row in asked]
    # A prompt equals a whole prompt only: the same words within a longer text are no copy of it.
    marked = _mixed(np.concatenate([np.zeros(0, np.uint64), *whole]) + _FACTOR)
    return marked, asked, grams[inside], row_of[inside]


def contaminated(held_out: Iterable[Block], training: Iterable[Block]) -> NDArray[np.bool_]:
    """For each training row whether it shares a passage with a held-out row. [training rows]

    A passage is a whole prompt, or 13 words in a row that are no phrase of the form (`FREQUENT`).
    """
    nothing = np.zeros(0, np.uint64)
    prompts, runs = [nothing], [nothing]
    for block in held_out:
        marked, _, grams, row_of = _passages(block)
        prompts.append(marked)
        pairs = np.unique(np.stack([grams, row_of.astype(np.uint64)], axis=1), axis=0)
        runs.append(pairs[:, 0])
    wanted, held_out_rows = np.unique(np.concatenate(runs), return_counts=True)
    in_prompts, in_runs = _Filter(np.unique(np.concatenate(prompts))), _Filter(wanted)
    counts = np.zeros(len(wanted), np.int64)
    rows, which, found = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, bool)]
    total = 0
    for block in training:
        marked, asked, grams, row_of = _passages(block)
        here = np.zeros(len(block[2]), bool)
        here[asked[in_prompts.find(marked)[1]]] = True
        found.append(here)
        places, at = in_runs.find(grams)
        pairs = np.unique(np.stack([row_of[at], places], axis=1), axis=0)
        np.add.at(counts, pairs[:, 1], 1)
        rows.append(pairs[:, 0] + total)
        which.append(pairs[:, 1])
        total += len(here)
    result = np.concatenate(found)
    of_the_form = (counts > FREQUENT) & (held_out_rows > 1)
    result[np.concatenate(rows)[~of_the_form[np.concatenate(which)]]] = True
    return result


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
