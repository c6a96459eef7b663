"""Turns records into hashes of their words: the basis of the comparison of rows.

Words are runs of letters and digits in lower case; each Chinese or Japanese character is a word. The words of a row are
those of its messages except the system message, each held as a 32-bit hash.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from corral.data.row_store import CHUNK_ROWS, Column, list_column, split_list_column
from corral.messages import Conversation, Feedback, Preference, Record, Text

Ints: TypeAlias = NDArray[np.int64]
Hashes: TypeAlias = NDArray[np.uint64]
Words: TypeAlias = NDArray[np.uint32]
Block: TypeAlias = tuple[Words, Ints, Ints]
"""(words of many rows, [rows + 1] where each row's words begin, [rows] how many of them are the prompt's)."""

VERSION = 3

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""2^64 divided by the golden ratio: odd, so that multiplying by it loses nothing."""
_INVERSE_FACTOR = np.uint64(pow(int(FACTOR), -1, 2**64))
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(31)


def record_words(record: Record) -> tuple[list[int], int]:
    """(hashes of a record's words, how many of them are the prompt's)."""
    match record:
        case Conversation(messages) if record.answered:
            prompt, answers = messages[:-1], [messages[-1].content]
        case Conversation(messages):
            prompt, answers = messages, []
        case Preference():
            prompt, answers = record.prompt.messages, [record.chosen, record.rejected]
        case Feedback():
            prompt, answers = record.prompt.messages, [record.completion]
        case Text():
            prompt, answers = (), [record.content]
    words: list[int] = []
    for message in prompt:
        if message.role != "system":
            words += _hash_words(message.content)
    prompt_words = len(words)
    for text in answers:
        words += _hash_words(text)
    return words, prompt_words


class _WordHashes(dict[str, int]):
    """The hash of each word, computed once for the words of a text and those before it."""

    def __missing__(self, word: str) -> int:
        value = self[word] = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        return value


_MOST_REMEMBERED = 200_000
_known = _WordHashes()


def _hash_words(text: str) -> Iterator[int]:
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    if len(_known) > _MOST_REMEMBERED:
        _known.clear()
    return map(_known.__getitem__, _WORD.findall(text.lower()))


def word_columns(records: Iterable[Record]) -> dict[str, Column]:
    """The words of many rows, and how many of each row's are its prompt's: the columns `words` and `prompt_words`."""
    words, bounds, prompts = array("I"), array("q", [0]), array("q")
    for record in records:
        row_words, prompt_words = record_words(record)
        words.extend(row_words)
        bounds.append(len(words))
        prompts.append(prompt_words)
    return {
        "words": list_column(np.asarray(words, np.uint32), np.asarray(bounds)),
        "prompt_words": np.asarray(prompts, np.int64),
    }


def word_blocks(records: Iterable[Record]) -> Iterator[Block]:
    """The words of records, some hundreds of them at a time."""
    remaining = iter(records)
    while some := list(islice(remaining, CHUNK_ROWS)):
        columns = word_columns(some)
        words, bounds = split_list_column(columns["words"])
        yield words.to_numpy(), bounds, columns["prompt_words"]


def hash_ngrams(words: Words, n: int) -> Hashes:
    """A hash of each n words in a row. [words - n + 1]"""
    starts = np.arange(max(0, len(words) - n + 1))
    return hash_spans(words, starts, starts + n)


def hash_spans(words: Words, starts: Ints, ends: Ints) -> Hashes:
    """A hash of the words in each span [start, end), the same wherever the words stand. [spans]

    It is the polynomial in FACTOR whose coefficients are the words, modulo 2^64, as the difference of two prefix sums.
    """
    if not len(starts):
        return np.zeros(0, np.uint64)
    powers, inverse_powers = (
        np.cumprod(np.concatenate([[np.uint64(1)], np.full(len(words), factor, np.uint64)]))
        for factor in (FACTOR, _INVERSE_FACTOR)
    )
    sums = np.concatenate([[np.uint64(0)], np.cumsum(words * inverse_powers[:-1], dtype=np.uint64)])
    return mix((sums[ends] - sums[starts]) * powers[np.maximum(ends, 1) - 1])


def mix(hashes: Hashes) -> Hashes:
    """Spread the bits of polynomial hashes, whose low bits depend on the words' low bits only (splitmix64's finisher)."""
    hashes = (hashes ^ (hashes >> _SHIFT)) * _MIX
    return hashes ^ (hashes >> _SHIFT)
