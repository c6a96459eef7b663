"""The order of a conversation's turns: checked, and mended where nothing has to be invented.

A conversation is a system message, if there is one, then user and assistant by turns, the assistant last. Chats that were cut
in two begin with an answer, and logs end with a question: such turns can be left out, and the rest still means what it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from corral.data.formats.fields import FormatError
from corral.messages import Conversation, Message


class TurnOrderError(FormatError):
    """The turns of a conversation are out of order. `turns` holds them, so that they can be mended."""

    def __init__(self, reason: str, turns: Sequence[Message]) -> None:
        super().__init__(reason)
        self.turns = tuple(turns)


def ordered_conversation(turns: Sequence[Message]) -> Conversation:
    """A conversation of these turns. Raises TurnOrderError."""
    reason = _explain_disorder(turns)
    if reason is not None:
        raise TurnOrderError(reason, turns)
    return Conversation(tuple(turns))


def check_turn_order(turns: Sequence[Message]) -> None:
    """The same check where turns cannot be mended: in a prompt, or in two conversations that are compared.

    Raises FormatError.
    """
    reason = _explain_disorder(turns)
    if reason is not None:
        raise FormatError(reason)


def _explain_disorder(turns: Sequence[Message]) -> str | None:
    if not turns:
        return "there are no messages"
    for number, turn in enumerate(turns[1:], start=2):
        if turn.role == "system":
            ordinal = {2: "second", 3: "third"}.get(number, f"{number}th")
            return f"system message in {ordinal} place: it must be the first"
        if turn.role == turns[number - 2].role:
            return f"turns {number - 1} and {number} are both from the {turn.role}"
    if turns[-1].role != "assistant":
        return f"no answer: the last message is from the {turns[-1].role}"
    if turns[turns[0].role == "system"].role != "user":
        return "no question: the first message is from the assistant"
    return None


def mend_turns(error: TurnOrderError) -> Conversation:
    """The conversation without answers before the first question and questions after the last answer; consecutive turns of
    one side become one, with a blank line between them.

    Raises the error itself if nothing is left, a system message is not the first, or of two answers that follow each other
    only one is to be trained on.
    """
    turns = list(error.turns)
    system = turns[:1] if turns and turns[0].role == "system" else []
    turns = turns[len(system) :]
    while turns and turns[0].role == "assistant":
        del turns[0]
    while turns and turns[-1].role == "user":
        del turns[-1]
    merged = [_merge(list(group), error) for _, group in groupby(turns, key=lambda turn: turn.role)]
    if _explain_disorder([*system, *merged]) is not None:
        raise error
    return Conversation((*system, *merged))


def _merge(turns: list[Message], error: TurnOrderError) -> Message:
    if len({turn.trained for turn in turns}) > 1:
        raise error
    return Message(turns[0].role, "\n\n".join(turn.content for turn in turns), turns[0].trained)
