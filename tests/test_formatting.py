from __future__ import annotations

from typing import Any

import pytest

from corral import formatting


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(1.8434, 3, "1.843"), (-0.44, 2, "−0.44"), (-0.0004, 3, "0.000"), (12345.67, 1, "12,345.7"), (3268, 0, "3,268")],
)
def test_numbers_have_fixed_digits_and_a_true_minus(value: float, digits: int, text: str) -> None:
    assert formatting.number(value, digits) == text


@pytest.mark.parametrize(("value", "text"), [(0.5, "+0.500"), (-0.5, "−0.500"), (0.0, "0.000"), (0.0001, "0.000")])
def test_signed_numbers_show_a_plus_unless_they_read_as_zero(value: float, text: str) -> None:
    assert formatting.signed(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.84, "0.8 s"),
        (9.96, "10 s"),
        (42.4, "42 s"),
        (59.7, "1 min 00 s"),
        (372, "6 min 12 s"),
        (3599.6, "1 h 00 min"),
        (11100, "3 h 05 min"),
    ],
)
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert formatting.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(12, "12 bytes"), (8192, "8.19 kB"), (93e6, "93.0 MB"), (7.97e9, "7.97 GB"), (141e9, "141 GB")]
)
def test_sizes_have_three_digits_and_decimal_units(value: float, text: str) -> None:
    assert formatting.format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("2025-03-14T09:14:59+00:00", "2025-03-14 09:14 UTC"),
        ("2025-03-14T10:14:59+01:00", "2025-03-14 09:14 UTC"),
        ("2025-03-14T09:14:59", "2025-03-14 09:14 UTC"),
        (1741943699, "2025-03-14 09:14 UTC"),
        ("yesterday", "yesterday"),
        (1e300, "1e+300"),
        (None, "None"),
    ],
)
def test_times_are_in_utc_and_other_values_are_unchanged(value: Any, text: str) -> None:
    assert formatting.moment(value) == text


@pytest.mark.parametrize(
    ("words", "text"), [([], ""), (["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")]
)
def test_listings_end_with_and(words: list[str], text: str) -> None:
    assert formatting.listing(words) == text


def test_shortened_text_is_one_line_of_at_most_that_many_characters() -> None:
    assert formatting.shorten("a\n b\tc", 10) == "a b c"
    assert formatting.shorten("abcdefgh ij", 10) == "abcdefgh…"


@pytest.mark.parametrize(
    ("p", "cell", "equation"),
    [(0.0001, "<0.001", "p < 0.001"), (0.001, "0.001", "p = 0.001"), (1.0, "1.000", "p = 1.000")],
)
def test_small_p_values_are_not_shown_as_zero(p: float, cell: str, equation: str) -> None:
    assert (formatting.format_p(p), formatting.format_p_equation(p)) == (cell, equation)
