"""Turns out of order: what is mended, and what is left to be refused."""

from __future__ import annotations

from typing import Any

import pytest

from corral.data.formats.turns import TurnOrderError, mend_turns, ordered_conversation
from corral.messages import Conversation, Message

S, U, V, A, B = (
    Message("system", "s"),
    Message("user", "u"),
    Message("user", "v"),
    Message("assistant", "a"),
    Message("assistant", "b"),
)
UNTRAINED = Message("assistant", "b", trained=False)


def mended(*turns: Message) -> Conversation:
    with pytest.raises(TurnOrderError) as caught:
        ordered_conversation(turns)
    return mend_turns(caught.value)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ((A, U, B), (U, B)),
        ((S, A, B, U, A), (S, U, A)),
        ((U, A, V), (U, A)),
        ((A, U, B, V, V), (U, B)),
        ((U, V, A), (Message("user", "u\n\nv"), A)),
        ((U, A, B, V, A), (U, Message("assistant", "a\n\nb"), V, A)),
        ((U, UNTRAINED, UNTRAINED), (U, Message("assistant", "b\n\nb", trained=False))),
    ],
)
def test_turns_are_left_out_at_the_ends_and_joined_within(turns: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert mended(*turns).messages == expected


@pytest.mark.parametrize("turns", [(), (S,), (U,), (A,), (A, U), (S, A), (U, S, A), (U, A, UNTRAINED)])
def test_what_cannot_be_mended_is_refused_with_its_first_reason(turns: tuple[Any, ...]) -> None:
    with pytest.raises(TurnOrderError) as caught:
        ordered_conversation(turns)
    with pytest.raises(TurnOrderError) as again:
        mend_turns(caught.value)
    assert again.value.reason == caught.value.reason
