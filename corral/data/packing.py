"""Lengths → packs: which items share a forward pass. Knows nothing about what the items are."""

from __future__ import annotations

from collections.abc import Sequence


def pack_sequences(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Few packs of at most `limit` together, by first-fit decreasing: never more than 11/9 of the fewest possible + 6/9
    (Dósa 2007, "The tight bound of first fit decreasing bin-packing algorithm"). Takes O(n log n) time.

    Every item is in exactly one pack; an item longer than `limit` has a pack for itself. Equal input gives equal packs.

    Args:
        lengths: tokens of each item.
        limit: most tokens of a pack.

    Returns: packs of places in `lengths`, ascending within a pack.
    """
    room = _Room(len(lengths), limit)
    found: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # What fits nowhere opens the next pack: the longest come first, so no pack before it has all its room.
        place = room.first(lengths[item]) if lengths[item] <= limit else len(found)
        if place == len(found):
            found.append([])
        room.take(place, lengths[item])
        found[place].append(item)
    return [sorted(pack) for pack in found]


class _Room:
    """The room left in each of `count` packs, as a binary tree of maxima: the first pack with enough is found in
    log₂(count) steps, where a walk along the packs would make packing quadratic."""

    def __init__(self, count: int, limit: int) -> None:
        self._leaves = 1 << max(0, count - 1).bit_length()
        self._most = [limit] * (2 * self._leaves)

    def first(self, length: int) -> int:
        """The first pack with so much room. There is one: packs that were not opened yet have all of it."""
        node = 1
        while node < self._leaves:
            node *= 2
            if self._most[node] < length:
                node += 1
        return node - self._leaves

    def take(self, pack: int, length: int) -> None:
        node = self._leaves + pack
        self._most[node] -= length
        while node := node // 2:
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])
