"""Which rows are used and on which side: decided by hashes of the seed and a row's content, by nothing else.

So what is taken of a source, be it by a cap, a weight or a split, is held in any larger part; rows that come or go move only
rows at its border; and neither the order of files nor the number of workers matters. This module sees keys only: not rows,
formats or tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from math import floor
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from corral.recipe import Split

Side: TypeAlias = Literal["train", "validation", "test"]
SIDES: tuple[Side, ...] = ("train", "validation", "test")
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]
Keys: TypeAlias = NDArray[np.uint8]
"""[rows, 32] sha256 of each row's content."""

_TRAIN, _VALIDATION, _TEST = range(3)


def rank(key: str, seed: int, purpose: str) -> float:
    """A number in [0, 1), uniform over keys and independent between purposes and seeds."""
    digest = hashlib.sha256(f"{seed}\n{purpose}\n{key}".encode()).digest()
    # 53 bits: exactly what a float holds, so that the largest is still below 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def ranks(keys: Keys, seed: int, purpose: str) -> NDArray[np.float64]:
    """`rank` of each key. [rows]"""
    return np.fromiter((rank(bytes(key).hex(), seed, purpose) for key in keys), np.float64, len(keys))


def equal_groups(keys: Keys) -> Ints:
    """For each key the place of the first key that equals it. [rows]"""
    columns = np.ascontiguousarray(keys).view(">u8").reshape(len(keys), 4)
    # The sort is stable, so the first of each run of equal keys is the first of them all.
    by_key = np.lexsort(tuple(columns[:, i] for i in range(4)))
    ordered = columns[by_key]
    begins = np.ones(len(keys), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    firsts = by_key[begins]
    groups = np.empty(len(keys), np.int64)
    groups[by_key] = firsts[np.cumsum(begins) - 1] if len(keys) else firsts
    return groups


def choose_distinct(keys: Keys, groups: Ints, taken: Bools, seed: int, cap: int | None) -> tuple[Bools, Bools]:
    """Choose among the rows of one source, and mark their groups as taken.

    Args:
        keys: of each row.
        groups: which rows count as copies of each other: a number for each row, an index into `taken`.
        taken: whether an earlier source uses the group; its copies do not count towards the cap. Changed here.
        seed: with the key, decides which rows a cap keeps.
        cap: keep at most so many; those that a cap of n keeps are among those that a cap of m > n keeps.

    Returns: (rows that are used, rows that are copies of a row before them or in an earlier source), [rows] each; the
        others are beyond the cap.
    """
    first = np.zeros(len(keys), bool)
    first[np.unique(groups, return_index=True)[1]] = True
    chosen = first & ~taken[groups]
    copies = ~chosen
    if cap is not None and chosen.sum() > cap:
        places = chosen.nonzero()[0]
        chosen = np.zeros(len(keys), bool)
        chosen[places[sample(keys[places], cap, seed)]] = True
    taken[groups[chosen]] = True
    return chosen, copies


def sample(keys: Keys, number: int, seed: int) -> Bools:
    """The `number` rows of lowest rank: each is among those of any larger number. [rows]"""
    kept = np.zeros(len(keys), bool)
    kept[np.argsort(ranks(keys, seed, "sample"), kind="stable")[:number]] = True
    return kept


def weighted_row_counts(rows: Sequence[int], weights: Sequence[float], repeats: Sequence[int]) -> list[int]:
    """How many rows of each source make the largest mixture whose parts are as the weights.

    Args:
        rows: of each source that could be used.
        weights: of each source, above 0; only their proportions matter.
        repeats: how often each used row of a source stands in the mixture.

    Returns: rows of each source, to the nearest; all of them for the source that is exhausted first.
    """
    # As written, not as a float holds them: 0.1 is a tenth.
    exact = [Fraction(str(weight)) for weight in weights]
    size = min(n * repeat / weight for n, weight, repeat in zip(rows, exact, repeats, strict=True))
    half = Fraction(1, 2)
    return [floor(size * weight / repeat + half) for weight, repeat in zip(exact, repeats, strict=True)]


def split_sides(sources: Sequence[Keys], seed: int, split: Split) -> list[NDArray[np.int8]]:
    """The side of each row of each source, as an index into `SIDES`.

    A share of all rows, to the nearest row, or a number of them is divided over the sources in proportion to their rows
    (largest remainders). Of each source the test side takes the rows of lowest rank, the validation side those of highest,
    so that neither moves the other's rows. Rows of equal content are all on one side, the one furthest from training, even
    if it then has more rows than it should.
    """
    counts = [len(keys) for keys in sources]
    test = divide_proportionally(row_count(split.test, sum(counts)), counts)
    room = [count - taken for count, taken in zip(counts, test, strict=True)]
    validation = divide_proportionally(row_count(split.validation, sum(counts)), counts, room)
    found = [np.full(count, _TRAIN, np.int8) for count in counts]
    for keys, side, lowest, highest in zip(sources, found, test, validation, strict=True):
        ascending = np.argsort(ranks(keys, seed, "split"), kind="stable")
        side[ascending[:lowest]] = _TEST
        side[ascending[len(ascending) - highest :]] = _VALIDATION
    _join_copies(sources, found)
    return found


def row_count(part: float, whole: int) -> int:
    """Rows that a share (below 1) of `whole` rows is, to the nearest, a half upwards; a number is itself."""
    return int(part) if part >= 1 else floor(Fraction(str(part)) * whole + Fraction(1, 2))


def _join_copies(sources: Sequence[Keys], found: Sequence[NDArray[np.int8]]) -> None:
    """Rows of equal content all go where the one goes that is furthest from training."""
    everything = np.concatenate(found)
    groups = equal_groups(np.concatenate(sources))
    furthest = np.zeros(len(everything), np.int8)
    np.maximum.at(furthest, groups, everything)
    at = 0
    for side in found:
        side[:] = furthest[groups[at : at + len(side)]]
        at += len(side)


def divide_proportionally(number: int, counts: Sequence[int], room: Sequence[int] | None = None) -> list[int]:
    """`number` divided in proportion to `counts`, by largest remainders; nowhere more than there is `room`, by default
    `counts`: what has none in one place goes to the others."""
    room = counts if room is None else room
    whole, number = sum(counts), min(number, sum(room))
    if not whole:
        return [0] * len(counts)
    shares = [divmod(number * count, whole) for count in counts]
    parts = [min(share, free) for (share, _), free in zip(shares, room, strict=True)]
    by_remainder = sorted(range(len(counts)), key=lambda i: (-shares[i][1], i))
    while (left := number - sum(parts)) > 0:
        for i in [i for i in by_remainder if parts[i] < room[i]][:left]:
            parts[i] += 1
    return parts


def smallest_share(rows: int) -> float:
    """The smallest share, in steps of 0.01, that is at least one of so many rows."""
    return -(-50 // rows) / 100
