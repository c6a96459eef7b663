"""Decides which rows are used and on which side, by hashes of the seed and a row's content alone.

So what a cap, a weight or a split selects from a source is a subset of any larger selection, added or removed rows affect
only rows at its border, and neither the order of files nor the number of workers matters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from math import floor
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Side: TypeAlias = Literal["train", "validation", "test"]
SIDES: tuple[Side, ...] = ("train", "validation", "test")
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]
Keys: TypeAlias = NDArray[np.uint8]
"""[rows, 32] sha256 of each row's content."""

_TRAIN, _VALIDATION, _TEST = range(3)


def rank(key: str, seed: int, purpose: str) -> float:
    """A number in [0, 1) made by hashing: uniform over keys, independent between purposes and seeds."""
    digest = hashlib.sha256(f"{seed}\n{purpose}\n{key}".encode()).digest()
    # 53 bits are what a float holds exactly, so the largest is still below 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def ranks(keys: Keys, seed: int, purpose: str) -> NDArray[np.float64]:
    """`rank` of each key. [rows]"""
    return np.fromiter((rank(bytes(key).hex(), seed, purpose) for key in keys), np.float64, len(keys))


def equal_groups(keys: Keys) -> Ints:
    """For each key the index of the first key that equals it. [rows]"""
    columns = np.ascontiguousarray(keys).view(">u8").reshape(len(keys), 4)
    # The sort is stable, so each run of equal keys begins with the first of them.
    by_key = np.lexsort(tuple(columns[:, i] for i in range(4)))
    ordered = columns[by_key]
    starts_run = np.ones(len(keys), bool)
    starts_run[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    firsts = by_key[starts_run]
    groups = np.empty(len(keys), np.int64)
    groups[by_key] = firsts[np.cumsum(starts_run) - 1] if len(keys) else firsts
    return groups


def choose_distinct(keys: Keys, groups: Ints, taken: Bools, seed: int, cap: int | None) -> tuple[Bools, Bools]:
    """Choose one row of each group from one source, up to a cap, and mark the groups as taken.

    Args:
        keys: of each row.
        groups: the group of each row, an index into `taken`; rows of a group are copies of each other.
        taken: whether an earlier source uses the group; such copies do not count towards the cap. Changed in place.
        seed: with the key, decides which rows a cap keeps.
        cap: the maximum to keep; the rows that a cap of n keeps are among those that a larger cap keeps.

    Returns: (rows that are used, rows that are copies of a row before them or in an earlier source), [rows] each; the
        others are beyond the cap.
    """
    first = np.zeros(len(keys), bool)
    first[np.unique(groups, return_index=True)[1]] = True
    chosen = first & ~taken[groups]
    copies = ~chosen
    if cap is not None and chosen.sum() > cap:
        candidates = chosen.nonzero()[0]
        chosen = np.zeros(len(keys), bool)
        chosen[candidates[sample(keys[candidates], cap, seed)]] = True
    taken[groups[chosen]] = True
    return chosen, copies


def sample(keys: Keys, number: int, seed: int, sizes: Ints | None = None) -> Bools:
    """Whether each row is among those of lowest rank that make up `number`, which any larger number includes. [rows]

    Args:
        keys: of each row.
        number: of rows or, with `sizes`, of examples.
        seed: decides the ranks, with the keys.
        sizes: examples of each row; the row that crosses the number is taken.
    """
    kept = np.zeros(len(keys), bool)
    order = np.argsort(ranks(keys, seed, "sample"), kind="stable")
    before = np.arange(len(keys)) if sizes is None else np.cumsum(sizes[order]) - sizes[order]
    kept[order[before < number]] = True
    return kept


def weighted_row_counts(rows: Sequence[int], weights: Sequence[float], repeats: Sequence[int]) -> list[int]:
    """How many rows to take of each source for the largest mixture in the proportions of the weights.

    Args:
        rows: usable rows of each source, or examples where rows are split.
        weights: of each source, above 0; only their proportions matter.
        repeats: how often each used row of a source occurs in the mixture.

    Returns: rows of each source, rounded; all of them for the source that is exhausted first.
    """
    # As written, not as a float holds it: 0.1 is exactly a tenth.
    exact = [Fraction(str(weight)) for weight in weights]
    size = min(n * repeat / weight for n, weight, repeat in zip(rows, exact, repeats, strict=True))
    half = Fraction(1, 2)
    return [floor(size * weight / repeat + half) for weight, repeat in zip(exact, repeats, strict=True)]


def split_sides(
    sources: Sequence[Keys], seed: int, *, validation: float, test: float, trained: Sequence[Keys] = ()
) -> list[NDArray[np.int8]]:
    """The side of each row of each source, as an index into `SIDES`.

    A held-out side is a share of all rows, rounded, or a number of them, divided over the sources in proportion to their
    rows (largest remainders; the sources' content decides between equal ones, not their order). From each source the test
    side takes the rows of lowest rank and the validation side those of highest, so that neither moves the other's rows. Rows
    of equal content all go to one side, test before validation before train, even if that side then has too many; but to the
    training side if they equal a row of `trained`, which is on it.
    """
    if not sources:
        return []
    by_content = sorted(range(len(sources)), key=lambda n: _hash_keys(sources[n]))
    counts = [len(sources[n]) for n in by_content]
    test_rows = divide_proportionally(row_count(test, sum(counts)), counts)
    remaining = [count - taken for count, taken in zip(counts, test_rows, strict=True)]
    validation_rows = divide_proportionally(row_count(validation, sum(counts)), counts, remaining)
    sides = [np.full(len(keys), _TRAIN, np.int8) for keys in sources]
    for number, lowest, highest in zip(by_content, test_rows, validation_rows, strict=True):
        side, ascending = sides[number], np.argsort(ranks(sources[number], seed, "split"), kind="stable")
        side[ascending[:lowest]] = _TEST
        side[ascending[len(ascending) - highest :]] = _VALIDATION
    _put_copies_together(sources, sides, trained)
    return sides


def _hash_keys(keys: Keys) -> bytes:
    """sha256 of the keys, whatever their order."""
    return hashlib.sha256(b"".join(sorted(map(bytes, keys)))).digest()


def row_count(part: float, whole: int) -> int:
    """The rows that `part` stands for: a share (below 1) of `whole`, rounded half up, or a number of rows."""
    return int(part) if part >= 1 else floor(Fraction(str(part)) * whole + Fraction(1, 2))


def _put_copies_together(sources: Sequence[Keys], sides: Sequence[NDArray[np.int8]], trained: Sequence[Keys]) -> None:
    """Move rows of equal content to the side of theirs that is furthest from training, or to training if they equal a row
    of `trained`. Changes `sides` in place."""
    start = sum(map(len, trained))
    groups = equal_groups(np.concatenate([*trained, *sources]))
    furthest = np.zeros(len(groups), np.int8)
    np.maximum.at(furthest, groups[start:], np.concatenate(sides))
    furthest[:start] = _TRAIN
    for side in sides:
        side[:] = furthest[groups[start : start + len(side)]]
        start += len(side)


def divide_proportionally(number: int, counts: Sequence[int], limits: Sequence[int] | None = None) -> list[int]:
    """`number` divided in proportion to `counts`, by largest remainders. No part exceeds its limit, by default its count;
    what does not fit goes to the others."""
    limits = counts if limits is None else limits
    whole, number = sum(counts), min(number, sum(limits))
    if not whole:
        return [0] * len(counts)
    shares = [divmod(number * count, whole) for count in counts]
    parts = [min(share, limit) for (share, _), limit in zip(shares, limits, strict=True)]
    by_remainder = sorted(range(len(counts)), key=lambda i: (-shares[i][1], i))
    while (remaining := number - sum(parts)) > 0:
        for i in [i for i in by_remainder if parts[i] < limits[i]][:remaining]:
            parts[i] += 1
    return parts


def smallest_share(rows: int) -> float:
    """The smallest share, in steps of 0.01, that rounds to at least one of so many rows."""
    return -(-50 // rows) / 100
