from __future__ import annotations

import hashlib
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.data.mixture import (
    SIDES,
    Keys,
    choose_distinct,
    divide_proportionally,
    equal_groups,
    rank,
    ranks,
    row_count,
    sample,
    smallest_share,
    split_sides,
    weighted_row_counts,
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
    chosen, copies = choose_distinct(keys, groups, np.zeros(len(keys), bool), seed, cap)
    return {n for n, c in zip(numbers, chosen, strict=True) if c}, chosen.tolist(), copies.tolist()


def side_names(keys: list[Keys], split: Split, seed: int = 0) -> list[list[str]]:
    return [
        [SIDES[s] for s in found]
        for found in split_sides(keys, seed, validation=split.validation or 0, test=split.test or 0)
    ]


def test_ranks_are_uniform_and_independent_between_purposes_and_seeds() -> None:
    first = [rank(key, 1, "split") for key in HEX]
    assert all(0 <= r < 1 for r in first)
    for tenth in range(10):
        assert 400 < sum(tenth <= 10 * r < tenth + 1 for r in first) < 600
    for other in ([rank(key, 2, "split") for key in HEX], [rank(key, 1, "order") for key in HEX]):
        assert 1100 < sum((a < 0.5) == (b < 0.5) and a < 0.5 for a, b in zip(first, other, strict=True)) < 1400
    assert ranks(KEYS[:5], 1, "split").tolist() == [rank(bytes(k).hex(), 1, "split") for k in KEYS[:5]]


@given(NUMBERS, NUMBERS, st.integers(0, 3))
def test_rows_that_equal_one_to_train_on_are_trained_on(numbers: list[int], trained: list[int], seed: int) -> None:
    keys, fixed = keys_of(numbers), keys_of(trained)
    (free,) = split_sides([keys], seed, validation=0.3, test=0.3)
    (sides,) = split_sides([keys], seed, validation=0.3, test=0.3, trained=[fixed])
    assert sides.tolist() == [0 if n in trained else side for n, side in zip(numbers, free.tolist(), strict=True)]


@given(NUMBERS)
def test_equal_keys_have_the_index_of_the_first_of_them(numbers: list[int]) -> None:
    assert equal_groups(keys_of(numbers)).tolist() == [numbers.index(n) for n in numbers]


@given(NUMBERS, st.integers(1, 30), st.integers(0, 30), st.integers(0, 3))
def test_a_smaller_cap_keeps_a_subset_of_what_a_larger_one_keeps(
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
def test_what_a_cap_keeps_does_not_depend_on_the_order_of_rows(numbers: list[int], cap: int, random: Random) -> None:
    shuffled = list(numbers)
    random.shuffle(shuffled)
    assert chosen_of(numbers, 0, cap)[0] == chosen_of(shuffled, 0, cap)[0]


def test_the_first_of_equal_rows_is_kept_and_copies_of_earlier_sources_do_not_count_towards_the_cap() -> None:
    first, second = [7], [7, 8, 7, 9, 9]
    keys = keys_of(first + second)
    groups = equal_groups(keys)
    taken = np.zeros(len(keys), bool)
    choose_distinct(keys[:1], groups[:1], taken, 0, None)
    chosen, copies = choose_distinct(keys[1:], groups[1:], taken, 0, 2)
    assert chosen.tolist() == [False, True, False, True, False]
    assert copies.tolist() == [True, False, True, False, True]


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=12),
    st.integers(0, 60).map(lambda n: n / 100),
    st.integers(0, 39).map(lambda n: n / 100),
    st.integers(0, 3),
)
def test_shares_are_exact_to_the_row_overall_and_in_each_source(
    counts: list[int], test: float, validation: float, seed: int
) -> None:
    starts = np.cumsum([0, *counts])
    names = side_names([KEYS[a:b] for a, b in pairwise(starts)], Split(validation=validation, test=test), seed)
    whole = sum(counts)
    for side, share in (("test", test), ("validation", validation)):
        assert abs(sum(found.count(side) for found in names) - share * whole) <= 0.5 + 1e-9
    for count, found in zip(counts, names, strict=True):
        assert abs(found.count("test") - test * count) < 1.5
        # A source of a row or two may be too small for its part.
        assert abs(found.count("validation") - validation * count) < 2.5


def test_a_share_is_taken_as_the_decimal_written_and_rounded_half_up() -> None:
    assert [row_count(share, 50) for share in (0, 0.01, 0.03, 0.29, 0.58, 1, 7)] == [0, 1, 2, 15, 29, 1, 7]
    assert row_count(0.05, 88_031) == 4402


def test_sources_of_one_row_fill_both_held_out_sides() -> None:
    names = side_names([KEYS[i : i + 1] for i in range(10)], Split(validation=0.4, test=0.5))
    assert sorted(name for (name,) in names) == ["test"] * 5 + ["train"] + ["validation"] * 4


@given(st.integers(2, 200), st.integers(1, 60), st.integers(0, 3))
def test_rows_that_are_added_move_only_rows_at_the_border_of_a_side(old: int, new: int, seed: int) -> None:
    split = Split(validation=0.1, test=0.2)
    before = side_names([KEYS[:old]], split, seed)[0]
    after = side_names([KEYS[: old + new]], split, seed)[0]
    rank_of_row = ranks(KEYS[: old + new], seed, "split")
    moved = {(a, b) for a, b in zip(before, after, strict=False) if a != b}
    assert moved <= {("test", "train"), ("train", "test"), ("validation", "train"), ("train", "validation")}
    # The rows of a side are those on its own side of one border.
    for names, here in ((before, rank_of_row[:old]), (after, rank_of_row)):
        outside = max([r for r, name in zip(here, names, strict=True) if name == "test"], default=-1.0)
        assert all(r > outside for r, name in zip(here, names, strict=True) if name != "test")
        inside = min([r for r, name in zip(here, names, strict=True) if name == "validation"], default=2.0)
        assert all(r < inside for r, name in zip(here, names, strict=True) if name != "validation")
    # What leaves a side gives way to as many new rows at most.
    for side in ("test", "validation"):
        left = sum(a == side != b for a, b in zip(before, after, strict=False))
        assert left <= after[old:].count(side)


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
def test_numbers_are_exact_and_in_proportion_to_all_sources(counts: list[int], validation: int, test: int) -> None:
    starts = np.cumsum([0, *counts])
    keys = [KEYS[a:b] for a, b in pairwise(starts)]
    names = side_names(keys, Split(validation=validation, test=test))
    whole = sum(counts)
    assert sum(n.count("test") for n in names) == min(test, whole)
    if validation + test + len(counts) * 2 <= whole:
        assert sum(n.count("validation") for n in names) == validation
    for count, found in zip(counts, names, strict=True):
        assert abs(found.count("test") - min(test, whole) * count / (whole or 1)) < 1


def test_a_number_and_a_share_combine_and_a_larger_number_includes_the_smaller() -> None:
    few = side_names([KEYS], Split(validation=0.1, test=100))[0]
    many = side_names([KEYS], Split(validation=0.1, test=300))[0]
    assert (few.count("test"), many.count("test")) == (100, 300)
    assert all(later == "test" for earlier, later in zip(few, many, strict=True) if earlier == "test")
    assert few.count("validation") == many.count("validation") == 500


@given(NUMBERS, NUMBERS, st.integers(1, 20))
def test_rows_of_equal_content_are_never_on_two_sides(first: list[int], second: list[int], test: int) -> None:
    numbers = [first, second]
    names = side_names([keys_of(n) for n in numbers], Split(validation=0.2, test=test))
    side: dict[int, str] = {}
    for source, found in zip(numbers, names, strict=True):
        for number, name in zip(source, found, strict=True):
            assert side.setdefault(number, name) == name


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    test=st.integers(0, 20),
    random=st.randoms(use_true_random=False),
)
def test_the_order_of_the_sources_moves_no_row(sizes: list[int], test: int, random: object) -> None:
    ends = np.cumsum(sizes)
    sources = [KEYS[end - size : end] for end, size in zip(ends.tolist(), sizes, strict=True)]
    order = list(range(len(sources)))
    random.shuffle(order)  # type: ignore[attr-defined]
    split = Split(validation=0.1, test=test)
    moved = side_names([sources[n] for n in order], split)
    assert moved == [side_names(sources, split)[n] for n in order]


@given(st.integers(0, 200), st.lists(st.integers(0, 50), max_size=6))
def test_proportional_parts_add_up_and_never_exceed_the_counts(number: int, counts: list[int]) -> None:
    parts = divide_proportionally(number, counts)
    assert sum(parts) == min(number, sum(counts))
    assert all(0 <= part <= count for part, count in zip(parts, counts, strict=True))


@given(st.integers(0, 200), st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=6))
def test_what_exceeds_a_limit_goes_to_the_others(number: int, pairs: list[tuple[int, int]]) -> None:
    counts, limits = [a + b for a, b in pairs], [a for a, _ in pairs]
    parts = divide_proportionally(number, counts, limits)
    assert sum(parts) == min(number, sum(limits))
    assert all(0 <= part <= free for part, free in zip(parts, limits, strict=True))


MIXED = st.tuples(st.integers(1, 2000), st.floats(0.001, 1000), st.integers(1, 5))


@given(st.lists(MIXED, min_size=1, max_size=6))
def test_a_mixture_has_the_proportions_of_the_weights_and_exhausts_a_source(
    sources: list[tuple[int, float, int]],
) -> None:
    rows, weights, repeats = (list(values) for values in zip(*sources, strict=True))
    used = weighted_row_counts(rows, weights, repeats)
    assert all(0 <= n <= most for n, most in zip(used, rows, strict=True))
    assert any(n == most for n, most in zip(used, rows, strict=True))
    size = min(n * repeat / weight for n, weight, repeat in sources_of(rows, weights, repeats))
    for n, (_, weight, repeat) in zip(used, sources, strict=True):
        assert n == pytest.approx(size * weight / repeat, abs=0.5 + 1e-6)


def sources_of(rows: list[int], weights: list[float], repeats: list[int]) -> list[tuple[int, float, int]]:
    return list(zip(rows, weights, repeats, strict=True))


def test_mixtures_by_hand() -> None:
    assert weighted_row_counts([70, 30], [0.7, 0.3], [1, 1]) == [70, 30]
    assert weighted_row_counts([100, 100], [3, 1], [1, 1]) == [100, 33]
    assert weighted_row_counts([100, 10], [3, 1], [1, 1]) == [30, 10]
    assert weighted_row_counts([100, 10], [3, 1], [1, 3]) == [90, 10]
    assert weighted_row_counts([100, 100], [1, 1], [2, 1]) == [50, 100]
    assert weighted_row_counts([100, 0], [1, 1], [1, 1]) == [0, 0]


@given(st.lists(st.integers(0, 60), unique=True, max_size=60), st.integers(0, 30), st.integers(0, 30), st.randoms())
def test_a_smaller_sample_is_a_subset_of_a_larger_in_any_order(
    numbers: list[int], few: int, more: int, random: object
) -> None:
    def sampled(order: list[int], number: int) -> set[int]:
        return {n for n, taken in zip(order, sample(keys_of(order), number, 0), strict=True) if taken}

    shuffled = list(numbers)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert sampled(numbers, few) <= sampled(shuffled, few + more)
    assert len(sampled(numbers, few)) == min(few, len(numbers))


@pytest.mark.parametrize("side", ["validation", "test"])
@given(rows=st.integers(1, 300))
def test_the_smallest_share_is_enough_and_a_hundredth_less_is_not(rows: int, side: str) -> None:
    least = smallest_share(rows)
    for share, enough in ((least, True), (round(least - 0.01, 2), False)):
        split = Split(**{"validation": 0, "test": 0} | {side: share})
        assert (side in side_names([KEYS[:rows]], split)[0]) is enough
