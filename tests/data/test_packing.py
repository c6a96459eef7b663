from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from corral.data.packing import pack_sequences

LENGTHS = st.lists(st.integers(0, 300), max_size=60)


@given(LENGTHS, st.integers(1, 400))
def test_every_item_is_in_exactly_one_pack(lengths: list[int], limit: int) -> None:
    assert sorted(item for pack in pack_sequences(lengths, limit) for item in pack) == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 400))
def test_no_pack_is_over_the_limit_unless_it_is_a_single_item(lengths: list[int], limit: int) -> None:
    for pack in pack_sequences(lengths, limit):
        assert pack
        assert pack == sorted(pack)
        assert sum(lengths[i] for i in pack) <= limit or len([i for i in pack if lengths[i]]) == 1


def first_fit_decreasing(lengths: list[int], limit: int) -> list[list[int]]:
    """The definition, in quadratic time."""
    room: list[int] = []
    found: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        pack = next((p for p, left in enumerate(room) if lengths[item] <= left), len(room))
        if pack == len(room):
            room.append(limit)
            found.append([])
        room[pack] -= lengths[item]
        found[pack].append(item)
    return [sorted(pack) for pack in found]


@given(LENGTHS, st.integers(1, 400))
def test_packs_are_those_of_first_fit_decreasing(lengths: list[int], limit: int) -> None:
    assert pack_sequences(lengths, limit) == first_fit_decreasing(lengths, limit)


@given(LENGTHS, st.integers(300, 400))
def test_there_are_few_packs(lengths: list[int], limit: int) -> None:
    fewest = -(-sum(lengths) // limit)
    assert len(pack_sequences(lengths, limit)) <= max(2 * fewest, 1 if lengths else 0)


def test_first_fit_decreasing_fills_what_a_plain_first_fit_leaves() -> None:
    assert pack_sequences([2, 5, 4, 7, 1, 3, 8], 10) == [[0, 6], [3, 5], [1, 2, 4]]


def test_an_overlong_item_has_its_own_pack_and_no_items_give_no_packs() -> None:
    assert pack_sequences([3, 20, 3], 10) == [[1], [0, 2]]
    assert pack_sequences([], 10) == []
