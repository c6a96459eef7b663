from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.data.mixture import (
    SIDES,
    Keys,
    choose,
    equal_groups,
    proportional,
    rank,
    ranks,
    share_for_one,
    sides,
)
from corral.recipe import Split

HEX = [f"{i:064x}" for i in range(5000)]
NUMBERS = st.lists(st.integers(0, 60), max_size=80)


def keys_of(numbers: list[int]) -> Keys:
    digests = b"".join(hashlib.sha256(str(n).encode()).digest() for n in numbers)
    return np.frombuffer(digests, np.uint8).reshape(-1, 32)


KEYS = keys_of(list(range(5000)))


def chosen_of(numbers: list[int], seed: int, cap: int | None) -> tuple[set[int], list[bool], list[bool]]:
    """(numbers chosen, chosen flags, copy flags) from one source."""
    keys = keys_of(numbers)
    groups = equal_groups(keys)
    chosen, copies = choose(keys, groups, np.zeros(len(keys), bool), seed, cap)
    return {n for n, c in zip(numbers, chosen, strict=True) if c}, chosen.tolist(), copies.tolist()


def side_names(keys: list[Keys], split: Split, seed: int = 0) -> list[list[str]]:
    return [[SIDES[s] for s in found] for found in sides(keys, seed, split)]


def test_ranks_are_uniform_and_independent_between_purposes_and_seeds() -> None:
    first = [rank(key, 1, "split") for key in HEX]
    assert all(0 <= r < 1 for r in first)
    for tenth in range(10):
        assert 400 < sum(tenth <= 10 * r < tenth + 1 for r in first) < 600
    for other in ([rank(key, 2, "split") for key in HEX], [rank(key, 1, "order") for key in HEX]):
        assert 1100 < sum((a < 0.5) == (b < 0.5) and a < 0.5 for a, b in zip(first, other, strict=True)) < 1400
    assert ranks(KEYS[:5], 1, "split").tolist() == [rank(bytes(k).hex(), 1, "split") for k in KEYS[:5]]


@given(NUMBERS)
def test_a_group_is_named_by_the_first_of_its_equal_keys(numbers: list[int]) -> None:
    assert equal_groups(keys_of(numbers)).tolist() == [numbers.index(n) for n in numbers]


@given(NUMBERS, st.integers(1, 30), st.integers(0, 30), st.integers(0, 3))
def test_a_smaller_cap_keeps_a_part_of_what_a_larger_one_keeps(
    numbers: list[int], small: int, more: int, seed: int
) -> None:
    few, few_flags, few_copies = chosen_of(numbers, seed, small)
    many, many_flags, many_copies = chosen_of(numbers, seed, small + more)
    everything, _, copies = chosen_of(numbers, seed, None)
    assert few <= many <= everything == set(numbers)
    assert len(few) == sum(few_flags) == min(small, len(set(numbers)))
    assert few_copies == many_copies == copies
    assert all(later or not earlier for earlier, later in zip(few_flags, many_flags, strict=True))


@given(NUMBERS, st.integers(1, 10), st.randoms())
def test_what_a_cap_keeps_does_not_depend_on_the_order_of_rows(numbers: list[int], cap: int, random: object) -> None:
    shuffled = list(numbers)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert chosen_of(numbers, 0, cap)[0] == chosen_of(shuffled, 0, cap)[0]


def test_of_equal_rows_the_first_is_kept_and_copies_of_earlier_sources_do_not_use_up_the_cap() -> None:
    first, second = [7], [7, 8, 7, 9, 9]
    keys = keys_of(first + second)
    groups = equal_groups(keys)
    taken = np.zeros(len(keys), bool)
    choose(keys[:1], groups[:1], taken, 0, None)
    chosen, copies = choose(keys[1:], groups[1:], taken, 0, 2)
    assert chosen.tolist() == [False, True, False, True, False]
    assert copies.tolist() == [True, False, True, False, True]


def test_shares_have_their_size_in_each_source() -> None:
    found = side_names([KEYS[:2500], KEYS[2500:]], Split(validation=0.1, test=0.2))
    for names in found:
        assert 190 < names.count("validation") < 310
        assert 420 < names.count("test") < 580


def test_no_share_means_no_rows() -> None:
    assert set(side_names([KEYS], Split(validation=0, test=0))[0]) == {"train"}


def test_changing_the_share_of_one_held_out_side_leaves_the_other_as_it_is() -> None:
    base = side_names([KEYS], Split(validation=0.1, test=0.1))[0]
    more_test = side_names([KEYS], Split(validation=0.1, test=0.3))[0]
    more_validation = side_names([KEYS], Split(validation=0.3, test=0.1))[0]
    for one, tested, validated in zip(base, more_test, more_validation, strict=True):
        assert (one == "validation") == (tested == "validation")
        assert (one == "test") == (validated == "test")
        assert one != "test" or tested == "test"
        assert one != "validation" or validated == "validation"


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 30), st.integers(1, 30))
def test_numbers_are_taken_exactly_and_from_all_sources_in_proportion(
    counts: list[int], validation: int, test: int
) -> None:
    starts = np.cumsum([0, *counts])
    keys = [KEYS[a:b] for a, b in pairwise(starts)]
    names = side_names(keys, Split(validation=validation, test=test))
    whole = sum(counts)
    assert sum(n.count("test") for n in names) == min(test, whole)
    if validation + test + len(counts) * 2 <= whole:
        assert sum(n.count("validation") for n in names) == validation
    for count, found in zip(counts, names, strict=True):
        assert abs(found.count("test") - min(test, whole) * count / (whole or 1)) < 1


def test_a_number_and_a_share_go_together_and_a_larger_number_holds_the_smaller() -> None:
    few = side_names([KEYS], Split(validation=0.1, test=100))[0]
    many = side_names([KEYS], Split(validation=0.1, test=300))[0]
    assert (few.count("test"), many.count("test")) == (100, 300)
    assert all(later == "test" for earlier, later in zip(few, many, strict=True) if earlier == "test")
    assert 400 < few.count("validation") < 600


@given(NUMBERS, NUMBERS, st.integers(1, 20))
def test_rows_of_equal_content_are_never_on_two_sides(first: list[int], second: list[int], test: int) -> None:
    numbers = [first, second]
    names = side_names([keys_of(n) for n in numbers], Split(validation=0.2, test=test))
    side: dict[int, str] = {}
    for source, found in zip(numbers, names, strict=True):
        for number, name in zip(source, found, strict=True):
            assert side.setdefault(number, name) == name


@given(st.integers(0, 200), st.lists(st.integers(0, 50), max_size=6))
def test_proportional_parts_add_up_and_are_never_more_than_there_are(number: int, counts: list[int]) -> None:
    parts = proportional(number, counts)
    assert sum(parts) == min(number, sum(counts))
    assert all(0 <= part <= count for part, count in zip(parts, counts, strict=True))


@pytest.mark.parametrize("side", ["validation", "test"])
@given(numbers=st.lists(st.integers(0, 4999), min_size=1, max_size=20), seed=st.integers(0, 5))
def test_the_share_for_one_row_is_enough_and_a_hundredth_less_is_not(numbers: list[int], seed: int, side: str) -> None:
    keys = KEYS[numbers]
    least = share_for_one(ranks(keys, seed, "split"), side)  # type: ignore[arg-type]
    for share, enough in ((least, True), (round(least - 0.01, 2), False)):
        if share < 1:
            split = Split(**{"validation": 0, "test": 0} | {side: share})
            assert (side in side_names([keys], split, seed)[0]) is enough
