from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.data.near_duplicates import (
    FREQUENT,
    RESEMBLANCE,
    Block,
    Words,
    bands,
    contaminated,
    near_groups,
    resemblance,
    shingles,
    word_rows,
    words_of,
)
from corral.messages import Conversation, Feedback, Preference, Text

VOCABULARY = [f"w{i}" for i in range(400)]


def words(text: str) -> Words:
    return np.array(words_of(Text(text))[0], np.uint32)


def block(*conversations: tuple[str, str]) -> Block:
    found = word_rows(Conversation.of(("user", q), ("assistant", a)) for q, a in conversations)
    return found["words"], found["word_ends"], found["prompt_words"]


def prose(seed: int, length: int = 60) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=length)


def groups_of(texts: list[str]) -> list[int]:
    found = word_rows(Text(text) for text in texts)
    rows = [found["words"][a:b] for a, b in pairwise(found["word_ends"])]
    equal = np.array([texts.index(text) for text in texts])
    return near_groups(bands(found["words"], found["word_ends"]), equal, lambda row: rows[row]).tolist()


def test_words_are_letters_and_digits_in_lower_case_whatever_stands_between() -> None:
    assert words("The cat, sat!").tolist() == words("the   CAT\nsat").tolist()
    assert words("ﬁve").tolist() == words("five").tolist()
    assert len(words("東京タワー 3")) == 6
    assert len(words("snake_case")) == 2
    assert len(words("… !? 🙂")) == 0


def test_system_messages_do_not_count_and_the_prompt_is_what_stands_before_the_answer() -> None:
    turns = Conversation.of(("system", "be nice"), ("user", "a b"), ("assistant", "c"), ("user", "d e"))
    whole, asked = words_of(turns.add("assistant", "f g h"))
    assert (len(whole), asked) == (8, 5)
    assert words_of(Preference(turns, "f g h", "i")) == (whole + words_of(Text("i"))[0], 5)
    assert words_of(Feedback(turns, "f g h", 1.0)) == (whole, 5)


@given(st.lists(st.sampled_from("abc"), max_size=30), st.lists(st.sampled_from("abc"), max_size=30))
def test_resemblance_is_the_jaccard_index_of_the_shingle_sets(one: list[str], other: list[str]) -> None:
    def by_definition(text: list[str]) -> set[tuple[str, ...]]:
        n = min(5, len(text))
        return {tuple(text[i : i + n]) for i in range(len(text) - n + 1)} if text else set()

    a, b = by_definition(one), by_definition(other)
    expected = len(a & b) / (len(a | b) or 1)
    assert resemblance(words(" ".join(one)), words(" ".join(other))) == pytest.approx(expected)
    assert len(shingles(words(" ".join(one)))) == len(a)


def test_rows_that_say_almost_the_same_are_one_group_and_others_are_not() -> None:
    first = prose(0)
    changed = [*first[:-2], "other", "end"]
    half = [*first[:30], *prose(1, 30)]
    texts = [" ".join(t) for t in (prose(2), first, changed, half, prose(3), first)]
    texts.append(texts[0].upper() + "!")
    assert resemblance(words(texts[1]), words(texts[2])) > 0.9
    assert resemblance(words(texts[1]), words(texts[3])) < 0.5
    assert groups_of(texts) == [0, 1, 1, 3, 4, 1, 0]


def test_of_pairs_well_above_the_threshold_nearly_all_are_found_and_none_below_it() -> None:
    texts: list[str] = []
    for seed in range(200):
        text = prose(seed, 100)
        texts += [" ".join(text), " ".join([*text[:96], "x", "y", "z", str(seed)])]
    found = groups_of(texts)
    assert sum(found[2 * i] == found[2 * i + 1] == 2 * i for i in range(200)) >= 195
    assert all(found[2 * i] == 2 * i for i in range(200))


def test_short_rows_are_compared_as_a_whole_and_rows_without_words_are_never_alike() -> None:
    assert groups_of(["yes", "Yes.", "no", "...", "!!!", "yes no"]) == [0, 0, 2, 3, 4, 5]


def test_thirteen_words_in_a_row_are_a_shared_passage_and_twelve_are_none() -> None:
    passage = " ".join(prose(5, 13))
    held_out = [block((" ".join(prose(6, 20)), f"so {passage} it ends"))]
    training = [
        block((" ".join(prose(7, 20)), f"and {passage}")),
        block((f"{passage.rpartition(' ')[0]} else {' '.join(prose(8))}", "no"), (passage.upper(), "yes")),
    ]
    assert contaminated(held_out, training).tolist() == [True, False, True]
    assert contaminated([], training).tolist() == [False, False, False]
    assert contaminated(held_out, []).tolist() == []


def test_a_passage_does_not_reach_over_the_border_of_two_rows() -> None:
    text = prose(9, 14)
    both = [block((" ".join(text[:7]), ""), (" ".join(text[7:]), ""))]
    assert contaminated([block((" ".join(text), ""))], both).tolist() == [False, False]


def test_a_short_prompt_is_shared_as_a_whole_whatever_the_answer() -> None:
    held_out = [block(("What is the capital of France?", "Paris"))]
    training = [
        block(
            ("what is the CAPITAL of france", "It is Paris, of course"),
            ("What is the capital of France called?", "Paris"),
            ("Paris", "What is the capital of France?"),
        )
    ]
    assert contaminated(held_out, training).tolist() == [True, False, False]


FORM = "Below is an instruction that describes a task write a response that completes the request"


def with_form(*seeds: int) -> list[Block]:
    return [block(*((f"{FORM} {' '.join(prose(seed))}", "x") for seed in seeds))]


def test_a_passage_of_many_rows_on_both_sides_is_a_phrase_of_the_form() -> None:
    few, many = range(1, FREQUENT + 1), range(1, FREQUENT + 2)
    assert contaminated(with_form(50, 51), with_form(*few)).all()
    assert not contaminated(with_form(50, 51), with_form(*many)).any()
    assert contaminated(with_form(50), with_form(*many)).all()


def test_a_whole_prompt_counts_however_often_it_stands() -> None:
    prompt = " ".join(prose(3, 30))
    held_out = [block((prompt, "an answer"), (prompt, "another answer"))]
    training = [block(*((prompt, " ".join(prose(seed))) for seed in range(5 * FREQUENT)))]
    assert contaminated(held_out, training).all()


def test_what_is_left_out_as_near_resembles_what_is_kept() -> None:
    """A chain of rows, each like the one before it, whose ends have nothing in common."""
    text = prose(4, 400)
    chain = [" ".join(text[5 * i : 5 * i + 100]) for i in range(40)]
    rows = [Conversation.of(("user", "q"), ("assistant", answer)) for answer in chain]
    found = word_rows(rows)
    of = [found["words"][a:b] for a, b in pairwise(found["word_ends"])]
    signatures = bands(found["words"], found["word_ends"])
    groups = near_groups(signatures, np.arange(len(rows)), lambda row: of[row])
    kept = sorted(set(groups.tolist()))
    assert 2 < len(kept) < len(rows)
    assert all(groups[row] == row for row in kept)
    assert all(resemblance(of[row], of[groups[row]]) >= RESEMBLANCE for row in range(len(rows)))
