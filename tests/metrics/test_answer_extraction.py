"""Results out of answers: equal results are equal texts, and what is no result is none."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.metrics.answer_extraction import extract_choice, extract_number, extract_result, marked_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She sells 9 eggs.\n#### 18", "18"),
        ("So 16 - 3 - 4 = 9 eggs a day. 9 * 2 = $18.", "18"),
        ("Answer: 1,200.50 dollars", "1200.5"),
        ("Answer: 1200.5", "1200.5"),
        ("The answer is: -7.", "-7"),
        ("The final answer is $5,000", "5000"),
        ("Answer: 3 + 4 = 7 apples", "7"),
        ("Answer: 7 apples (of 12)", "7"),
        (r"Therefore \boxed{42}, as 6 * 7 = 42 and not 43.", "42"),
        ("**Answer:** 1/3", "1/3"),
        ("it is 0.50 of them", "0.5"),
        ("about 50%", "50"),
        ("x = −4", "-4"),
        ("Answer:\n\n  18  \n\nCheck: 19 is wrong", "18"),
        ("First I took Answer: 4. No: Answer: 5", "5"),
        ("007", "7"),
        ("答案是42", "42"),
        ("共有42个苹果", "42"),
        ("答えは５です。", "5"),
        ("B12 and 7", "7"),
        ("only B12", None),
        ("Answer:\n- 5 apples", "5"),
        ("Results:\n- 3\n- 5", "5"),
        ("The total is 12 - 7", "7"),
        ("Answer: 8 (= 5 + 3)", "8"),
        ("The answer isn't 5 but 6", "6"),
        ("The answer is not 5 but 6", "6"),
        ("Answer: 1e5", "100000"),
        ("Answer: 3 1/2", "3.5"),
        ("Answer: -3 1/2", "-3.5"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{\dfrac13}", "1/3"),
        (r"\boxed{3\frac12}", "3.5"),
        (r"\boxed{-\frac{3}{4}}", "-0.75"),
        (r"\boxed{12\text{ cm}}", "12"),
        (r"\boxed{\$1{,}200}", "1200"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{90^\circ}", "90"),
        (r"\boxed{x = 5}", "5"),
        (r"\boxed{10\pi}", None),
        (r"\boxed{2\sqrt{3}}", None),
        (r"\boxed{(3, 4)}", None),
        (r"\boxed{x^2 + 1}", None),
        ("0." + "1" * 600, "0." + "1" * 600),
        ("9" * 5000, None),
        ("9" * 4290 + "e50", None),
        ("1/" + "7" * 4290, "1/" + "7" * 4290),
        ("none at all", None),
        ("", None),
        ("Answer: none", None),
        ("1/0", None),
    ],
)
def test_a_number_is_the_one_after_the_last_marker_or_else_the_last(text: str, expected: str | None) -> None:
    assert extract_number(text) == expected


@given(st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=1000))
def test_equal_numbers_give_equal_texts(value: Fraction) -> None:
    written = extract_number(f"Answer: {value.numerator}/{value.denominator}")
    assert written is not None
    assert Fraction(written) == value
    assert extract_number(f"so we get {written}") == written
    if value.denominator == 1:
        assert extract_number(f"Answer: {value.numerator:,}.00") == written


OPTIONS = ["blue", "light blue", "a dog", "none of them"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B. light blue", "B"),
        ("(C) because dogs bark", "C"),
        ("The answer is D", "D"),
        ("It could be A or B, but …\nAnswer: **C**", "C"),
        ("D", "D"),
        ("It must be the light blue one.", "B"),
        ("a dog", "C"),
        ("A dog", "C"),
        ("A dog, or none of them", None),
        ("Answer: B because 3 > 2", "B"),
        ("The answer is B, light blue", "B"),
        ("Answer: b", "B"),
        (r"\boxed{\text{C}}", "C"),
        ("Answer: A, B", None),
        ("Answer: A and B", None),
        ("E. something else", None),
        ("A: It must be the light blue one.", "B"),
        ("A: B. light blue", "B"),
        ("A: I do not know. The answer is C.", "C"),
        ("A: That would be the dog. The answer is light blue.", "B"),
        ("A: yes", "A"),
        ("C, because dogs bark", "C"),
        ("D. The answer is obvious.", "D"),
        ("I do not know", None),
        ("", None),
    ],
)
def test_a_choice_is_named_by_its_letter_or_by_its_text_alone(text: str, expected: str | None) -> None:
    assert extract_choice(text, OPTIONS) == expected


def test_without_options_a_letter_is_a_choice_but_an_article_is_not() -> None:
    assert extract_result("E) something") == "E"
    assert extract_result("A dog is an animal") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: (B) 12 km", "B"),
        ("12 km in all", "12"),
        ("Answer: Mount Everest!", "mount everest"),
        ("Mount Everest", None),
        ("Answer:", None),
        (r"\boxed{x^2 + 1}", "x^2+1"),
        (r"\boxed{x^2 - 1}", "x^2-1"),
        ("A: There are 15 trees. The answer is 6.", "6"),
        ("A: There are 15 trees.", "15"),
        ("X: so Answer: 12", "12"),
        ("X: so 12", "12"),
        ("B: light blue", "B"),
        ("D, because 3 > 2", "D"),
        ("D, which is 5 more than 2", "2"),
        ("C. The answer is light blue.", "C"),
        ("B - the 2 dogs", "B"),
        ("A - 3 = 9, so A = 12", "12"),
        ("A - B = 5", "5"),
        ("A*2 = 6", "6"),
        ("**B** is 7", "B"),
        ("N - 5 = 7, so N = 12", "12"),
        ("Y, the number of trees, is 6.", "6"),
        ("A.M. it is 5", "5"),
        ("C\nsince it has 4", "C"),
        ("Answer: नमस्ते", "नमस्ते"),
    ],
)
def test_a_result_of_any_kind_is_a_letter_a_number_or_what_follows_the_marker(text: str, expected: str | None) -> None:
    assert extract_result(text) == expected


def test_an_option_in_a_script_without_spaces_is_found_in_a_sentence() -> None:
    assert extract_choice("我认为是红色。", ["蓝色", "红色", "浅蓝色"]) == "B"
    assert extract_choice("我认为是浅蓝色。", ["蓝色", "红色", "浅蓝色"]) == "C"


@given(st.text(max_size=200))
def test_any_text_has_a_result_or_none(text: str) -> None:
    for result in (
        marked_text(text),
        extract_number(text),
        extract_choice(text, OPTIONS),
        extract_result(text),
    ):
        assert result is None or result.strip()


@pytest.mark.parametrize(
    "text",
    [
        "The answer is option B.",
        "Answer: option B",
        "The answer is: Option (B)",
        "The correct choice is B",
        "The correct option is B.",
        "The option is not A. The choice is B",
    ],
)
def test_a_letter_may_be_called_an_option_or_a_choice(text: str) -> None:
    assert extract_choice(text, ["red", "blue", "green"]) == "B"
    assert extract_result(text) == "B"


def test_the_word_option_within_a_sentence_names_no_letter() -> None:
    assert extract_choice("Option B was bad, so blue.", ["red", "pink", "blue"]) == "C"


def test_the_result_of_a_long_text_is_near_its_end_and_its_letter_at_its_beginning() -> None:
    filler = "and so on, " * 10_000
    assert extract_number(f"Answer: 5. {filler}") is None
    assert extract_number(f"It is 5. {filler}") is None
    assert extract_number(f"It is 5. {filler} Answer: 7") == "7"
    assert extract_result(f"It is 5. {filler} 8") == "8"
    assert extract_result(f"B) {filler}") == "B"
