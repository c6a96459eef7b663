from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from corral.data.word_hashes import FACTOR, hash_spans, mix, record_words
from corral.messages import Conversation, Feedback, Preference, Text
from tests.data.conftest import word_hashes


def test_words_are_letters_and_digits_in_lower_case_whatever_stands_between() -> None:
    assert word_hashes("The cat, sat!").tolist() == word_hashes("the   CAT\nsat").tolist()
    assert word_hashes("ﬁve").tolist() == word_hashes("five").tolist()
    assert len(word_hashes("東京タワー 3")) == 6
    assert len(word_hashes("snake_case")) == 2
    assert len(word_hashes("… !? 🙂")) == 0


def test_system_messages_are_ignored_and_the_prompt_is_all_before_the_answer() -> None:
    turns = Conversation.from_turns(("system", "be nice"), ("user", "a b"), ("assistant", "c"), ("user", "d e"))
    whole, asked = record_words(turns.add("assistant", "f g h"))
    assert (len(whole), asked) == (8, 5)
    assert record_words(Preference(turns, "f g h", "i")) == (whole + record_words(Text("i"))[0], 5)
    assert record_words(Feedback(turns, "f g h", 1.0)) == (whole, 5)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=60), st.data())
def test_a_span_has_the_same_hash_wherever_it_stands_and_others_have_another(
    words: list[int], data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(words)))
    end = data.draw(st.integers(start, len(words)))
    span = words[start:end]
    (inside,) = hash_spans(np.array(words, np.uint32), np.array([start]), np.array([end]))
    (alone,) = hash_spans(np.array(span, np.uint32), np.array([0]), np.array([len(span)]))
    assert inside == alone
    polynomial = 0
    for word in span:
        polynomial = (polynomial * int(FACTOR) + word) % 2**64
    assert alone == mix(np.array([polynomial], np.uint64))[0]
