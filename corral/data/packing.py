"""Lengths → packs: which items share a forward pass. Knows nothing about what the items are."""

from __future__ import annotations

from collections.abc import Sequence


def packs(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Few packs of at most `limit` together, by first-fit decreasing: never more than 11/9 of the fewest possible + 6/9
    (Dósa 2007, "The tight bound of first fit decreasing bin-packing algorithm").

    Every item is in exactly one pack; an item longer than `limit` has a pack for itself. Equal input gives equal packs.

    Args:
        lengths: tokens of each item.
        limit: most tokens of a pack.

    Returns: packs of places in `lengths`, ascending within a pack.
    """
    room: list[int] = []
    found: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((p for p, left in enumerate(room) if lengths[item] <= left), None)
        if place is None:
            room.append(limit)
            found.append([])
            place = len(room) - 1
        room[place] -= lengths[item]
        found[place].append(item)
    return [sorted(pack) for pack in found]
