"""Finds rows that say almost the same, by MinHash.

Signatures are of 5-word shingles (Broder 1997, "On the resemblance and containment of documents"): 128 hashes in 16 bands
of 8, so that a pair with resemblance 0.8 becomes a candidate with a probability of 0.95 and one of 0.9 with more than
0.9999. A candidate is a near duplicate if the resemblance of the whole shingle sets is at least 0.8.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np

from corral.data.row_store import Column, split_list_column
from corral.data.word_hashes import FACTOR, Hashes, Ints, Words, hash_ngrams, mix, word_columns
from corral.messages import Record

VERSION = 3
SHINGLE = 5
RESEMBLANCE = 0.8
BANDS, HASHES_PER_BAND = 16, 8
_MAX_BUCKET = 32  # kept rows that a bucket remembers; unlike rows seldom share a bucket
_MAX_COMPARED = 16  # candidates that a row is compared with; rows of one template may share buckets with hundreds
_MAX_CACHED = 50_000  # kept rows whose shingles stay in memory


def shingles(words: Words) -> Hashes:
    """The set of a row's 5-word shingles, sorted. A shorter row is one shingle, a row without words has none."""
    return np.unique(hash_ngrams(words, min(SHINGLE, len(words)))) if len(words) else np.zeros(0, np.uint64)


def resemblance(one: Words, other: Words) -> float:
    """The Jaccard index of two rows' shingle sets: shared shingles divided by all shingles of the two."""
    return _jaccard(shingles(one), shingles(other))


def _jaccard(a: Hashes, b: Hashes) -> float:
    joined = np.concatenate([a, b])
    joined.sort(kind="stable")
    shared = int((joined[1:] == joined[:-1]).sum())
    return shared / ((len(a) + len(b) - shared) or 1)


def band_columns(records: Iterable[Record]) -> dict[str, Column]:
    """`band_hashes` of many rows, as the column `bands`."""
    words, bounds = split_list_column(word_columns(records)["words"])
    return {"bands": band_hashes(words.to_numpy(), bounds)}


def band_hashes(words: Words, ends: Ints) -> Hashes:
    """A hash of each band of each row's MinHash signature. [rows, BANDS]; rows without words have zeros.

    Args:
        words: of all rows.
        ends: where each row's words begin. [rows + 1]
    """
    lengths = np.diff(ends)
    bands = np.zeros((len(lengths), BANDS), np.uint64)
    rows = np.flatnonzero(lengths)
    if not len(rows):
        return bands
    # A shingle that stands twice in a row changes no minimum, so lists do as well as sets.
    ngrams = hash_ngrams(words, SHINGLE)
    parts = [
        ngrams[begin : end - SHINGLE + 1] if end - begin >= SHINGLE else hash_ngrams(words[begin:end], end - begin)
        for begin, end in zip(ends[rows].tolist(), ends[rows + 1].tolist(), strict=True)
    ]
    starts = np.cumsum([0, *map(len, parts[:-1])])
    all_shingles = np.concatenate(parts)
    generator = np.random.Generator(np.random.PCG64(20_260_101))
    factors = generator.integers(0, 2**63, BANDS * HASHES_PER_BAND, np.uint64) * np.uint64(2) + np.uint64(1)
    terms = generator.integers(0, 2**63, BANDS * HASHES_PER_BAND, np.uint64)
    for band in range(BANDS):
        value = np.full(len(rows), band, np.uint64)
        for i in range(band * HASHES_PER_BAND, (band + 1) * HASHES_PER_BAND):
            minimum = np.minimum.reduceat(mix(all_shingles * factors[i] + terms[i]), starts)
            value = mix(value * FACTOR + minimum)
        bands[rows, band] = value
    return bands


def group_near_duplicates(bands: Hashes, groups: Ints, words_of_row: Callable[[int], Words], first: int = 0) -> Ints:
    """Assign each row to a kept row that it resembles, the first of those with most bands in common.

    Only rows that are themselves kept count, so every row that is left out resembles one that stays. A row is compared with
    the 16 kept rows that share most bands with it: two rows of resemblance 0.8 share 2.7 of 16 on average.

    Args:
        bands: `band_hashes` of each row. [rows, BANDS]
        groups: for each row the first row that equals it exactly. [rows]
        words_of_row: a row's words, by its number.
        first: so many rows are kept in any case, even if they resemble each other.

    Returns: for each row the kept row that stands for it: itself, or one that it resembles. [rows]
    """
    parents = groups.copy()
    distinct = np.flatnonzero((groups == np.arange(len(groups))) & bands.any(axis=1))
    buckets = _number_buckets(bands[distinct])
    kept: dict[int, list[int]] = {}

    @lru_cache(_MAX_CACHED)
    def shingles_of(row: int) -> Hashes:
        return shingles(words_of_row(row))

    for i in np.flatnonzero((buckets >= 0).any(axis=1)).tolist():
        row, row_buckets = int(distinct[i]), [bucket for bucket in buckets[i].tolist() if bucket >= 0]
        shared_bands = Counter(other for bucket in row_buckets for other in kept.get(bucket, ()))
        candidates = sorted(shared_bands, key=lambda other: (-shared_bands[other], other))[:_MAX_COMPARED]
        own = shingles(words_of_row(row))
        alike = (other for other in candidates if _jaccard(shingles_of(other), own) >= RESEMBLANCE)
        match = next(alike, None) if row >= first else None
        if match is not None:
            parents[row] = match
            continue
        for bucket in row_buckets:
            members = kept.setdefault(bucket, [])
            if len(members) < _MAX_BUCKET:
                members.append(row)
    return parents[groups]


def _number_buckets(bands: Hashes) -> Ints:
    """The bucket of each band of each row, equal where the band's hashes are; -1 if no other row shares it. [rows, BANDS]"""
    buckets = np.full(bands.shape, -1, np.int64)
    start = 0
    for band in range(BANDS):
        _, numbers, counts = np.unique(bands[:, band], return_inverse=True, return_counts=True)
        shared = counts[numbers] > 1
        buckets[shared, band] = numbers[shared] + start
        start += len(counts)
    return buckets
