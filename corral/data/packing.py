"""Decides which sequences share a forward pass, from their lengths."""

from __future__ import annotations

from collections.abc import Sequence


def pack_sequences(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Pack sequences into few packs of at most `limit` tokens, by first-fit decreasing: never more than 11/9 of the fewest
    possible + 6/9 (Dósa 2007, "The tight bound of first fit decreasing bin-packing algorithm"). Takes O(n log n) time.

    Every sequence is in exactly one pack; one longer than `limit` has a pack to itself. Equal input gives equal packs.

    Args:
        lengths: tokens of each sequence.
        limit: maximum tokens of a pack.

    Returns: packs of indices into `lengths`, ascending within a pack.
    """
    free = _FreeTokens(len(lengths), limit)
    packs: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # The longest come first, so what fits nowhere opens the next pack, the first that is still empty.
        number = free.first_with(lengths[item]) if lengths[item] <= limit else len(packs)
        if number == len(packs):
            packs.append([])
        free.take(number, lengths[item])
        packs[number].append(item)
    return [sorted(pack) for pack in packs]


class _FreeTokens:
    """The tokens left in each of `count` packs, as a binary tree of maxima: the first pack with enough is found in
    log₂(count) steps, where a search along the packs would make packing quadratic."""

    def __init__(self, count: int, limit: int) -> None:
        self._leaves = 1 << max(0, count - 1).bit_length()
        self._maxima = [limit] * (2 * self._leaves)

    def first_with(self, length: int) -> int:
        """The first pack with `length` tokens left. There always is one: an empty pack has room for any."""
        node = 1
        while node < self._leaves:
            node *= 2
            if self._maxima[node] < length:
                node += 1
        return node - self._leaves

    def take(self, pack: int, length: int) -> None:
        node = self._leaves + pack
        self._maxima[node] -= length
        while node := node // 2:
            self._maxima[node] = max(self._maxima[2 * node], self._maxima[2 * node + 1])
