"""Which test rows rank answers, and which of their answers are good."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from corral.data.example_store import Example, ExampleStore
from corral.evaluation.inference import RankedAnswers
from corral.evaluation.ranked_answers import count_ranked_prompts, first_of_groups, good_answers, select_ranked_answers
from corral.messages import Conversation, Feedback, Message, Preference, Record
from corral.template import Encoded
from tests.data.conftest import write_examples

SEQUENCE = Encoded((1, 2, 3), (False, True, True))


def prompt(text: str) -> Conversation:
    return Conversation.from_turns(("user", text))


def store(folder: Path, *records: Record) -> ExampleStore:
    examples = [Example(f"{r!r}", "docs", place, (SEQUENCE,), r) for place, r in enumerate(records)]
    return write_examples(folder / "test", examples)


def texts(rows: Sequence[RankedAnswers]) -> dict[Conversation, set[tuple[str, str]]]:
    return {row.prompt: {(row.answers[b], row.answers[w]) for b, w in row.pairs} for row in rows}


def test_the_rows_about_a_prompt_are_one_row_with_each_answer_once(tmp_path: Path) -> None:
    a, b = prompt("a"), prompt("b")
    rows = [
        Preference(a, "yes", "no"),
        Preference(a, "yes", "never"),
        Preference(a, "yes", "no"),
        Preference(b, "1", "2"),
    ]
    chosen = select_ranked_answers(store(tmp_path, *rows), 100)
    assert texts(chosen) == {a: {("yes", "no"), ("yes", "never")}, b: {("1", "2")}}
    assert {row.prompt: sorted(row.answers) for row in chosen} == {a: ["never", "no", "yes"], b: ["1", "2"]}
    (tmp_path / "again").mkdir()
    again = select_ranked_answers(store(tmp_path / "again", *reversed(rows)), 100)
    assert {row.id for row in again} == {row.id for row in chosen}, "whatever the order of the rows"


def test_answers_with_different_scores_are_pairs_and_equal_answers_are_none(tmp_path: Path) -> None:
    a = prompt("a")
    scores = {"best": 1.0, "good": 0.5, "fair": 0.5, "bad": 0.0}
    rows = [*(Feedback(a, answer, score) for answer, score in scores.items()), Feedback(a, "best", 0.7)]
    expected = {
        *(("best", "good"), ("best", "fair"), ("best", "bad")),
        *(("good", "bad"), ("fair", "bad")),
    }
    assert texts(select_ranked_answers(store(tmp_path, *rows, Preference(prompt("b"), "x", "x")), 100)) == {a: expected}


def test_prompts_that_rank_answers_are_counted_without_forming_their_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c, d = map(prompt, "abcd")
    one_score, one_answer = [Feedback(a, "x", 0.5), Feedback(a, "y", 0.5)], [Feedback(b, "x", 0), Feedback(b, "x", 1)]
    crossed = [Feedback(c, "x", 0), Feedback(c, "x", 1), Feedback(c, "y", 1)]
    rows = [*one_score, *one_answer, *crossed, Preference(a, "same", "same"), Preference(d, "1", "2")]
    test = store(tmp_path, *rows)
    assert len(select_ranked_answers(test, len(test))) == 2

    def form_pairs(*_: object) -> None:
        raise AssertionError("thousands of answers to one prompt are millions of pairs")

    monkeypatch.setattr("corral.evaluation.ranked_answers.combinations", form_pairs)
    assert count_ranked_prompts(test) == 2


def test_prompts_are_taken_whole_as_long_as_their_rows_fit(tmp_path: Path) -> None:
    rows = [Preference(prompt(str(n)), f"yes {m}", "no") for n in range(4) for m in range(3)]
    test = store(tmp_path, *rows)
    assert [len(row.pairs) for row in select_ranked_answers(test, 8)] == [3, 3]
    assert [len(row.pairs) for row in select_ranked_answers(test, 2)] == [2], "of the first one as many as are wanted"


def test_good_answers_are_chosen_or_well_scored_and_only_they_are_trained(tmp_path: Path) -> None:
    talk = Conversation.from_turns(("user", "a"), ("assistant", "b"), ("user", "c"))
    rows = [Preference(talk, "d", "e"), Feedback(talk, "f", 0.5), Feedback(talk, "g", 0.4), Preference(talk, "d", "h")]
    items = list(good_answers(store(tmp_path, *rows)))
    assert {item.conversation.messages[-1] for item in items} == {Message("assistant", "d"), Message("assistant", "f")}
    assert all(not item.conversation.messages[1].trained for item in items)
    assert len(list(first_of_groups(iter(items)))) == 1
