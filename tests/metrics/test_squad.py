from __future__ import annotations

import pytest

from corral.metrics.squad import exact_match, token_f1


@pytest.mark.parametrize(
    ("reference", "candidate", "f1"),
    [
        ("the Eiffel Tower", "Eiffel tower!", 1.0),
        ("A cat, an apple; the end", "cat apple end", 1.0),
        ("theatre", "atre", 0.0),  # articles are whole words
        ("two red hats", "two hats", 0.8),
        ("b b c", "b d d d", 2 / 7),  # a word counts as often as both have it
        ("", "", 1.0),
        ("the", "...", 1.0),  # nothing is left of either
        ("word", "", 0.0),
        ("", "word", 0.0),
    ],
)
def test_short_answers_are_compared_without_case_punctuation_and_articles(
    reference: str, candidate: str, f1: float
) -> None:
    assert token_f1(reference, candidate) == token_f1(candidate, reference) == pytest.approx(f1)
    assert exact_match(reference, candidate) == (f1 == 1.0)


def test_the_same_words_in_another_order_are_no_exact_match() -> None:
    assert token_f1("red and blue", "blue and red") == 1.0
    assert not exact_match("red and blue", "blue and red")
