from __future__ import annotations

from corral.data.contamination import FREQUENT, find_contaminated
from corral.data.row_store import split_list_column
from corral.data.word_hashes import Block, word_columns
from corral.messages import Conversation
from tests.data.conftest import prose, prose_words


def block(*conversations: tuple[str, str]) -> Block:
    found = word_columns(Conversation.from_turns(("user", q), ("assistant", a)) for q, a in conversations)
    words, bounds = split_list_column(found["words"])
    return words.to_numpy(), bounds, found["prompt_words"]


def test_thirteen_words_in_a_row_are_a_shared_passage_and_twelve_are_none() -> None:
    passage = " ".join(prose_words(5, 13))
    held_out = [block((" ".join(prose_words(6, 20)), f"so {passage} it ends"))]
    training = [
        block((" ".join(prose_words(7, 20)), f"and {passage}")),
        block((f"{passage.rpartition(' ')[0]} else {' '.join(prose_words(8))}", "no"), (passage.upper(), "yes")),
    ]
    assert find_contaminated(held_out, training)[0].tolist() == [True, False, True]
    assert find_contaminated([], training)[0].tolist() == [False, False, False]
    assert find_contaminated(held_out, [])[0].tolist() == []


def test_a_passage_does_not_span_two_rows() -> None:
    text = prose_words(9, 14)
    both = [block((" ".join(text[:7]), ""), (" ".join(text[7:]), ""))]
    assert find_contaminated([block((" ".join(text), ""))], both)[0].tolist() == [False, False]


def test_a_whole_short_prompt_is_a_shared_passage_whatever_the_answer() -> None:
    held_out = [block(("What is the capital of France?", "Paris"))]
    training = [
        block(
            ("what is the CAPITAL of france", "It is Paris, of course"),
            ("What is the capital of France called?", "Paris"),
            ("Paris", "What is the capital of France?"),
        )
    ]
    assert find_contaminated(held_out, training)[0].tolist() == [True, False, False]


FORM = "Below is an instruction that describes a task write a response that completes the request"


def with_form(*seeds: int) -> list[Block]:
    return [block(*((f"{FORM} {' '.join(prose_words(seed))}", "x") for seed in seeds))]


def test_a_passage_in_many_rows_on_both_sides_is_boilerplate() -> None:
    few, many = range(1, FREQUENT + 1), range(1, FREQUENT + 2)
    assert find_contaminated(with_form(50, 51), with_form(*few))[0].all()
    assert not find_contaminated(with_form(50, 51), with_form(*many))[0].any()
    assert find_contaminated(with_form(50), with_form(*many))[0].all()


def test_a_whole_prompt_counts_however_often_it_stands() -> None:
    prompt = " ".join(prose_words(3, 30))
    held_out = [block((prompt, "an answer"), (prompt, "another answer"))]
    training = [block(*((prompt, " ".join(prose_words(seed))) for seed in range(5 * FREQUENT)))]
    assert find_contaminated(held_out, training)[0].all()


def test_the_held_out_rows_that_share_a_passage_are_told_too() -> None:
    held_out = [
        block(("Why so?", prose(1)), ("Which?", prose(2))),
        block(("How then?", prose(3)), ("Where?", prose(4))),
    ]
    training = [block(("How then?", prose(5)), ("x", f"y {prose(2)} z")), block(("a", prose(6)))]
    assert [flags.tolist() for flags in find_contaminated(held_out, training)] == [
        [True, True, False],
        [False, True, True, False],
    ]
    assert find_contaminated(held_out, [])[1].tolist() == [False] * 4
