"""Single answers of pairs and scored rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from corral.data.example_store import Example
from corral.messages import Conversation, Feedback, Preference, Record
from corral.template import Encoded
from corral.training.mismatched_rows import MismatchedRows
from corral.training.scorer import token_count
from corral.training.single_answers import SingleAnswers
from tests.data.conftest import write_examples


def encode(prompt: str, answer: str) -> Encoded:
    ids = tuple(map(ord, prompt + answer))
    return Encoded(ids, tuple(i >= len(prompt) for i in range(len(ids))))


def pair(number: int, prompt: str, chosen: str, rejected: str) -> Example:
    sequences = encode(prompt, chosen), encode(prompt, rejected)
    asked = Conversation.from_turns(("user", prompt))
    return Example(f"{number:064x}", "pairs", number, sequences, Preference(asked, chosen, rejected))


def scored(number: int, prompt: str, answer: str, score: float) -> Example:
    record = Feedback(Conversation.from_turns(("user", prompt)), answer, score)
    return Example(f"{number:064x}", "scored", number, (encode(prompt, answer),), record)


def single_answers(folder: Path, *examples: Example, repeat: int = 1) -> SingleAnswers:
    rows = write_examples(folder, examples, repeat=repeat)
    return SingleAnswers(rows, rows.sequence_figures())


def judged(record: Record) -> tuple[str, str, float]:
    assert isinstance(record, Feedback)
    return record.prompt.messages[0].content, record.completion, record.score


def test_a_pair_is_a_good_and_a_bad_answer_and_a_scored_row_stays_as_it_is(tmp_path: Path) -> None:
    answers = single_answers(tmp_path / "rows", pair(1, "hello", "good", "bad!!"), scored(2, "how", "well", 0.7))
    assert sorted(judged(e.record) for e in answers) == [
        ("hello", "bad!!", 0.0),
        ("hello", "good", 1.0),
        ("how", "well", 0.7),
    ]
    for i, example in enumerate(answers):
        prompt, answer, _ = judged(example.record)
        assert example.sequences == (encode(prompt, answer),)
        assert answers.lengths[i] == token_count(example)
        assert (answers.starts[i], answers.trained_tokens[i]) == (len(prompt), len(answer))
    assert len({example.key for example in answers}) == 3


def test_equal_answers_of_several_pairs_count_once_and_repeats_count_each_time(tmp_path: Path) -> None:
    pairs = pair(1, "a", "good", "bad"), pair(2, "a", "good", "worse"), pair(3, "b", "good", "bad")
    once, thrice = (single_answers(tmp_path / str(n), *pairs, repeat=n) for n in (1, 3))
    assert len(once) == 5
    assert sorted(judged(e.record) for e in thrice) == sorted(3 * [judged(e.record) for e in once])


def test_an_answer_that_is_chosen_and_rejected_is_left_out(tmp_path: Path) -> None:
    ranking = pair(1, "a", "best", "fair"), pair(2, "a", "fair", "worst"), pair(3, "a", "best", "worst")
    answers = single_answers(tmp_path / "rows", *ranking, pair(4, "b", "fair", "worst"))
    assert sorted(judged(e.record) for e in answers) == [
        ("a", "best", 1.0),
        ("a", "worst", 0.0),
        ("b", "fair", 1.0),
        ("b", "worst", 0.0),
    ]
    assert answers.contradictory == 1


def test_the_score_of_a_row_counts_before_the_place_of_its_answer_in_a_pair(tmp_path: Path) -> None:
    answers = single_answers(tmp_path / "rows", pair(1, "a", "good", "bad"), scored(2, "a", "good", 0.6))
    assert sorted(judged(e.record) for e in answers) == [("a", "bad", 0.0), ("a", "good", 0.6)]
    assert answers.contradictory == 0


def test_a_mismatched_answer_is_that_of_the_nearest_row_before_with_another_prompt(tmp_path: Path) -> None:
    pairs = [pair(n, f"prompt {n % 3}", f"chosen {'x' * n}", f"rejected {'y' * n}") for n in range(9)]
    answers = single_answers(tmp_path / "rows", *pairs)
    rows, count = MismatchedRows(answers), len(answers)
    assert count == 18
    assert len({judged(e.record)[0] for e in answers}) == 3
    for i, example in enumerate(rows):
        prompt, answer, _ = judged(example.record)
        others = (judged(answers[(i - back) % count].record) for back in range(1, count))
        _, other, _ = next(judgement for judgement in others if judgement[0] != prompt)
        longest = max(len(prompt + answer), len(prompt + other))
        assert example.sequences == (encode(prompt, answer), encode(prompt, other))
        assert longest >= len(example.sequences[1].ids)
        assert rows.lengths[i] == token_count(example)
        assert rows.loss_lengths[i] == len(example.sequences[0].ids)
    np.testing.assert_array_equal(rows.trained_tokens, answers.trained_tokens)
    assert rows.digest == answers.digest


def test_rows_of_one_prompt_have_no_answer_to_another(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="one prompt"):
        MismatchedRows(single_answers(tmp_path / "rows", pair(1, "a", "good", "bad")))
