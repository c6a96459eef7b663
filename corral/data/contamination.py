"""Finds training rows that share passages with held-out rows (leaked test data).

A passage is a whole prompt, or 13 words in a row (Brown et al. 2020, arXiv 2005.14165, appendix C).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from corral.data.word_hashes import FACTOR, Block, Hashes, Ints, hash_ngrams, hash_spans, mix

NGRAM = 13
"""Words in a row that make a passage."""
FREQUENT = 10
"""A 13-gram that stands in more training rows than this, and in several held-out ones, is taken for boilerplate, as in GPT-3's
appendix C, and does not count. A whole prompt always does."""


Flags: TypeAlias = NDArray[np.bool_]


def find_contaminated(held_out: Iterable[Block], training: Iterable[Block]) -> tuple[Flags, Flags]:
    """(for each training row whether it shares a passage with a held-out row, for each held-out row whether it shares one with
    a training row). [training rows], [held-out rows]

    A passage is a whole prompt, or 13 words in a row that are not boilerplate (`FREQUENT`).
    """
    prompts, ngrams = _Passages(), _Passages()
    held_out_rows = 0
    for block in held_out:
        prompts.add(*_prompt_hashes(block), held_out_rows)
        ngrams.add(*_ngram_hashes(block), held_out_rows)
        held_out_rows += len(block[2])
    prompt_set, ngram_set = _HashSet(prompts.known), _HashSet(ngrams.known)
    training_counts, shared_prompts = np.zeros(len(ngrams.known), np.int64), np.zeros(len(prompts.known), bool)
    flags = [np.zeros(0, bool)]
    shared_rows, shared_ngrams = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    total = 0
    for block in training:
        hashes, rows = _prompt_hashes(block)
        block_flags = np.zeros(len(block[2]), bool)
        numbers, positions = prompt_set.find(hashes)
        shared_prompts[numbers] = True
        block_flags[rows[positions]] = True
        flags.append(block_flags)
        hashes, rows = _ngram_hashes(block)
        numbers, positions = ngram_set.find(hashes)
        distinct = np.unique(np.stack([rows[positions], numbers], axis=1), axis=0)
        np.add.at(training_counts, distinct[:, 1], 1)
        shared_rows.append(distinct[:, 0] + total)
        shared_ngrams.append(distinct[:, 1])
        total += len(block_flags)
    contaminated = np.concatenate(flags)
    boilerplate = (training_counts > FREQUENT) & (ngrams.row_counts > 1)
    contaminated[np.concatenate(shared_rows)[~boilerplate[np.concatenate(shared_ngrams)]]] = True
    is_shared = np.zeros(held_out_rows, bool)
    is_shared[prompts.rows_with(shared_prompts)] = True
    is_shared[ngrams.rows_with((training_counts > 0) & ~boilerplate)] = True
    return contaminated, is_shared


class _Passages:
    """Hashes of the passages of held-out rows, and the rows that each stands in."""

    def __init__(self) -> None:
        self._pairs = [np.zeros((0, 2), np.uint64)]

    def add(self, hashes: Hashes, rows: Ints, first: int) -> None:
        """Passages of rows, which are numbered from `first` on."""
        pairs = np.stack([hashes, (rows + first).astype(np.uint64)], axis=1)
        self._pairs.append(np.unique(pairs, axis=0))

    @cached_property
    def _by_passage(self) -> tuple[Hashes, Ints, Ints]:
        """(the different hashes, of each pair the number of its hash, of each pair its row)"""
        pairs = np.concatenate(self._pairs)
        known, numbers = np.unique(pairs[:, 0], return_inverse=True)
        return known, numbers, pairs[:, 1].astype(np.int64)

    @property
    def known(self) -> Hashes:
        """The different hashes, ascending."""
        return self._by_passage[0]

    @property
    def row_counts(self) -> Ints:
        """In how many rows each known passage stands."""
        return np.bincount(self._by_passage[1], minlength=len(self.known))

    def rows_with(self, passages: Flags) -> Ints:
        """The rows with any of the known passages that are flagged."""
        _, numbers, rows = self._by_passage
        return rows[passages[numbers]]


def _prompt_hashes(block: Block) -> tuple[Hashes, Ints]:
    """(a hash of each row's whole prompt, its row). The same words within a longer text have another hash."""
    words, ends, prompt_words = block
    rows = np.flatnonzero(prompt_words > 0)
    hashes = hash_spans(words, ends[rows], ends[rows] + prompt_words[rows])
    return mix(hashes + FACTOR), rows


def _ngram_hashes(block: Block) -> tuple[Hashes, Ints]:
    """(hashes of all 13-grams, the row of each)."""
    words, ends, _ = block
    lengths = np.diff(ends)
    hashes = hash_ngrams(words, NGRAM)
    rows = np.repeat(np.arange(len(lengths)), lengths)[: len(hashes)]
    within_row = np.arange(len(hashes)) + NGRAM <= ends[1:][rows]
    return hashes[within_row], rows[within_row]


class _HashSet:
    """A set of hashes, given sorted, that is searched for many at once; a table of their first bits rejects most."""

    _BITS = np.uint64(22)

    def __init__(self, members: Hashes) -> None:
        self._members = members
        self._table = np.zeros(1 << int(self._BITS), bool)
        self._table[members >> (np.uint64(64) - self._BITS)] = True

    def find(self, hashes: Hashes) -> tuple[Ints, Ints]:
        """(positions among the members, positions among `hashes`) of the hashes that are members."""
        if not len(self._members):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        likely = np.flatnonzero(self._table[hashes >> (np.uint64(64) - self._BITS)])
        positions = np.minimum(np.searchsorted(self._members, hashes[likely]), len(self._members) - 1)
        matches = self._members[positions] == hashes[likely]
        return positions[matches], likely[matches]
