"""Basic prompts: which are read, and what is wrong with an answer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from corral.errors import DataError
from corral.template import Template
from corral.training.basic_prompts import encode_basic_prompts, find_faults, is_loop, read_basic_prompts


def faults(*answers: str, ended: bool = True) -> list[str | None]:
    return find_faults(answers, [[ord(c) for c in answer] for answer in answers], [ended] * len(answers))


def test_twenty_prompts_ship_with_corral(template: Template) -> None:
    prompts = read_basic_prompts(None, "train.1.guards.prompts")
    assert len(prompts) == 20
    assert len(encode_basic_prompts(prompts, template, 512, 96, "prompts")) == 20


def test_good_answers_have_no_fault() -> None:
    assert faults("Hello there!", "It is Paris.", "1. Cat\n2. Dog\n3. Bear", "Yes") == [None] * 4


def test_an_empty_an_endless_a_looping_and_a_repeated_answer_are_at_fault() -> None:
    assert faults(" \n") == ["empty"]
    assert faults("It goes on", ended=False) == ["no end after 10 tokens"]
    assert faults("I am. " + "the cat " * 9) == ["in a loop"]
    assert faults("I do not know.", "I do not know.", " I do not know.\n", "Two.") == [
        *["the same answer as to 2 other prompts"] * 3,
        None,
    ]


def test_equal_answers_to_two_prompts_or_to_half_of_them_are_no_fault() -> None:
    assert faults("Hello!", "Hello!") == [None] * 2
    assert faults("Hello!", "Hello!", "Hello!", "Four.", "Paris.", "July.") == [None] * 6


def test_a_few_answers_to_all_prompts_are_at_fault() -> None:
    assert faults(*["Yes."] * 6, *["No."] * 6) == ["the same answer as to 5 other prompts"] * 12
    assert faults(*["Yes."] * 4, *["No."] * 2, "Four.", "Paris.") == [None] * 8, "half as many answers as prompts"


def test_a_loop_repeats_most_of_the_answer_wherever_it_lies_and_whatever_its_period() -> None:
    tale = random.Random(1).sample(range(1000), 40)
    assert not is_loop(tale)
    assert not is_loop(tale + tale[:15])
    assert is_loop(tale[:20] * 3)
    assert is_loop([*tale[:5], *[7] * 40, *tale[5:10]])
    assert not is_loop([7] * 5)


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "cannot be read"), (b"\n \n", "holds none"), (b"\xff\xfe\xff", "not UTF-8")]
)
def test_a_file_without_prompts_is_refused_with_the_setting_that_names_it(
    content: bytes | None, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=problem) as caught:
        read_basic_prompts(str(path), "train.1.guards.prompts")
    assert "train.1.guards.prompts" in str(caught.value)


def test_more_prompts_than_can_be_answered_at_each_evaluation_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"What is {i} plus 1?" for i in range(501)), "utf-8")
    with pytest.raises(DataError, match="holds 501 basic prompts, and at most 500"):
        read_basic_prompts(str(path), "prompts")


def test_each_line_of_a_users_file_is_a_prompt_once(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("Sag Hallo.\n\n  Wer bist du?  \nSag Hallo.\n", "utf-8")
    assert read_basic_prompts(str(path), "prompts") == ["Sag Hallo.", "Wer bist du?"]


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(template: Any) -> None:
    with pytest.raises(DataError, match="and 96 of an answer do not fit into the model's context of 100") as caught:
        encode_basic_prompts(["What is this?"], template, 100, 96, "prompts")
    assert "lower `max_tokens`" in str(caught.value.hint)
    assert encode_basic_prompts(["What is this?"], template, None, 96, "prompts")
