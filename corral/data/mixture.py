"""Which rows are used and on which side: decided by hashes of the seed and a row's content, by nothing else.

So a row never changes side, whatever else is in the mix; a smaller cap keeps a part of what a larger one keeps; and the
order of rows does not depend on the order of files. This module sees keys only: not rows, formats or tokens.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Literal, TypeAlias

from corral.recipe import Split

Side: TypeAlias = Literal["train", "validation", "test"]
SIDES: tuple[Side, ...] = ("train", "validation", "test")


def rank(key: str, seed: int, purpose: str) -> float:
    """A number in [0, 1), uniform over keys and independent between purposes and seeds."""
    digest = hashlib.sha256(f"{seed}\n{purpose}\n{key}".encode()).digest()
    # 53 bits: exactly what a float holds, so that the largest is still below 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def side_of(key: str, seed: int, split: Split) -> Side:
    """The side of the row with this key. Changing the share of one held-out side leaves the other as it is."""
    place = rank(key, seed, "split")
    if place < split.test:
        return "test"
    # Counted from the far end, so that neither share moves the other's rows.
    return "validation" if place >= 1 - split.validation else "train"


def order(keys: Iterable[str], seed: int) -> list[int]:
    """Places of the keys in the order in which their rows are to stand: shuffled, the same for any order given."""
    ranked = [(rank(key, seed, "order"), key, place) for place, key in enumerate(keys)]
    return [place for _, _, place in sorted(ranked)]


@dataclass(frozen=True, slots=True)
class Selection:
    """What became of a source's readable rows, by row number.

    Args:
        chosen: the key of each row that is used.
        duplicates: rows whose content another row has that stands before them, or in an earlier source.
        not_sampled: rows beyond the source's cap.
    """

    chosen: dict[int, str]
    duplicates: list[int]
    not_sampled: list[int]


def select(rows: Iterable[tuple[int, str]], seed: int, *, cap: int | None, taken: Set[str]) -> Selection:
    """Choose among the rows of one source.

    Args:
        rows: (number, key) of each row, in order.
        seed: with the key, decides which rows a cap keeps.
        cap: keep at most so many; those that a cap of n keeps are among those that a cap of m > n keeps.
        taken: keys that earlier sources use; a copy of them does not count towards the cap.
    """
    first: dict[str, int] = {}
    duplicates: list[int] = []
    for number, key in rows:
        if key in taken or key in first:
            duplicates.append(number)
        else:
            first[key] = number
    if cap is None or len(first) <= cap:
        return Selection({number: key for key, number in first.items()}, duplicates, [])
    kept = set(heapq.nsmallest(cap, first, key=lambda key: (rank(key, seed, "sample"), key)))
    chosen = {number: key for key, number in first.items() if key in kept}
    return Selection(chosen, duplicates, [number for key, number in first.items() if key not in kept])


def share_for_one(keys: Iterable[str], seed: int, side: Literal["validation", "test"]) -> float:
    """The smallest share, in steps of 0.01, with which at least one of these rows falls on a side."""
    places = [rank(key, seed, "split") for key in keys]
    nearest = min(places, default=1.0) if side == "test" else 1 - max(places, default=0.0)
    # The row's place itself is outside a half-open share: the next step holds it.
    return (int(nearest * 100) + 1) / 100
