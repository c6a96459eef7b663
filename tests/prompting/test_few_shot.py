"""Prompting: the examples before a question, and the instruction after it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from corral.messages import Conversation
from corral.prompting.few_shot import STEP_BY_STEP, Prompting, insert_examples

EXAMPLES = [
    Conversation.from_turns(("user", f"how many {w}?"), ("assistant", w)) for w in ("apples", "pears", "cats", "dogs")
]


def alike(texts: Sequence[str]) -> np.ndarray:
    """An embedding of which of four words is in a text; apples and pears are nearly the same."""
    axes = {"apples": (1, 0.1, 0), "pears": (1, 0, 0), "cats": (0, 0, 1), "dogs": (0, 0.1, 1)}
    vectors = np.array([next((v for w, v in axes.items() if w in t), (0, 1, 0)) for t in texts], dtype=float)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def asked(text: str) -> Conversation:
    return Conversation.from_turns(("user", text))


def shown(prompting: Prompting, text: str) -> list[str]:
    return [shot.messages[1].content for shot in prompting.choose_examples(asked(text))]


def test_static_examples_are_the_same_for_every_question_and_follow_the_seed() -> None:
    prompting = Prompting(EXAMPLES, 2, seed=1)
    first = shown(prompting, "how many birds?")
    assert len(first) == 2
    assert shown(prompting, "why?") == first == shown(Prompting(EXAMPLES, 2, seed=1), "what?")
    assert len({tuple(shown(Prompting(EXAMPLES, 2, seed=s), "?")) for s in range(9)}) > 1


def test_a_question_is_never_shown_its_own_answer() -> None:
    for choose in ("static", "similar"):
        prompting = Prompting(EXAMPLES, 3, choose, embed=alike, seed=1)
        for example in EXAMPLES:
            question, answer = example.split_answer()
            assert answer not in [s.messages[1].content for s in prompting.choose_examples(question)]
            assert len(prompting.choose_examples(question)) == 3


def test_the_most_similar_example_comes_last() -> None:
    prompting = Prompting(EXAMPLES, 2, "similar", embed=alike)
    assert shown(prompting, "do you like pears?") == ["apples", "pears"]
    assert shown(prompting, "cats or not?") == ["dogs", "cats"]
    with pytest.raises(ValueError, match="embed"):
        Prompting(EXAMPLES, 2, "similar")


def test_only_answered_conversations_of_one_turn_are_examples() -> None:
    longer = EXAMPLES[0].add("user", "sure?").add("assistant", "yes")
    spoken_to = Conversation.from_turns(("system", "be brief"), ("user", "how?"), ("assistant", "so"))
    assert Prompting([longer, asked("?"), spoken_to], 3).example_count == 1


def test_examples_come_after_the_system_message_and_before_the_first_question() -> None:
    talk = Conversation.from_turns(("system", "s"), ("user", "one"), ("assistant", "two"), ("user", "three"))
    roles = [m.content for m in insert_examples(EXAMPLES[:1], talk).messages]
    assert roles == ["s", "how many apples?", "apples", "one", "two", "three"]
    assert insert_examples((), talk) == talk


def test_the_instruction_for_steps_is_added_to_the_last_question_only() -> None:
    talk = Prompting(reasoning=True).apply(asked("three"), EXAMPLES[:1])
    assert talk.messages[-1].content == f"three\n\n{STEP_BY_STEP}"
    assert talk.messages[0].content == "how many apples?"
    assert Prompting().apply(asked("three"), ()) == asked("three")
