from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from corral.data.mixture import order, rank, select, share_for_one, side_of
from corral.recipe import Split

KEYS = [f"{i:064x}" for i in range(5000)]


def test_ranks_are_uniform_and_independent_between_purposes_and_seeds() -> None:
    first = [rank(key, 1, "split") for key in KEYS]
    assert all(0 <= r < 1 for r in first)
    for tenth in range(10):
        assert 400 < sum(tenth <= 10 * r < tenth + 1 for r in first) < 600
    for other in ([rank(key, 2, "split") for key in KEYS], [rank(key, 1, "order") for key in KEYS]):
        assert 1100 < sum((a < 0.5) == (b < 0.5) and a < 0.5 for a, b in zip(first, other, strict=True)) < 1400


def test_sides_have_their_shares() -> None:
    sides = [side_of(key, 0, Split(validation=0.1, test=0.2)) for key in KEYS]
    assert 420 < sides.count("validation") < 580
    assert 900 < sides.count("test") < 1100


def test_no_share_means_no_rows() -> None:
    assert {side_of(key, 0, Split(validation=0, test=0)) for key in KEYS} == {"train"}


def test_changing_the_share_of_one_held_out_side_leaves_the_other_as_it_is() -> None:
    base = {key: side_of(key, 0, Split(validation=0.1, test=0.1)) for key in KEYS}
    more_test = {key: side_of(key, 0, Split(validation=0.1, test=0.3)) for key in KEYS}
    more_validation = {key: side_of(key, 0, Split(validation=0.3, test=0.1)) for key in KEYS}
    for key in KEYS:
        assert (base[key] == "validation") == (more_test[key] == "validation")
        assert (base[key] == "test") == (more_validation[key] == "test")
        assert base[key] != "test" or more_test[key] == "test"
        assert base[key] != "validation" or more_validation[key] == "validation"


@given(st.lists(st.sampled_from(KEYS), max_size=60), st.integers(1, 30), st.integers(0, 30), st.integers(0, 3))
def test_a_smaller_cap_keeps_a_part_of_what_a_larger_one_keeps(
    keys: list[str], small: int, more: int, seed: int
) -> None:
    rows = list(enumerate(keys, start=1))
    few = select(rows, seed, cap=small, taken=set())
    many = select(rows, seed, cap=small + more, taken=set())
    everything = select(rows, seed, cap=None, taken=set())
    assert few.chosen.items() <= many.chosen.items() <= everything.chosen.items()
    assert len(few.chosen) == min(small, len(set(keys)))
    assert few.duplicates == many.duplicates == everything.duplicates
    assert sorted([*few.chosen, *few.duplicates, *few.not_sampled]) == [number for number, _ in rows]


@given(st.lists(st.sampled_from(KEYS[:20]), max_size=60), st.integers(1, 10), st.randoms())
def test_what_a_cap_keeps_does_not_depend_on_the_order_of_rows(keys: list[str], cap: int, random: object) -> None:
    shuffled = list(keys)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    kept = [set(select(enumerate(rows), 0, cap=cap, taken=set()).chosen.values()) for rows in (keys, shuffled)]
    assert kept[0] == kept[1]


def test_of_equal_rows_the_first_is_kept_and_copies_of_earlier_sources_do_not_use_up_the_cap() -> None:
    a, b, c = KEYS[:3]
    selection = select([(1, a), (2, b), (3, a), (4, c), (9, c)], 0, cap=2, taken={a})
    assert selection.chosen == {2: b, 4: c}
    assert selection.duplicates == [1, 3, 9]
    assert selection.not_sampled == []


@given(st.lists(st.sampled_from(KEYS), unique=True, max_size=40), st.randoms())
def test_the_order_of_rows_does_not_depend_on_the_order_they_come_in(keys: list[str], random: object) -> None:
    shuffled = list(keys)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert [keys[i] for i in order(keys, 3)] == [shuffled[i] for i in order(shuffled, 3)]


def test_another_seed_gives_another_order() -> None:
    assert order(KEYS, 0) != order(KEYS, 1)
    assert order(KEYS, 0) != sorted(order(KEYS, 0))


@given(st.lists(st.sampled_from(KEYS), min_size=1, max_size=20), st.integers(0, 5))
def test_the_share_for_one_row_is_enough_and_a_hundredth_less_is_not(keys: list[str], seed: int) -> None:
    for side in ("validation", "test"):
        least = share_for_one(keys, seed, side)
        if least < 1:
            assert side in {side_of(key, seed, Split(**{"validation": 0, "test": 0} | {side: least})) for key in keys}
        less = round(least - 0.01, 2)
        assert side not in {side_of(key, seed, Split(**{"validation": 0, "test": 0} | {side: less})) for key in keys}
