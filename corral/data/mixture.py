"""Which rows are used and on which side: decided by hashes of the seed and a row's content, by nothing else.

So a row split off by a share never changes side, whatever else is in the mix; a smaller cap keeps a part of what a larger
one keeps; and neither the order of files nor the number of workers matters. This module sees keys only: not rows, formats
or tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

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


def choose(keys: Keys, groups: Ints, taken: Bools, seed: int, cap: int | None) -> tuple[Bools, Bools]:
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
        kept = np.argsort(ranks(keys[places], seed, "sample"), kind="stable")[:cap]
        chosen = np.zeros(len(keys), bool)
        chosen[places[kept]] = True
    taken[groups[chosen]] = True
    return chosen, copies


def sides(sources: Sequence[Keys], seed: int, split: Split) -> list[NDArray[np.int8]]:
    """The side of each row of each source, as an index into `SIDES`.

    A share takes the rows whose rank is below it (test) or as far from the other end (validation), so that neither moves
    the other's rows. A number is divided over the sources in proportion to their rows (largest remainders), and takes the
    rows of lowest or highest rank in each. Rows of equal content are always on one side, even if a number is then exceeded.
    """
    places = [ranks(keys, seed, "split") for keys in sources]
    found = [np.zeros(len(p), np.int8) for p in places]
    counts = [len(p) for p in places]
    quotas = {
        side: proportional(int(n), counts) if n >= 1 else None
        for side, n in ((_TEST, split.test), (_VALIDATION, split.validation))
    }
    for number, (place, side) in enumerate(zip(places, found, strict=True)):
        ascending = np.argsort(place, kind="stable")
        test, validation = quotas[_TEST], quotas[_VALIDATION]
        if validation is None:
            side[place >= 1 - split.validation] = _VALIDATION
        else:
            side[ascending[len(ascending) - validation[number] :]] = _VALIDATION
        side[place < split.test if test is None else ascending[: test[number]]] = _TEST
    if any(quota is not None for quota in quotas.values()):
        _join_copies(sources, found)
    return found


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


def proportional(number: int, counts: Sequence[int]) -> list[int]:
    """`number` divided in proportion to `counts`, by largest remainders; never more than there are."""
    whole = sum(counts)
    number = min(number, whole)
    if not whole:
        return [0] * len(counts)
    shares = [divmod(number * count, whole) for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda i: (-shares[i][1], i))
    extra = set(by_remainder[: number - sum(share for share, _ in shares)])
    return [share + (i in extra) for i, (share, _) in enumerate(shares)]


def share_for_one(split_ranks: Iterable[float] | NDArray[Any], side: Literal["validation", "test"]) -> float:
    """The smallest share, in steps of 0.01, with which at least one of the rows of these split ranks falls on a side."""
    places = [float(place) for place in split_ranks]
    nearest = min(places, default=1.0) if side == "test" else 1 - max(places, default=0.0)
    # The row's place itself is outside a half-open share: the next step holds it.
    return (int(nearest * 100) + 1) / 100
